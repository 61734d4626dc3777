"""What the steps do with data that they cannot use: a refusal that says where, never a model that learned nothing or NaN."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinier.errors import DataError, InputError
from tinier.recovery.cross_entropy import CrossEntropy
from tinier.recovery.group_lasso import GroupLasso
from tinier.verbs import linearize, prune, quantize, recover, sparsify

X = torch.randn(4, 8)
PULL = [GroupLasso(1e-3)]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


def broken(value: float = torch.nan) -> Tensor:
    data = torch.randn(64, 8)
    data[5, 2] = value
    return data


STEPS = {
    "prune": lambda data: prune(mlp(), X, data=data),
    "masks": lambda data: prune(mlp(), X, data=data, pattern="2:4", criterion="wanda"),
    "epochs": lambda data: prune(mlp(), X, data=data, compensate=False, criterion="magnitude", epochs=1),
    "linearize": lambda data: linearize(mlp(), X, data, keep=0),
    "sparsify": lambda data: sparsify(mlp(), X, data, penalties=PULL, epochs=2),
    "recover": lambda data: recover(prune(mlp(), X), data, epochs=2),
    "quantize": lambda data: quantize(mlp(), X, data),
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_every_step_refuses_data_it_cannot_use(step: str) -> None:
    for value in (torch.nan, torch.inf):
        with pytest.raises(DataError, match="example 5 has"):
            STEPS[step](broken(value))
    with pytest.raises(DataError, match=r"shape \(9,\), the model needs \(8,\)"):
        STEPS[step](torch.randn(64, 9))
    empty: tuple[Any, ...] = ([], torch.zeros(0, 8))
    for nothing in empty:
        with pytest.raises(DataError, match="no examples"):
            STEPS[step](nothing)


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x.sqrt())))


def test_nan_made_inside_is_named_though_the_first_examples_are_fine() -> None:
    data = torch.rand(64, 8)
    data[40, 3] = -1.0
    with pytest.raises(DataError, match="sqrt"):
        linearize(Root(), X.abs(), data, keep=0)


def test_training_that_diverges_is_said() -> None:
    smaller = sparsify(mlp(), X, torch.randn(256, 8), penalties=PULL, epochs=2, lr=1e30)
    assert any("ended early: the loss became" in note for note in smaller.notes)
    assert bool(smaller.model(X).isfinite().all())


class Wrong(GroupLasso):
    """A pull that is not a number from the start."""

    def on(self, *args: Any) -> Any:
        pull: Any = super().on(*args)
        pull.loss = lambda done: next(iter(args[1].values())).sum() * torch.nan
        return pull


def test_training_that_never_began_is_refused() -> None:
    with pytest.raises(InputError, match="nothing was trained: the loss became nan at step 1"):
        sparsify(mlp(), X, torch.randn(64, 8), penalties=[Wrong(1e-3)], epochs=2)


def test_labels_that_are_no_class_are_refused_where_they_are_used() -> None:
    data = (torch.randn(64, 8), torch.full((64,), 4))
    with pytest.raises(DataError, match=r"label is 4, but the network has 4 classes.*start at 1"):
        prune(mlp(), X, data=data, criterion="taylor")
    with pytest.raises(DataError, match="label of example 0 is 4"):
        sparsify(mlp(), X, data, penalties=PULL, losses=[CrossEntropy()], epochs=1)
    assert prune(mlp(), X, data=data).plan.edits  # labels are of no use here
