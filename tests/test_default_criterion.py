"""Pruning with data and no criterion named: whatever reads the channels, and however poor the data."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinier.criteria.base import relative
from tinier.criteria.magnitude import Magnitude
from tinier.criteria.reconstruction import Reconstruction, _matched
from tinier.criteria.wanda import Wanda
from tinier.errors import InputError, RefusedError
from tinier.recovery.refit import Refit
from tinier.verbs import prune
from tinier.verbs.smaller import costs


class EinsumAttention(nn.Module):
    """Attention as Keras writes it: no linear layer reads the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(32, 4, 8) * 0.1) for _ in range(3))
        self.o = nn.Parameter(torch.randn(4, 8, 32) * 0.1)
        self.f = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bti,ihd->bhtd", x, w) for w in (self.q, self.k, self.v))
        y = torch.einsum("bhtd,hdo->bto", F.scaled_dot_product_attention(q, k, v), self.o)
        return self.f(y.mean(1))


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(6, 32)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.a(x) * self.b(y)).sum(-1)


class Recurrent(nn.Module):
    """No layer but the second recurrent one reads the hidden units of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.o = nn.LSTM(8, 64, 2, batch_first=True), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.r(x)[0][:, -1])


def of_shapes(*shapes: tuple[int, ...]) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda size: tuple(torch.randn(size, *shape) for shape in shapes)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (EinsumAttention, of_shapes((5, 32))),
        (TwoTowers, of_shapes((8,), (6,))),
        (Recurrent, of_shapes((5, 8))),
    ],
)
def test_data_put_nothing_out_of_reach(
    make: Callable[[], nn.Module], inputs: Callable[[int], tuple[Tensor, ...]]
) -> None:
    model, example = make().eval(), inputs(2)
    for keep in (0.5, 0.3):
        without = prune(model, example, keep=keep)
        names = list(without.network.example)
        data = dict(zip(names, inputs(40), strict=True))
        smaller = prune(model, example, keep=keep, data=data)
        assert costs(smaller.network)[0] <= keep * costs(smaller.original)[0]


def test_a_criterion_of_the_users_choice_says_what_it_cannot_score() -> None:
    data = {"x": torch.randn(32, 5, 32)}
    with pytest.raises(RefusedError, match=r"obs cannot score q:head, .* such as magnitude"):
        prune(EinsumAttention(), torch.randn(2, 5, 32), data=data, criterion="obs")


def test_scores_of_another_kind_are_brought_to_the_same_places() -> None:
    known, level = torch.arange(1.0, 11).double(), torch.arange(1.0, 11).double() ** 3
    shuffled = level[torch.randperm(10)]
    values = torch.tensor([3.0, 10.0, 6.5, 1.0, 20.0, 0.5]).double()
    wanted = torch.tensor([27.0, 1000.0, (216 + 343) / 2, 1.0, 2000.0, 0.5]).double()
    assert torch.allclose(_matched(values, known, shuffled), wanted)
    assert torch.equal(_matched(values, known[:0], level[:0]), values)
    assert bool(_matched(values, known[:1], level[:1]).isfinite().all())


def test_what_stands_in_needs_no_data() -> None:
    with pytest.raises(InputError, match="needs data"):
        Reconstruction(otherwise=Wanda())


def deep() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


@pytest.mark.parametrize("criterion", [None, "obs", "obs_greedy"])
@pytest.mark.parametrize("count", [1, 64])
def test_data_that_never_change(count: int, criterion: str | None) -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        data = torch.randn(1, 8).repeat(count, 1)
        smaller = prune(deep(), torch.randn(4, 8), data=data, criterion=criterion)
        assert costs(smaller.network)[0] <= 0.5 * costs(smaller.original)[0]
        if criterion is None:  # the magnitude decides, and the bias makes up for all of it
            assert torch.allclose(
                smaller.model(data), smaller.original.module(data), atol=1e-4, rtol=1e-3
            )


class Loss(Magnitude):
    """Magnitude ranked as losses are: by what the network saves, too."""

    comparable = True

    def scores(self, *args: Any) -> dict[str, Tensor]:
        return {name: relative(found) for name, found in super().scores(*args).items()}


def test_no_variation_leaves_the_order_to_magnitude() -> None:
    model = deep()
    smaller = prune(model, torch.randn(4, 8), data=torch.ones(8, 8), keep=0.5)
    assert smaller.kept == prune(model, torch.randn(4, 8), keep=0.5, criterion=Loss()).kept


def test_dead_units_leave_first() -> None:
    first = nn.Linear(8, 32)
    first.bias.data[:16] = -100.0
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 4))
    smaller = prune(model, torch.randn(4, 8), data=torch.randn(64, 8), keep=0.6)
    assert set(range(16, 32)) <= set(smaller.kept["0.weight"][0])


def test_nothing_but_zeros_behind_a_batch_norm() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 4)
    ).eval()  # fmt: skip
    smaller = prune(model, torch.randn(4, 3, 8, 8), data=torch.zeros(64, 3, 8, 8))
    assert costs(smaller.network)[0] <= 0.5 * costs(smaller.original)[0]


def test_notes_of_compensation_are_true(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randn(40, 8)

    def notes(**options: Any) -> list[str]:
        smaller = prune(deep(), torch.randn(4, 8), **options)
        return [note for note in smaller.notes if "compensat" in note]

    assert notes(data=data) == ["compensated on 40 examples"]
    assert notes(data=data, keep=1.0) == []  # nothing was cut
    assert notes(data=data, compensate=False) == []
    errors = itertools.count()
    monkeypatch.setattr(
        Refit, "error", lambda refit: float(next(errors))
    )  # worse after than before
    (note,) = notes(data=data)
    assert "left out" in note
