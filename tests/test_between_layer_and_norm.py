"""Quantized networks whose batch norms do not follow their layers directly, or have no parameters; and small edge cases."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tinier
from tinier.statistics import collect
from tinier.tensors.affine import Integers
from tinier.tensors.histogram import Histogram
from tinier.tensors.ranges import activation_range
from tinier.verbs.smaller import network_of


class Net(nn.Module):
    """A convolution, what may lie between, a batch norm, and a head."""

    def __init__(self, between: nn.Module, affine: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c, self.between = nn.Conv2d(3, 8, 3, bias=not affine), between
        self.b, self.fc = nn.BatchNorm2d(8, affine=affine), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.b(self.between(self.c(x)))).mean((2, 3)))


def pictures(count: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return x, torch.randint(4, (count,), generator=generator)


def trained(between: nn.Module, affine: bool = True) -> nn.Module:
    model = Net(between, affine)
    with torch.no_grad():
        model.train()(pictures()[0])  # statistics that are not those of a new norm
    return model.eval()


@pytest.mark.parametrize(
    ("between", "affine"),
    [(nn.Dropout(0.5), True), (nn.Identity(), False)],
    ids=["dropout", "plain"],
)
def test_trained_weights_come_back(tmp_path: Path, between: nn.Module, affine: bool) -> None:
    model, (x, y) = trained(between, affine), pictures()
    smaller = tinier.quantize(model, (x[:2],), x, bits=4)
    better = tinier.recover(smaller, (x, y), epochs=1)
    tinier.save(better, tmp_path / "out")
    back = tinier.load(tmp_path / "out", into=model, example=(x[:2],), quantized=True)
    (name,) = better.network.example
    (one,), (two,) = better.network({name: x}), back.network({name: x})
    torch.testing.assert_close(one, two)


def test_norms_behind_dropout_are_estimated_again() -> None:
    x, _ = pictures()
    found = tinier.quantize(
        trained(nn.Dropout(0.5)), (x[:2],), x, bits=3, corrections=("batch_norm_reestimation",)
    )
    assert not any("no batch norm" in note for note in found.notes)


class Fixed(nn.Module):
    """A batch of ten."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)).view(10, 32))


def test_importance_of_fixed_batches() -> None:
    x = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
    net = network_of(Fixed().eval(), (x[:10],))
    (name,) = net.example
    found = collect(net, [{name: part} for part in x.split(10)], needs=("importance",))
    assert found.examples == 80
    assert all(h.importance is not None for h in found.activations.values())


def test_importance_that_is_not_finite_says_nothing() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) ** 3
    said = torch.rand(4000, generator=torch.Generator().manual_seed(1))
    one, two = Histogram(), Histogram()
    one.add(x), two.add(x)  # type: ignore[func-returns-value]
    one.weigh(x[1:], said[1:])
    spoilt = said.clone()
    spoilt[0] = torch.nan
    two.weigh(x, spoilt)
    two.weigh(torch.tensor([torch.inf]), torch.ones(1))
    integers = Integers.unsigned(4)
    assert activation_range(one, integers, "importance") == activation_range(
        two, integers, "importance"
    )


class Least(nn.Module):
    """An argument with a name that is apt to be used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, least: Tensor) -> Tensor:
        return self.c(self.b(self.a(least)))


def test_names_of_arguments_are_the_users(tmp_path: Path) -> None:
    x = pictures()[0]
    smaller = tinier.quantize(Least().eval(), (x[:2],), x, exclude=["b"])
    assert tinier.export(smaller, tmp_path / "out", target="onnxruntime").files


def test_nothing_is_restored_where_nothing_is_lost() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))  # type: ignore[operator,union-attr]
    found = tinier.quantize(
        model.eval(), (torch.ones(2, 4),), torch.ones(16, 4), restore=0.5, corrections=()
    )
    assert any("loses nothing" in note for note in found.notes)
