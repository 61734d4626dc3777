"""A result folder that was changed in any way does not hold any more."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Run
from tinier.errors import DataError, InputError
from tinier.verify import Check, verify
from toy import images


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    """A copy of the finished run's folder."""
    return Path(shutil.copytree(run.folder, tmp_path / "out"))


def failed(checks: list[Check]) -> set[str]:
    return {check.what for check in checks if check.holds is False}


def doctor(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change certificate.json."""
    file = folder / "certificate.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def rehash(folder: Path, name: str) -> None:
    """What a forger would do: put the new hash of a changed file into certificate.json."""
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    doctor(folder, lambda record: record["files"].update({name: digest}))


def test_an_untouched_folder_holds_wherever_it_lies(folder: Path) -> None:
    checks = verify(folder, threads=1)
    assert not failed(checks)
    assert [check.what for check in checks if check.holds is None] == []
    assert {"certification data", "scores", "figures and statement", "certificate"} <= {
        check.what for check in checks
    }


@pytest.mark.parametrize(
    "name", ["model.onnx", "scores.npz", "model.safetensors", "plan.json", "recipe.toml"]
)
def test_one_changed_byte(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    assert failed(verify(folder)) == {name}
    (folder / name).unlink()
    assert failed(verify(folder)) == {name}


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["certificate"].update(bound=0.0),
        lambda r: r["certificate"].update(bound=0.02),
        lambda r: r["certificate"].update(limit=0.001),
        lambda r: r["certificate"].update(delta=0.001),
        lambda r: r["certificate"].update(examples=100_000),
        lambda r: r["certificate"].update(harmful=-1),
        lambda r: r["certificate"].update(loss=-0.1),
        lambda r: r["certificate"].update(test="trust me"),
        lambda r: r["certificate"].pop("helpful"),
        lambda r: r.update(statement="It is perfect."),
    ],
)
def test_a_doctored_certificate(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    doctor(folder, change)
    assert "figures and statement" in failed(verify(folder))


def test_a_limit_that_was_not_kept_cannot_be_claimed(folder: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        record["certificate"].update(limit=0.001, holds=False, needed=None)

    doctor(folder, change)
    detail = next(c.detail for c in verify(folder) if c.what == "figures and statement")
    assert "the limit is said to be kept" in detail


def test_a_certificate_that_was_taken_away_leaves_no_claim(folder: Path) -> None:
    doctor(folder, lambda r: r.update(certificate=None))
    assert failed(verify(folder)) == {"certificate"}
    doctor(folder, lambda r: r.update(statement=f"No certificate: {r['reason']}."))
    checks = verify(folder)
    assert not failed(checks) and checks[-1].holds is None


def test_an_artifact_or_scores_without_a_hash(folder: Path) -> None:
    for name in ("model.onnx", "scores.npz"):
        copy = Path(shutil.copytree(folder, folder.with_name(name)))
        doctor(copy, lambda r, name=name: r["files"].pop(name))  # type: ignore[misc]
        assert failed(verify(copy)) == {name}


def test_a_forged_artifact_gives_other_scores(folder: Path, files: Path) -> None:
    # Another network in place of the artifact, with its hash put right.
    import onnx

    model = onnx.load(folder / "model.onnx")
    output = model.graph.output[0].name
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == output:
                node.output[index] = "plain"
    model.graph.node.append(onnx.helper.make_node("Neg", ["plain"], [output]))
    onnx.save(model, folder / "model.onnx")
    rehash(folder, "model.onnx")
    assert failed(verify(folder)) == {"scores", "certificate"}


def test_forged_scores_are_not_those_of_the_artifact(folder: Path) -> None:
    with np.load(folder / "scores.npz") as stored:
        arrays = dict(stored)
    arrays["artifact"] = arrays["artifact"].copy()
    arrays["artifact"][:50] = 1 - arrays["artifact"][:50]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    (folder / "scores.npz").write_bytes(buffer.getvalue())
    rehash(folder, "scores.npz")
    assert "scores" in failed(verify(folder))
    arrays["artifact"] = arrays["artifact"][:5]
    np.savez_compressed(folder / "scores.npz", **arrays)
    rehash(folder, "scores.npz")
    with pytest.raises(InputError, match=r"scores\.npz does not fit"):
        verify(folder)


def test_other_data(folder: Path, files: Path, tmp_path: Path, run: Run) -> None:
    assert failed(verify(folder, data=str(files / "train.npz"))) == {"certification data"}
    with np.load(run.data) as arrays:
        x, y = arrays["x"].copy(), arrays["y"]
    x[:, 0, 0, 0] += 1e-3
    np.savez(tmp_path / "moved.npz", x=x, y=y)
    assert failed(verify(folder, data=tmp_path / "moved.npz")) == {"certification data"}
    shutil.copy(run.data, tmp_path / "elsewhere.npz")
    assert not failed(verify(folder, data=tmp_path / "elsewhere.npz"))
    with pytest.raises(DataError, match="no such file"):
        verify(folder, data=tmp_path / "nowhere.npz")


def test_data_that_were_python_objects_are_asked_for(folder: Path, run: Run) -> None:
    doctor(folder, lambda r: r["data"]["certify"].update(origin=""))
    with pytest.raises(DataError, match="say where they are now"):
        verify(folder)
    with np.load(run.data) as arrays:
        assert not failed(verify(folder, data=(arrays["x"], arrays["y"])))
    assert failed(verify(folder, data=images(700, 5))) == {"certification data"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("statement"), "it has no statement"),
        (lambda r: r.update(target="abacus"), "unknown target"),
        (lambda r: r.update(artifact=[]), "names no artifact"),
        (lambda r: r.update(artifact=["../model.onnx"]), "not a file of the folder"),
        (lambda r: r["files"].update({"/etc/passwd": "0"}), "not a file of the folder"),
        (lambda r: r["inputs"]["x"].update(dtype="system"), "cannot be read"),
        (lambda r: r["inputs"]["x"].update(shape=[-1]), "cannot be read"),
        (lambda r: r["certificate"].pop("delta"), "cannot be recomputed"),
        (lambda r: r["data"].pop("split"), "cannot be read"),
    ],
)
def test_a_damaged_record(
    folder: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    doctor(folder, change)
    with pytest.raises(InputError, match=message):
        verify(folder)


def test_what_is_not_a_result(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a result of tinier: it has no certificate\.json"):
        verify(tmp_path)
    for text in ("", "[]", "{}", "no json"):
        (tmp_path / "certificate.json").write_text(text)
        with pytest.raises(InputError, match=r"certificate\.json cannot be read"):
            verify(tmp_path)
