"""The single steps from the command line: training towards zeros, a criterion of the user's own, rounds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tinier as package
from test_cli import refused, tinier
from tinier.errors import InputError
from tinier.recovery.choose import as_penalties
from tinier.recovery.group_lasso import GroupLasso
from tinier.recovery.l1 import L1
from tinier.verbs import load, sparsify

PULL = "group_lasso:weight=0.3,part=producing,proximal=true"
# The first four of 24 hidden units matter least, whatever their weights are.
OWN = """
import torch
from tinier.criteria.magnitude import Magnitude

def ramp(network, group):
    return torch.arange(group.size)

class Mine(Magnitude):
    pass

number = 3
"""


def done(*words: object) -> dict[str, Any]:
    outcome = tinier(*words, "--json")
    assert outcome.exit_code == 0, (outcome.output, outcome.exception)
    return json.loads(outcome.stdout)  # type: ignore[no-any-return]


def trained(files: Path, out: Path, *more: object) -> dict[str, Any]:
    return done("sparsify", files / "model.onnx", "--train", files / "train.npz", "-o", out, *more)


def test_training_towards_zeros_cuts_what_became_zero(files: Path, tmp_path: Path) -> None:
    report = trained(files, tmp_path / "o", "--penalty", PULL, "--epochs", 12)
    assert 0 < report["macs"]["after"] < report["macs"]["before"]
    assert any(
        "trained for 12 epochs" in note and "group_lasso" in note for note in report["notes"]
    )
    names = {entry.name for entry in (tmp_path / "o").iterdir()}
    assert {"model.onnx", "model.pt2", "plan.json", "README.md"} <= names
    again = load(tmp_path / "o" / "model.pt2")
    assert sum(p.numel() for p in again.model.parameters()) == report["parameters"]["after"]
    weak = trained(files, tmp_path / "w", "--penalty", "l1:weight=0", "--epochs", 1, "--labels")
    assert weak["macs"]["after"] == weak["macs"]["before"]  # nothing became zero


@pytest.mark.parametrize("penalty", ["growing:most=2", "l2", "soft_filter:keep=0.5"])
def test_a_share_may_be_asked_for(files: Path, tmp_path: Path, penalty: str) -> None:
    more = ["--penalty", penalty, "--epochs", 2, "--keep", 0.5]
    report = trained(files, tmp_path / "out", *more)
    assert 0.4 < report["macs"]["after"] / report["macs"]["before"] <= 0.5


def test_what_sparsify_refuses(files: Path, tmp_path: Path) -> None:
    def call(*more: object) -> Any:
        given = ["--train", files / "train.npz", "-o", tmp_path / "out", *more]
        return tinier("sparsify", files / "model.onnx", *given)

    refused(call("--penalty", "group_laso", "--epochs", 1), "did you mean group_lasso?")
    refused(call("--penalty", "l1:strength=1", "--epochs", 1), "there are weight, proximal")
    refused(call("--penalty", "l1:weight=-1", "--epochs", 1), "weight")
    refused(call("--penalty", "l1"), "give seconds, epochs or both")
    refused(call("--penalty", "growing", "--epochs", 1), "keep=")
    refused(call("--penalty", "l1", "--epochs", 1, "--keep", 2), "keep=2")
    assert call("--epochs", 1).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_penalties_in_words() -> None:
    assert as_penalties("l1") == (L1(),)
    assert as_penalties([L1(2.0), "l1:weight=2"]) == (L1(2.0), L1(2))
    assert as_penalties(PULL) == (GroupLasso(0.3, "producing", True),)
    for wrong in (3, [3], [None], "l1:weight", "l1:weight=x"):
        with pytest.raises(InputError, match=r"penalty|penalties|l1"):
            as_penalties(wrong)  # type: ignore[arg-type]
    x = torch.randn(2, 4)
    model = torch.nn.Linear(4, 3)
    one = sparsify(model, x, torch.randn(64, 4), penalties=L1(1e-3), epochs=1)
    named = sparsify(model, x, torch.randn(64, 4), penalties="l1", epochs=1)
    assert "with l1" in one.notes[-1] and "with l1" in named.notes[-1]


def test_a_criterion_of_ones_own(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owncriterion.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    prune = ["prune", files / "model.onnx", "--keep", 0.5, "-o", tmp_path / "out"]
    report = done(*prune, "--criterion", "owncriterion:ramp")
    assert report["edits"]
    (edit,) = json.loads((tmp_path / "out" / "plan.json").read_text())["edits"]
    assert edit["kept"] == list(range(12, 24))
    assert done(*prune[:-1], tmp_path / "mine", "--criterion", "owncriterion:Mine")["edits"]
    plain = done(*prune[:-1], tmp_path / "plain", "--criterion", "magnitude")
    assert (
        plain["edits"]
        == done(*prune[:-1], tmp_path / "x", "--criterion", "owncriterion:Mine")["edits"]
    )
    for name, message in (
        ("nomodule:f", "cannot be imported"),
        ("owncriterion:number", "no function number"),
    ):
        refused(tinier(*prune[:-1], tmp_path / "y", "--criterion", name), message)
    from_python = package.prune(str(files / "model.onnx"), keep=0.5, criterion="owncriterion:ramp")
    assert [e.row() for e in from_python.plan.edits] == [tuple(e[1:]) for e in report["edits"]]


def test_rounds_and_sizes(files: Path, tmp_path: Path) -> None:
    prune = ["prune", files / "model.onnx", "-o", tmp_path / "out"]
    more = [
        "--at-most",
        "3kB",
        "--of",
        "bytes",
        "--steps",
        2,
        "--schedule",
        "cubic",
        "--round-to",
        1,
    ]
    report = done(*prune, *more)
    assert 2700 < 4 * report["parameters"]["after"] <= 3000
    refused(
        tinier(*prune[:-1], tmp_path / "x", "--keep", 0.5, "--threshold", 1), "leave out the others"
    )


def test_data_of_another_width(files: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "narrow.npz", x=np.zeros((40, 1, 8, 7), dtype=np.float32))
    for verb, option in (("prune", "--data"), ("linearize", "--data"), ("sparsify", "--train")):
        more = ["--penalty", "l1", "--epochs", 1] if verb == "sparsify" else []
        given = [
            verb,
            files / "model.onnx",
            option,
            tmp_path / "narrow.npz",
            "-o",
            tmp_path / "out",
        ]
        refused(
            tinier(*given, *more), "each example has shape (1, 8, 7), the model needs (1, 8, 8)"
        )
