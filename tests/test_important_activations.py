"""Ranges by what the outputs depend on, against closed forms."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tinier
from tinier.errors import InputError
from tinier.graph.fold import fold
from tinier.methods.quantization import Quantization
from tinier.network import Network
from tinier.statistics import collect
from tinier.tensors.affine import Integers, asymmetric, fake_quantize
from tinier.tensors.histogram import BINS, Histogram
from tinier.tensors.ranges import activation_range
from tinier.verbs.smaller import network_of


class Two(nn.Module):
    """Two hidden units in bins of their own: the first in 1 … 2, the second in 4 … 8; only the first reaches the output."""

    def __init__(self, second: float = 0.0) -> None:
        super().__init__()
        self.last = nn.Linear(2, 1, bias=False)
        self.last.weight.data = torch.tensor([[3.0, second]])

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(x))


def inputs(count: int = 64) -> Tensor:
    random = torch.rand(count, 2, generator=torch.Generator().manual_seed(1))
    return random * torch.tensor([1.0, 4.0]) + torch.tensor([1.0, 4.0])


def network(second: float = 0.0) -> Network:
    return network_of(Two(second), {"x": inputs(2)})


def by_unit(histogram: Histogram) -> tuple[float, float]:
    """Importance of values below and above 3."""
    assert histogram.importance is not None
    middle = BINS // 2 + int(3 / 2.0**histogram.exponent)
    return float(histogram.importance[:middle].sum()), float(histogram.importance[middle:].sum())


def hidden(net: Network, x: Tensor, **more: Any) -> Histogram:
    found = collect(net, [{"x": x}], needs=("importance",), **more)
    relu = next(n.name for n in fold(net.traced.module).graph.nodes if "relu" in n.name)
    return found.activations[relu]


@pytest.mark.parametrize("second", [0.0, 0.5])
def test_importance_is_the_squared_derivative_of_the_outputs(second: float) -> None:
    x = inputs()
    first, other = by_unit(hidden(network(second), x))
    noise, total = torch.Generator().manual_seed(0), 0.0
    with torch.no_grad():
        for part in x.split(8):
            deviation = float(Two(second)(part).std(unbiased=False))
            v = torch.randn(8, 1, generator=noise)
            total += float((v / deviation).double().square().sum())
    assert first == pytest.approx(9 * total, rel=1e-5)
    assert other == pytest.approx(second**2 * total, rel=1e-5, abs=0)


def test_only_the_first_examples_are_asked_however_they_are_batched() -> None:
    x = inputs(200)
    one = hidden(network(0.5), x)
    assert one.count == 400
    first = by_unit(hidden(network(0.5), x[:64]))
    assert by_unit(one) == pytest.approx(first)
    batched = collect(network(0.5), [{"x": part} for part in x.split(48)], needs=("importance",))
    assert by_unit(list(batched.activations.values())[-1]) == pytest.approx(first)


def error(x: Tensor, weights: Tensor, ends: tuple[float, float], integers: Integers) -> float:
    low, high = (torch.tensor(end) for end in ends)
    rounded = fake_quantize(x, *asymmetric(low, high, integers), integers)
    return float((weights * (x - rounded).square()).sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_importance_that_is_alike_is_the_squared_error(bits: int, symmetric: bool) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) ** 3
    integers = Integers.signed(bits) if symmetric else Integers.unsigned(bits)
    histogram = Histogram()
    histogram.add(x)
    least = activation_range(histogram, integers, "mse", symmetric=symmetric)
    for said in (torch.full_like(x, 7.0), torch.zeros_like(x)):  # zeros say nothing
        histogram.weigh(x, said)
        found = activation_range(histogram, integers, "importance", symmetric=symmetric)
        assert found == pytest.approx(least)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_no_other_range_has_less_of_the_weighted_error(bits: int) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) ** 3
    importance = torch.where(x.abs() < 1, 10.0, 0.1)  # outliers matter little
    histogram, integers = Histogram(), Integers.unsigned(bits)
    histogram.add(x)
    histogram.weigh(x, importance)
    weights = 1 + importance / importance.mean()
    ours = error(x, weights, activation_range(histogram, integers, "importance"), integers)
    others = [
        error(x, weights, activation_range(histogram, integers, rule), integers)
        for rule in ("minmax", "percentile", "mse")
    ]
    random = torch.rand(200, 2, generator=torch.Generator().manual_seed(1))
    low, high = float(x.min()), float(x.max())
    others += [error(x, weights, (low * float(a), high * float(b)), integers) for a, b in random]
    assert ours <= 1.02 * min(others)  # values are taken as spread evenly within bins


def test_wider_bins_and_merged_histograms_keep_what_was_said() -> None:
    small, large = Histogram(), Histogram()
    small.add(torch.tensor([0.25, 0.5]))
    large.add(torch.tensor([64.0, -32.0]))
    small.weigh(torch.tensor([0.25, 0.0]), torch.tensor([2.0, 50.0]))  # exact zeros stay exact
    large.weigh(torch.tensor([64.0]), torch.tensor([5.0]))
    both = small.merged(large)
    assert both.importance is not None and both.exponent == large.exponent
    width = 2.0**both.exponent
    assert float(both.importance[BINS // 2 + int(0.25 / width)]) == 2
    assert float(both.importance[BINS // 2 + int(64 / width)]) == 5
    assert float(both.importance.sum()) == 7
    assert torch.equal(both.counts, large.merged(small).counts)


def test_who_did_not_collect_it_is_told() -> None:
    method = Quantization(ranges="importance", weight_ranges="mse")
    net = network()
    with pytest.raises(InputError, match=r'needs=\("importance",\)'):
        method.plan(net, collect(net, [{"x": inputs()}]))


class Words(nn.Module):
    """Integers in, and a value that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.last = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.table(x)).mean(1))


@pytest.mark.parametrize(
    "corrections", [("bias_correction",), ("smooth_quant", "outlier_channels")]
)
def test_quantize_by_importance_from_integers_to_logits(corrections: tuple[str, ...]) -> None:
    tokens = torch.randint(20, (32, 6), generator=torch.Generator().manual_seed(2))
    model = Words().eval()
    smaller = tinier.quantize(
        model,
        {"x": tokens[:2]},
        {"x": tokens.numpy()},
        ranges="importance",
        corrections=corrections,
    )
    (found,) = smaller.network({"x": tokens})
    with torch.no_grad():
        expected = model(tokens)
    assert float((found - expected).abs().max()) < 0.03 * float(expected.abs().max())
    assert all(parameter.requires_grad for parameter in model.parameters())
