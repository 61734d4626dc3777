"""Distillation as a verb: what a student learns, what is kept, what is refused before any work."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tinier
from networks import build
from test_cli import refused
from test_cli import tinier as command
from tinier.errors import DataError, InputError, ModelError
from tinier.recovery.choose import as_losses
from tinier.recovery.cross_entropy import CrossEntropy
from tinier.recovery.soft_targets import SoftTargets

STUDENT = """
import torch
from torch import nn

class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x):
        return self.body(x)

def student():
    torch.manual_seed(0)
    return Student()
"""


class Wide(nn.Module):
    """Of a width, with dropout."""

    def __init__(self, width: int, classes: int = 5, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(12, width), nn.Linear(width, classes)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.dropout(torch.relu(self.first(x))))
        return found


def data(count: int = 256, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, 12, generator=generator),
        torch.randint(0, 5, (count,), generator=generator),
    )


def distance(model: nn.Module, teacher: nn.Module) -> float:
    x, _ = data(512, seed=9)
    with torch.no_grad():
        ours, theirs = (one.eval()(x).log_softmax(1) for one in (model, teacher))
        return float((ours - theirs).square().mean())


def test_a_student_comes_near_its_teacher() -> None:
    student, teacher = Wide(8, seed=1), Wide(32, seed=2)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    teacher.train()
    x, _ = data()
    done = tinier.distill(student, teacher, x, epochs=40, batch=32, lr=0.01)
    assert teacher.training and student.training  # their modes are their own
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert distance(done.model, teacher) < 0.3 * distance(student, teacher)
    assert type(done.model) is Wide and not done.plan.edits
    assert "distilled for 40 epochs" in done.notes[0]


def test_distilling_from_oneself_changes_nothing() -> None:
    model = Wide(8)
    done = tinier.distill(model, model, data()[0], epochs=3)
    assert all(
        torch.equal(value, model.state_dict()[name])
        for name, value in done.model.state_dict().items()
    )


def test_several_teachers_teach_their_mean() -> None:
    student, teachers = Wide(16, seed=1), [Wide(32, seed=2), Wide(32, seed=3)]
    x, _ = data()

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (teachers[0].eval()(x) + teachers[1].eval()(x)) / 2

    done = tinier.distill(student, teachers, x, epochs=40, batch=32, lr=0.01)
    assert distance(done.model, Mean()) < 0.3 * distance(student, Mean())
    assert distance(done.model, Mean()) < 0.3 * distance(done.model, teachers[0])
    with pytest.raises(InputError, match="empty"):
        tinier.distill(student, [], x, epochs=1)


def test_features_by_name_and_by_pairs() -> None:
    student, teacher, (x, _) = Wide(8, seed=1), Wide(32, seed=2), data()
    losses = ["soft_targets:temperature=2", "hints:weight=0.1"]
    found = tinier.distill(student, teacher, x, losses=losses, epochs=2)
    given = tinier.distill(
        student, teacher, x, losses=losses, pairs={"first": "first", "last": "last"}, epochs=2
    )
    for one, two in zip(found.model.parameters(), given.model.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(InputError, match="no part 'middle'"):
        tinier.distill(student, teacher, x, losses=losses, pairs={"middle": "first"}, epochs=1)


def test_a_pruned_student_keeps_its_plan(tmp_path: Path) -> None:
    teacher, (x, _) = Wide(32, seed=2), data()
    pruned = tinier.prune(teacher, x[:2], keep=0.5)
    done = tinier.distill(pruned, teacher, x, epochs=2)
    assert done.plan == pruned.plan and done.original is pruned.original
    recovered = tinier.recover(pruned, x, epochs=2)
    for one, two in zip(done.model.parameters(), recovered.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_recovering_takes_what_the_loop_takes(tmp_path: Path) -> None:
    teacher, (x, y) = Wide(32, seed=2), data()
    pruned = tinier.prune(teacher, x[:2], keep=0.5)
    arguments: dict[str, Any] = {
        "losses": ["soft_targets:temperature=2", CrossEntropy(0.1)],
        "valid": data(64, seed=3),
        "epochs": 3,
        "batch": 32,
        "ema": 0.9,
    }
    whole = tinier.recover(pruned, (x, y), **arguments)
    again = tinier.recover(pruned, (x, y), checkpoint=tmp_path / "state", **arguments)
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert (tmp_path / "state" / "training.safetensors").exists()
    trained = tinier.recover(tinier.quantize(teacher, x[:2], x), x, epochs=1, lr=1e-3, batch=32)
    assert any("trained quantized" in note for note in trained.notes)


def test_what_does_not_fit_is_refused() -> None:
    x, _ = data(64)
    teacher = Wide(32)

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Wide(8)

        def forward(self, values: Tensor) -> Tensor:
            found: Tensor = self.body(values)
            return found

    with pytest.raises(ModelError, match="must be the same"):
        tinier.distill(Wide(8, classes=7), teacher, x, epochs=1)
    with pytest.raises(InputError, match="no input x; it takes values"):
        tinier.distill(Other(), teacher, x, epochs=1)
    with pytest.raises(DataError, match="cross_entropy needs labels"):
        tinier.distill(Wide(8), teacher, x, losses="cross_entropy", epochs=1)
    with pytest.raises(InputError, match="the student is quantized"):
        tinier.distill(tinier.quantize(Wide(8), x[:2], x), teacher, x, epochs=1)
    with pytest.raises(InputError, match="needs an end"):
        tinier.distill(Wide(8), teacher, x)


def test_losses_by_name() -> None:
    assert as_losses("soft_targets:temperature=2") == (SoftTargets(2),)
    assert as_losses([CrossEntropy(), "output_mse"])[0] == CrossEntropy()
    for text, message in (
        ("soft_target", "did you mean soft_targets"),
        ("soft_targets:heat=3", "no setting of soft_targets"),
        ("soft_targets:temperature=0", "above 0"),
    ):
        with pytest.raises(InputError, match=message):
            as_losses(text)
    with pytest.raises(InputError, match="is none"):
        as_losses(3)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_is_named(tmp_path: Path) -> None:
    x, _ = data(64)
    done = tinier.distill(Wide(8), Wide(32), x, epochs=30, lr=1e30, losses="output_mse")
    (note,) = [note for note in done.notes if "ended early" in note]
    assert "step" in note and "last good weights" in note
    assert all(bool(value.isfinite().all()) for value in done.model.state_dict().values())


def test_the_command_line(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.py").write_text(STUDENT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    words = ["distill", "small:student", files / "model.onnx", "--data", files / "train.npz"]
    more = ["--epochs", 4, "--loss", "soft_targets:temperature=2", "--loss", "cross_entropy"]
    outcome = command(*words, *more, "--out", out, "--json")
    assert outcome.exit_code == 0, outcome.output
    report = json.loads(outcome.stdout)
    assert report["class"] == "Student"
    assert {"model.onnx", "model.pt2", "README.md"} <= {entry.name for entry in out.iterdir()}
    x = np.load(files / "train.npz", allow_pickle=False)["x"][:4]
    assert tinier.load(out / "model.pt2").model(torch.from_numpy(x)).shape == (4, 3)
    for wrong, message in (
        (["--loss", "kd", "--epochs", 1], "soft_targets"),
        (["--loss", "soft_targets:temperature=0", "--epochs", 1], "above 0"),
        ([], "needs an end"),
    ):
        refused(command(*words, *wrong, "--out", tmp_path / "none"), message)
    assert not (tmp_path / "none").exists()


def test_a_conformance_network_as_student() -> None:
    network = build("residual_cnn")
    other = build("residual_cnn", seed=1)
    x = torch.randn(16, *network.example["x"].shape[1:])
    done = tinier.distill(network.module, other.module, {"x": x}, epochs=2, batch=8)
    assert "distilled" in done.notes[0]
