"""The main job end to end on a problem that a tiny network learns in a second."""

import errno
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from conftest import Run
from tinier.compress import compress
from tinier.errors import DataError, InputError, OutputError
from tinier.network import Network
from tinier.output import check_output, whole
from tinier.report import folder as folders
from tinier.search.candidate import Limits
from tinier.search.workshop import Workshop
from tinier.targets.onnxruntime import OnnxRuntime
from tinier.verbs import load
from tinier.verify import verify
from toy import Recorder, images, steady

MAIN = sys.modules["tinier.compress"]  # the name in the package is the function
EXAMPLE = images(2, 0)[0]
FILES = {
    "model.onnx", "model.safetensors", "plan.json", "recipe.toml", "certificate.json", "scores.npz",
    "result.json", "report.html", "README.md",
}  # fmt: skip


def quick(model: nn.Module, data: Any, *, keeps: tuple[float, ...] = (0.5,), **other: Any) -> Any:
    """A run on the torch runtime, which writes its artifacts in no time."""
    settings = {"example": EXAMPLE, "target": "torch", "budget": 60, "threads": 1, **other}
    with steady(keeps):
        return compress(model, data, **settings)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def held(folder: Path) -> bool:
    return all(check.holds is not False for check in verify(folder))


def beside(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.parent.iterdir())


# The whole run ------------------------------------------------------------------------------------------------------------


def test_the_folder_has_everything(run: Run) -> None:
    assert {file.name for file in run.folder.iterdir()} == FILES
    assert beside(run.folder) == ["out"]
    assert run.result.met and run.result.best and run.result.folder == run.folder
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in run.folder.iterdir())
    recipe = tomllib.loads((run.folder / "recipe.toml").read_text())
    assert [step["method"] for step in recipe["steps"]] == [
        "channel_pruning", "compensate", "recover", "quantization",
    ]  # fmt: skip
    assert recipe["settings"]["seed"] == 0 and recipe["limits"] == {"max_drop": 0.04}
    certificate = json.loads((run.folder / "certificate.json").read_text())
    assert certificate["met"] is True and certificate["certificate"]["examples"] == 490
    assert certificate["certificate"]["bound"] <= 0.04


def test_every_candidate_has_a_status_and_a_reason(run: Run) -> None:
    table = run.result.table
    assert all(c.reason and c.status in ("taken", "front", "dropped", "original") for c in table)
    assert [c.original for c in table] == [True] + [False] * (len(table) - 1)
    assert [c for c in table if c.status == "taken"] == [run.result.best]
    assert run.result.original is table[0]


def test_training_data_make_recovered_candidates(run: Run) -> None:
    pruned = [c for c in run.result.table if c.variant.keep < 1]
    assert pruned and all(c.recovered and "recovered" in c.name for c in pruned)
    assert run.progress.tasks.count("recovering pruned, 50 % fewer MACs") == 1


def test_progress_reaches_its_total_and_never_passes_it(run: Run) -> None:
    for task, done in run.progress.done.items():
        total = run.progress.totals[task]
        assert total is None or 0 < done <= total + 1e-9, run.progress.tasks[task - 1]


