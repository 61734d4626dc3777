"""What the steps do with what they cannot use: a refusal that says where, never a raw error or a model that learned nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinier.criteria.magnitude import Magnitude
from tinier.errors import DataError, InputError, RefusedError
from tinier.methods.depth_pruning import DepthPruning
from tinier.recovery.cross_entropy import CrossEntropy
from tinier.recovery.group_lasso import GroupLasso
from tinier.shrink import shrink
from tinier.verbs import linearize, load, prune, quantize, recover, save, sparsify

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
    assert any("ended early: the loss soft_targets became nan" in note for note in smaller.notes)
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


OF_PRUNE: list[dict[str, Any]] = [
    {"keep": "0.5"}, {"keep": True}, {"keep": torch.nan}, {"round_to": 2.5}, {"round_to": 0}, {"steps": 1.5}, {"at_most": "1MB"},
    {"at_most": [1]}, {"rates": {"0": "a"}}, {"rates": "0=0.5"}, {"threshold": "a"}, {"depth": "a"}, {"depth": 1.5}, {"threads": 1.5},
    {"seed": 0.5}, {"epochs": "a"}, {"pattern": "2:4", "threshold": "a"}, {"pattern": "unstructured", "keep": "a"},
]  # fmt: skip


@pytest.mark.parametrize("wrong", OF_PRUNE, ids=str)
def test_arguments_of_another_kind_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=list(wrong)[-1]):
        prune(mlp(), X, **wrong)


def test_arguments_of_the_other_steps_are_named() -> None:
    data = torch.randn(64, 8)
    options: list[dict[str, Any]] = [{"count": 1.5}, {"keep": "a"}, {"count": "a"}]
    for wrong in options:
        with pytest.raises(InputError, match=next(iter(wrong))):
            linearize(mlp(), X, data, **wrong)
    with pytest.raises(InputError, match="epochs is 'a'"):
        sparsify(mlp(), X, data, penalties=PULL, epochs="a")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"count=1\.5"):
        DepthPruning(count=1.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="p='a'"):
        Magnitude(p="a")  # type: ignore[arg-type]


def test_a_network_without_values_is_refused(tmp_path: Path) -> None:
    empty, x, data = mlp().to("meta"), torch.randn(4, 8, device="meta"), torch.randn(64, 8)
    planned = prune(empty, x, criterion="random")
    calls: list[Callable[[], Any]] = [
        lambda: prune(empty, x, data=data),
        lambda: linearize(empty, x, data),
        lambda: sparsify(empty, x, data, penalties=PULL, epochs=1),
        lambda: shrink(empty, x),
        lambda: save(planned, tmp_path / "folder"),
        lambda: save(planned, tmp_path / "file.pt2"),
    ]
    for call in calls:
        with pytest.raises(RefusedError, match=r"0.weight is on the meta device"):
            call()
    assert not any(tmp_path.iterdir())


def test_save_says_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a Sequential; give what prune"):
        save(mlp(), tmp_path / "out")  # type: ignore[arg-type]
    model = mlp()
    network = prune(model, X).original
    save(network, tmp_path / "network")
    assert torch.equal(load(tmp_path / "network", into=model, example=X).model(X), model(X))
