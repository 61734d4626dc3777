"""The command line: exit codes, messages that name the fix, JSON alone on standard output, nothing half-written."""

import io
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from typer.testing import Result as Outcome

import tinier.cli as cli
from conftest import Run
from tinier.report.terminal import Bars
from tinier.version import VERSION
from toy import images, steady

QUICK = ["--target", "torch", "--budget", "60s", "--threads", "1"]


def tinier(*words: object, keeps: Sequence[float] = (0.5,)) -> Outcome:
    with steady(keeps):
        return CliRunner().invoke(cli.app, [str(word) for word in words])


def compress(model: object, data: object, out: Path, *more: object) -> Outcome:
    return tinier("compress", model, "--data", data, "-o", out, *QUICK, *more)


def refused(outcome: Outcome, message: str, code: int = 2) -> None:
    """The exit code, a message with the fix on standard error, no traceback, nothing on standard output."""
    assert outcome.exit_code == code, (outcome.output, outcome.exception)
    assert isinstance(outcome.exception, SystemExit)
    assert message in outcome.stderr.replace("\n", " "), outcome.stderr
    assert "Traceback" not in outcome.output and "\x1b" not in outcome.output
    assert outcome.stdout == ""


# compress -----------------------------------------------------------------------------------------------------------------


def test_compress_and_verify(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = compress(files / "model.onnx", files / "valid.npz", out, "--max-drop", "5%", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["met"] is True and answer["folder"] == str(out)
    assert {row["status"] for row in answer["table"]} <= {"taken", "front", "dropped", "original"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    verified = tinier("verify", out, "--json")
    assert verified.exit_code == 0 and json.loads(verified.stdout)["holds"] is True
    with (out / "model.safetensors").open("ab") as file:
        file.write(b"x")
    verified = tinier("verify", out)
    assert verified.exit_code == 4 and "does not hold" in verified.stdout
    assert "model.safetensors" in verified.stdout and "\x1b" not in verified.stdout


def test_the_table_is_shown(files: Path, tmp_path: Path) -> None:
    done = compress(files / "model.onnx", files / "valid.npz", tmp_path / "out", "--max-drop", 0.05)
    assert done.exit_code == 0, done.output
    assert "original" in done.stdout and "torch" in done.stdout and "\x1b" not in done.output
    assert f"The result is in {tmp_path / 'out'}" in done.stdout


BROKEN: list[tuple[str, Callable[[Path], Any], str]] = [
    ("missing.onnx", lambda p: None, "missing.onnx"),
    ("empty.onnx", lambda p: p.write_bytes(b""), "empty"),
    ("text.onnx", lambda p: p.write_text("no model at all"), "text.onnx"),
    ("model.pt", lambda p: torch.save({"w": torch.zeros(2)}, p), "safetensors.torch.save_file"),
    ("model.pkl", lambda p: p.write_bytes(pickle.dumps({})), "pickle checkpoints are never loaded"),
    (
        "model.tflite",
        lambda p: p.write_text("x"),
        "give an .onnx file, a .keras file or a Hugging Face directory",
    ),
    ("folder", lambda p: p.mkdir(), "config.json"),
]


@pytest.mark.parametrize(("name", "make", "message"), BROKEN, ids=[row[0] for row in BROKEN])
def test_models_that_cannot_be_read(
    files: Path, tmp_path: Path, name: str, make: Callable[[Path], Any], message: str
) -> None:
    model = tmp_path / "in" / name
    model.parent.mkdir()
    make(model)
    refused(compress(model, files / "valid.npz", tmp_path / "out"), message)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def spoiled(**change: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        x, y = (tensor.numpy().copy() for tensor in images(60, 2))
        arrays = {"x": x, "y": y}
        arrays.update({key: value(x, y) for key, value in change.items()})
        np.savez(path, **arrays)  # type: ignore[arg-type]

    return write


def with_value(array: np.ndarray, index: Any, value: float) -> np.ndarray:
    array[index] = value
    return array


DATA: list[tuple[str, Callable[[Path], Any], str]] = [
    ("missing.npz", lambda p: None, "no such file"),
    ("empty.npz", lambda p: p.write_bytes(b""), "the file is empty"),
    ("text.npz", lambda p: p.write_text("1,2"), "np.savez(path, x=…, y=…)"),
    ("data.pkl", lambda p: p.write_bytes(pickle.dumps([1])), "pickles are never loaded"),
    ("objects.npz", spoiled(x=lambda x, y: np.array([{}] * 60)), "never loaded"),
    ("shape.npz", spoiled(x=lambda x, y: x[:, :, :4]), "the model needs (1, 8, 8)"),
    ("flat.npz", spoiled(x=lambda x, y: x.reshape(60, 64)), "x.reshape(len(x), 1, 8, 8)"),
    ("dtype.npz", spoiled(x=lambda x, y: x.astype(np.int64)), "astype('float32')"),
    ("none.npz", spoiled(x=lambda x, y: x[:0], y=lambda x, y: y[:0]), "there are no examples"),
    ("one.npz", spoiled(x=lambda x, y: x[:1], y=lambda x, y: y[:1]), "at least 4 are needed"),
    ("odd.npz", spoiled(y=lambda x, y: y[:59]), "different numbers of examples"),
    ("labels.npz", spoiled(y=lambda x, y: y + 1), "labels are 0 to 2; do yours start at 1?"),
    ("less.npz", spoiled(y=lambda x, y: with_value(y, 7, -1)), "label of example 7 is -1"),
    ("nan.npz", spoiled(x=lambda x, y: with_value(x, (9, 0, 0), np.nan)), "example 9 has NaN"),
    ("inf.npz", spoiled(x=lambda x, y: with_value(x, (9, 0, 0), np.inf)), "example 9 has infinity"),
]


@pytest.mark.parametrize(("name", "make", "message"), DATA, ids=[row[0] for row in DATA])
def test_data_that_do_not_fit(
    files: Path, tmp_path: Path, name: str, make: Callable[[Path], Any], message: str
) -> None:
    data = tmp_path / "in" / name
    data.parent.mkdir()
    make(data)
    refused(compress(files / "model.onnx", data, tmp_path / "out"), message)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-drop", "lots"], "write a share such as 1% or 0.01"),
        (["--max-latency", "5 parsecs"], "write a duration such as"),
        (["--max-size", "-4MB"], "write a size such as"),
        (["--budget", "0"], "write a duration such as"),
        (["--target", "abacus"], "the targets are cpu, "),
        (["--metric", "acuracy"], "ccuracy"),
        (["--metric", "no.such:metric"], "no"),
        (["--delta", "1"], "a probability between 0 and 1"),
        (["--batch", "0"], "1 or more is needed"),
        (["--mean", "a,b"], "write numbers such as 0.485"),
        (["--batch", "many"], "integer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_make_no_sense(
    files: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    refused(compress(files / "model.onnx", files / "valid.npz", tmp_path / "out", *more), message)
    assert not list(tmp_path.iterdir())


def test_an_output_folder_of_somebody_else(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    refused(compress(files / "model.onnx", files / "valid.npz", out), "name another folder")
    assert [f.read_text() for f in out.iterdir()] == ["years of work"]
    refused(compress(files / "model.onnx", files / "valid.npz", out / "thesis.tex"), "is a file")
    refused(compress(files / "model.onnx", files / "valid.npz", tmp_path / "a" / "b"), "make it")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_an_impossible_limit_has_its_own_exit_code(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = compress(files / "model.onnx", files / "valid.npz", out, "--max-latency", "1e-6ms")
    assert done.exit_code == 3, done.output
    assert "ms allowed" in done.stdout.replace("\n", " ")
    assert (out / "model.pt2").is_file() and "not kept" in (out / "README.md").read_text()


def test_too_few_examples_say_how_many(files: Path, tmp_path: Path) -> None:
    x, y = images(50, 2)
    np.savez(tmp_path / "few.npz", x=x.numpy(), y=y.numpy())
    done = compress(
        files / "model.onnx", tmp_path / "few.npz", tmp_path / "out", "--max-drop", "1%"
    )
    assert done.exit_code == 2, done.output
    assert "give about 586 examples" in done.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("when", ["reading model", "quality on", "quality of the original"])
def test_ctrl_c(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    start = Bars.start
    left = [when]

    def interrupting(bars: Bars, text: str, total: float | None) -> int:
        if left and text.startswith(left[0]):
            left.clear()
            raise KeyboardInterrupt
        return start(bars, text, total)

    monkeypatch.setattr(Bars, "start", interrupting)
    out = tmp_path / "out"
    done = compress(files / "model.onnx", files / "valid.npz", out, "--max-drop", "5%")
    assert done.exit_code == 130 and "interrupted" in done.stderr, done.output
    assert [entry.name for entry in tmp_path.iterdir()] == (
        [] if when == "reading model" else ["out"]
    )
    assert out.exists() == (out / "certificate.json").is_file()
    assert out.exists() or "nothing was written" in done.stderr


# The other commands -------------------------------------------------------------------------------------------------------


def test_inspect(files: Path) -> None:
    shown = tinier("inspect", files / "model.onnx")
    assert shown.exit_code == 0, shown.output
    parameters = 64 * 24 + 24 + 24 * 3 + 3
    assert f"{parameters:,} parameters" in shown.stdout and "batch size free" in shown.stdout
    found = json.loads(tinier("inspect", files / "model.onnx", "--json").stdout)
    assert found["parameters"] == parameters and found["macs"] == 64 * 24 + 24 * 3
    assert [group["size"] for group in found["groups"]] == [24]
    assert any("fc2" in e["parameter"] and e["size"] == 3 for e in found["pinned"])
    assert all(entry["reasons"] for entry in found["pinned"])
    refused(tinier("inspect", files / "missing.onnx"), "missing.onnx")


def test_measure(files: Path, run: Run) -> None:
    artifact = run.folder / "model.onnx"
    timed = ["--seconds", "0.3", "--threads", "1"]
    done = tinier("measure", artifact, run.folder, "--json", *timed)
    assert done.exit_code == 0, done.output
    first, second = json.loads(done.stdout)
    assert first["size_bytes"] == second["size_bytes"] == artifact.stat().st_size
    assert first["ratio_to_first"] is None and 0.2 < second["ratio_to_first"]["value"] < 5
    latency = first["latency_ms"]
    assert 0 < latency["low"] <= latency["median"] <= latency["high"]
    assert first["peak_memory_bytes"] > 10**6
    shown = tinier("measure", artifact, *timed)
    assert shown.exit_code == 0 and "median ms" in shown.stdout and "1 threads" in shown.stdout
    refused(tinier("measure", files / "missing.onnx"), "no such file")
    refused(tinier("measure", artifact, "--shape", "x=1xbig"), "write input=1x3x224x224")
    refused(tinier("measure", artifact, "--shape", "z=1x1x8x8"), "has no input z; it has x")


def test_targets() -> None:
    shown = tinier("targets")
    assert shown.exit_code == 0 and "onnxruntime" in shown.stdout and "int8:" in shown.stdout
    found = json.loads(tinier("targets", "--json").stdout)
    assert found["runtimes"]["torch"]["installed"] is True and found["cores"] >= 1
    assert isinstance(found["vnni"], bool)


def test_verify_of_what_is_no_result(tmp_path: Path, run: Run) -> None:
    refused(tinier("verify", tmp_path), "is not a result of tinier")
    folder = shutil.copytree(run.folder, tmp_path / "out")
    refused(tinier("verify", folder, "--data", tmp_path / "no.npz"), "no such file")


def test_help_names_the_exit_codes() -> None:
    shown = " ".join(tinier("--help").stdout.replace("│", " ").split())
    for words in ("0 done", "2 wrong input", "3 no candidate", "4 a result", "130 interrupted"):
        assert words in shown
    for command in ("compress", "inspect", "measure", "verify", "targets", "demo"):
        assert command in shown
    assert tinier("--version").stdout == f"tinier {VERSION}\n"
    assert tinier("explode").exit_code == 2


def test_the_command_itself_in_a_pipe(files: Path, tmp_path: Path) -> None:
    # Everything through real pipes: no colour, and JSON alone on standard output.
    def call(*words: object) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", "from tinier.cli import main; main()", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = call("inspect", files / "model.onnx", "--json")
    assert done.returncode == 0 and json.load(io.StringIO(done.stdout))["macs"]
    assert "\x1b" not in done.stdout + done.stderr
    done = call(
        "compress", tmp_path / "no.onnx", "--data", files / "valid.npz", "-o", tmp_path / "o"
    )
    assert done.returncode == 2 and done.stdout == "" and "\x1b" not in done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