def test_the_artifact_runs_with_the_lines_of_the_readme_and_without_tinier(run: Run) -> None:
    code = (run.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) == 3
    # -S leaves out the .pth file through which tinier is found; the packages come back by their folder.
    packages = Path(np.__file__).parents[1]
    start = f"import sys; sys.path.append({str(packages)!r})\nsys.modules['tinier'] = None\n"
    done = subprocess.run(
        [sys.executable, "-S", "-c", start + code],
        cwd=run.folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    session = OnnxRuntime().open(run.folder / "model.onnx", 1)
    expected = session.run({"x": np.ones((1, 1, 8, 8), np.float32)})[0]
    printed = [float(number) for number in re.findall(r"-?\d+\.\d*(?:e[-+]\d+)?", done.stdout)]
    assert printed == pytest.approx(expected[0].tolist(), rel=1e-4)


def test_plan_and_weights_rebuild_the_stock_class(run: Run) -> None:
    rebuilt = load(run.folder, into=run.model, example=EXAMPLE)
    assert type(rebuilt.model) is type(run.model)
    pruned: Any = rebuilt.model
    assert pruned.conv1.out_channels < 8 or pruned.conv2.out_channels < 16
    # The recovered float network is the front's other artifact; the best one is its quantized form.
    x, y = images(200, seed=9)
    floats = next(
        c for c in run.result.table if c.variant.keep == 0.5 and not c.variant.ranges and c.artifact
    )
    assert floats.certified is not None and floats.certified.scores is not None
    # The artifact is its quantization: close, and the same answers nearly always.
    artifact = OnnxRuntime().open(run.folder / "model.onnx", 1).run({"x": x.numpy()})[0]
    outputs = rebuilt.network({"x": x})[0].numpy()
    assert np.abs(artifact - outputs).max() < 0.1 * np.abs(outputs).max()
    assert (artifact.argmax(1) == outputs.argmax(1)).mean() >= 0.98
    assert (outputs.argmax(1) == y.numpy()).mean() >= 0.98
    # And it trains on.
    rebuilt.model(x).sum().backward()
    assert all(p.grad is not None for p in rebuilt.model.parameters())


def test_the_float_artifact_equals_the_rebuilt_network(tmp_path: Path, cnn: nn.Module) -> None:
    result = quick(cnn, images(300, 2), out=tmp_path / "out", max_drop=0.9)
    assert result.best and result.best.variant.keep == 0.5
    rebuilt = load(tmp_path / "out", into=cnn, example=EXAMPLE)
    x = images(50, seed=9)[0]
    program = torch.export.load(tmp_path / "out" / result.best.artifact.files[0].name)
    torch.testing.assert_close(rebuilt.network({"x": x})[0], program.module()(x=x)[0])


def test_verify_holds(run: Run) -> None:
    assert held(run.folder)


# What goes in stays as it is ----------------------------------------------------------------------------------------------


def test_model_data_and_random_state_are_unchanged(tmp_path: Path, cnn: nn.Module) -> None:
    x, y = images(300, 2)
    train = images(128, 3)
    cnn.train()
    before, images_before, labels_before = state(cnn), x.clone(), y.clone()
    random = torch.get_rng_state()
    try:
        with steady((0.5,)):
            compress(
                cnn,
                (x, y),
                example=EXAMPLE,
                train=train,
                max_drop="5%",
                target="torch",
                budget=30,
                threads=1,
            )
        assert cnn.training and all(p.grad is None for p in cnn.parameters())
    finally:
        cnn.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in cnn.state_dict().items())
    assert torch.equal(x, images_before) and torch.equal(y, labels_before)
    assert torch.equal(random, torch.get_rng_state())


def test_without_training_data_nothing_is_trained_and_the_same_seed_gives_the_same_plan(
    tmp_path: Path, mlp: nn.Module
) -> None:
    plans, certificates = [], []
    for name in ("a", "b"):
        recorder = Recorder()
        out = tmp_path / name
        result = quick(mlp, images(300, 2), max_drop="5%", out=out, progress=recorder)
        assert not any(c.recovered for c in result.table)
        assert not any(task.startswith("recovering") for task in recorder.tasks)
        plans.append((out / "plan.json").read_text())
        record = json.loads((out / "certificate.json").read_text())
        certificates.append((record["certificate"], record["files"]["model.safetensors"]))
    assert plans[0] == plans[1] and certificates[0] == certificates[1]
    assert json.loads(plans[0])["edits"]


def test_unlabelled_data_are_judged_by_agreement(
    tmp_path: Path, mlp: nn.Module, files: Path
) -> None:
    out = tmp_path / "out"
    result = quick(mlp, str(files / "unlabelled.npz"), out=out, max_drop="5%")
    assert result.facts["metric"] == "agreement" and result.met
    assert "agreement" in json.loads((out / "certificate.json").read_text())["statement"]
    assert np.load(out / "scores.npz")["original"].min() == 1.0
    assert held(out)


def test_parts_can_be_handed_in(tmp_path: Path, mlp: nn.Module, files: Path) -> None:
    out = tmp_path / "out"
    train = str(files / "train.npz")
    result = quick(mlp, str(files / "valid.npz"), certify=train, out=out, max_drop="5%")
    assert (result.facts["search_examples"], result.facts["certify_examples"]) == (700, 300)
    assert held(out)
    with pytest.raises(DataError, match="proves nothing"):
        quick(mlp, str(files / "valid.npz"), certify=str(files / "valid.npz"))


def test_all_runtimes_on_the_real_clock(tmp_path: Path, mlp: nn.Module) -> None:
    result = compress(
        mlp,
        images(400, 2),
        example=EXAMPLE,
        target=["openvino", "torch"],
        budget=1,
        out=tmp_path / "out",
        threads=1,
        max_drop="5%",
    )
    originals = [c for c in result.table if c.original]
    assert [c.target for c in originals] == ["openvino", "torch"]
    assert all(c.latency and c.latency.low <= c.latency.median <= c.latency.high for c in originals)
    assert all(c.parity and c.parity.passed for c in originals)
    assert result.met and result.best and result.best.memory and result.best.memory.peak > 10**6
    assert set(result.facts["runtimes"]) == {"openvino", "torch"}
    assert (tmp_path / "out" / result.best.artifact.files[0].name).is_file()  # type: ignore[union-attr]


def test_no_limit_means_one_point(mlp: nn.Module) -> None:
    assert MAIN._limits(None, None, None) == Limits(max_drop=0.01)
    assert MAIN._limits(None, 5, "1kB") == Limits(None, 5.0, 1000)
    assert MAIN._limits("2%", None, None) == Limits(0.02)


# Ctrl-C -------------------------------------------------------------------------------------------------------------------

EARLY = [("reading model", 1), ("original on", 1), ("timing", 1)]
LATE = [
    ("building", 1), ("timing", 2), ("quality on", 1), ("quality of the original", 1), ("timing", 3),
    ("peak memory", 1), ("quality of the original", 2),
]  # fmt: skip


@pytest.mark.parametrize(("task", "occurrence"), LATE)
def test_ctrl_c_leaves_the_best_so_far(
    tmp_path: Path, mlp: nn.Module, files: Path, task: str, occurrence: int
) -> None:
    out = tmp_path / "out"
    result = quick(
        mlp,
        str(files / "valid.npz"),
        out=out,
        progress=Recorder(task, occurrence),
        max_drop="5%",
    )
    assert result.interrupted and result.best is not None
    assert all(c.reason and c.status != "waiting" for c in result.table)
    assert beside(out) == ["out"] and held(out)
    assert (out / result.best.artifact.files[0].name).is_file()


@pytest.mark.parametrize(("task", "occurrence"), EARLY)
def test_ctrl_c_before_anything_was_measured_leaves_nothing(
    tmp_path: Path, mlp: nn.Module, task: str, occurrence: int
) -> None:
    progress = Recorder(task, occurrence)
    if task == "reading model":
        with pytest.raises(KeyboardInterrupt):
            quick(mlp, images(100, 2), out=tmp_path / "out", max_drop="9%", progress=progress)
    else:
        result = quick(mlp, images(100, 2), out=tmp_path / "out", max_drop="9%", progress=progress)
        assert result.interrupted and result.best is None and not result.met
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_the_folder_is_written(
    tmp_path: Path, mlp: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = folders.save_weights, [1]

    def interrupted(network: Network, file: Path) -> None:
        if left:
            left.pop()
            raise KeyboardInterrupt
        real(network, file)

    monkeypatch.setattr(folders, "save_weights", interrupted)
    result = quick(mlp, images(300, 2), out=tmp_path / "out", max_drop="5%")
    assert result.interrupted and not left
    assert beside(tmp_path / "out") == ["out"] and (tmp_path / "out" / "README.md").is_file()


# Limits that cannot be kept -----------------------------------------------------------------------------------------------


def test_an_impossible_latency_gives_the_nearest_miss(tmp_path: Path, mlp: nn.Module) -> None:
    result = quick(mlp, images(300, 2), out=tmp_path / "out", max_latency="0.001ms")
    assert not result.met and result.best and result.best.variant.keep == 0.5
    assert "2.75 ms, 0.001 ms allowed" in result.reason
    assert (tmp_path / "out" / "model.pt2").is_file()
    record = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert record["met"] is False and record["certificate"]["limit"] is None


def test_too_few_examples_for_a_certificate(tmp_path: Path, mlp: nn.Module) -> None:
    with pytest.raises(DataError, match=r"42 examples certify, of 60 .* give about 586 examples"):
        quick(mlp, images(60, 2), out=tmp_path / "out", max_drop="1%")
    assert not list(tmp_path.iterdir())
    # No limit on the loss: its bound is given, however weak.
    result = quick(mlp, images(60, 2), max_size="1MB")
    assert result.met and result.best.certificate and result.best.certificate.bound > 0.02


# Bad input ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta": 0}, "probability between 0 and 1"),
        ({"delta": float("nan")}, "probability between 0 and 1"),
        ({"batch": 0}, "batch is 0; 1 or more"),
        ({"threads": 0}, "threads is 0; 1 or more"),
        ({"seed": -1}, "seed is -1"),
        ({"max_drop": "-1%"}, "max-drop is '-1%'"),
        ({"max_size": "4 apples"}, "max-size is '4 apples'"),
        ({"max_latency": "0ms"}, "max-latency is '0ms'"),
        ({"budget": "soon"}, "budget is 'soon'"),
        ({"target": "abacus"}, "no target 'abacus'; the targets are cpu, "),
        ({"target": []}, "no runtime"),
        ({"metric": "acuracy"}, "accuracy|Accuracy"),
    ],
)  # fmt: skip
def test_wrong_settings(
    tmp_path: Path, mlp: nn.Module, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        quick(mlp, images(50, 2), out=tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_nan(tmp_path: Path, mlp: nn.Module) -> None:
    broken = type(mlp)()
    torch.nn.init.constant_(broken.fc2.weight, float("nan"))  # type: ignore[arg-type, union-attr]
    with pytest.raises(DataError, match="output 0 is NaN for example 0"):
        quick(broken, images(50, 2), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


# The folder ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [folders.shutil, folders])
def test_a_full_disk_leaves_the_old_result_whole(
    tmp_path: Path, mlp: nn.Module, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    out = tmp_path / "out"
    quick(mlp, images(300, 2), out=out, max_drop="5%")
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    name = "copyfile" if module is folders.shutil else "save_file"
    monkeypatch.setattr(module, name, full)
    with pytest.raises(OutputError, match=r"no space left to write .*another disk"):
        quick(mlp, images(300, 2), out=out, max_drop="5%", seed=1)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert beside(out) == ["out"]


def test_safetensors_reports_a_full_disk_in_its_own_way(tmp_path: Path) -> None:
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(OutputError, match="no space left"), whole(tmp_path / "out"):
        raise SafetensorError(text)
    with pytest.raises(OutputError, match="cannot be written: odd"), whole(tmp_path / "out"):
        raise SafetensorError("odd")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_where_candidates_are_built(
    tmp_path: Path, mlp: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Workshop, "lower", full)
    with pytest.raises(OutputError, match=r"no space left in .*TMPDIR"):
        quick(mlp, images(50, 2), out=tmp_path / "out", max_drop="20%")
    assert not list(tmp_path.iterdir())


def test_a_rename_that_fails_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.name.startswith(".out-") and (self / "new").exists():
            raise OSError(errno.EIO, "broken disk")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="broken disk"), whole(out) as made:
        (made / "new").write_text("new")
    assert beside(out) == ["out"] and (out / "old").read_text() == "old"
    monkeypatch.undo()
    with whole(out) as made:
        (made / "new").write_text("new")
    assert beside(out) == ["out"] and [file.name for file in out.iterdir()] == ["new"]


@pytest.mark.parametrize("name", ["notes.txt", "result.json"])
def test_a_folder_that_is_not_tiniers_is_not_touched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(OutputError, match="was not made by tinier; name another folder"):
        check_output(tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / name)
    with pytest.raises(OutputError, match="does not exist; make it first"):
        check_output(tmp_path / "no" / "such")
    assert [file.name for file in tmp_path.iterdir()] == [name]
