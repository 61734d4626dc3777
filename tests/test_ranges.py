"""Ranges and streaming histograms against direct computation."""

import pytest
import torch

from tinier.tensors.affine import Integers, asymmetric, fake_quantize, symmetric
from tinier.tensors.histogram import BINS, Histogram
from tinier.tensors.ranges import activation_range, weight_bounds


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def histogram_of(*batches: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
    return histogram


def assert_equal(a: Histogram, b: Histogram) -> None:
    assert torch.equal(a.counts, b.counts)
    assert (a.exponent, a.zeros, a.low, a.high) == (b.exponent, b.zeros, b.low, b.high)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize("sizes", [[600], [1, 599], [100] * 6, [599, 1]])
def test_streaming_equals_one_batch(scale: float, sizes: list[int]) -> None:
    x = values(600) * scale
    x[::5] = 0
    x[7] = 40 * scale
    streamed = histogram_of(*x.split(sizes))
    assert_equal(streamed, histogram_of(x))
    assert_equal(streamed, histogram_of(*x.flip(0).split(sizes)))
    assert streamed.count == 600
    assert streamed.zeros == int((x == 0).sum())
    assert (streamed.low, streamed.high) == (float(x.min()), float(x.max()))
    assert len(streamed.counts) == BINS


def test_counts_are_those_of_the_bins() -> None:
    x = values(5000)
    histogram = histogram_of(x)
    width = 2.0**histogram.exponent
    edges = (torch.arange(BINS + 1) - BINS // 2).double() * width
    expected = torch.histogram(x.double(), edges).hist
    assert torch.equal(histogram.counts.double(), expected)
    assert int((histogram.counts > 0).sum()) > 200


def test_merging_equals_adding() -> None:
    x, y = values(300), values(200, seed=1) * 17
    assert_equal(histogram_of(x).merged(histogram_of(y)), histogram_of(x, y))
    assert_equal(histogram_of(y).merged(histogram_of(x)), histogram_of(x, y))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    histogram = histogram_of(values(10), torch.tensor([1.0, bad]), values(10))
    assert not histogram.finite
    assert not Histogram().finite
    assert histogram_of(values(3)).finite


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1, None])
def test_mse_weights_are_never_worse_than_min_max(bits: int, axis: int | None) -> None:
    weight = values(6, 50) ** 3
    integers = Integers.signed(bits)
    errors = []
    for rule in ("minmax", "mse"):
        bounds = weight_bounds(weight, axis, integers, rule)
        rounded = fake_quantize(
            weight, symmetric(bounds, integers), torch.zeros(()), integers, axis
        )
        error = (weight - rounded).square()
        errors.append(error.sum() if axis is None else error.sum(1 - axis))
        if rule == "minmax":
            most = weight.abs().max() if axis is None else weight.abs().amax(1 - axis)
            assert torch.equal(bounds, most)
    assert bool((errors[1] <= errors[0] * (1 + 1e-6)).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "relu", "heavy", "negative", "shifted"])
def test_mse_activations_are_never_worse_than_min_max(bits: int, kind: str) -> None:
    x = values(20_000)
    x = {
        "normal": x,
        "relu": x.relu(),
        "heavy": x**3,
        "negative": -x.relu(),
        "shifted": x + 5,
    }[kind]
    integers = Integers.unsigned(bits)
    errors = {}
    for rule in ("minmax", "mse"):
        low, high = activation_range(histogram_of(x), integers, rule)
        assert low <= 0 <= high
        scale, zero_point = asymmetric(torch.tensor(low), torch.tensor(high), integers)
        errors[rule] = float((fake_quantize(x, scale, zero_point, integers) - x).square().sum())
        if rule == "minmax":
            assert (low, high) == (min(float(x.min()), 0), max(float(x.max()), 0))
    assert errors["mse"] <= errors["minmax"] * 1.001
    if bits == 2 and kind != "shifted":
        assert errors["mse"] < errors["minmax"] * 0.8


def test_mse_finds_the_best_bound_of_a_dense_search() -> None:
    weight = values(1, 400)
    x = values(5000).abs()
    signed, unsigned = Integers.signed(3), Integers.unsigned(3)

    def weight_error(bound: torch.Tensor) -> float:
        rounded = fake_quantize(weight, symmetric(bound, signed), torch.zeros(()), signed)
        return float((weight - rounded).square().sum())

    def activation_error(high: float) -> float:
        scale, zero_point = asymmetric(torch.tensor(0.0), torch.tensor(high), unsigned)
        return float((fake_quantize(x, scale, zero_point, unsigned) - x).square().sum())

    fractions = [i / 200 for i in range(40, 201)]
    best = min(weight_error(weight.abs().max() * f) for f in fractions)
    found = weight_error(weight_bounds(weight, None, signed, "mse"))
    assert found <= best * 1.02
    best = min(activation_error(float(x.max()) * f) for f in fractions)
    found = activation_error(activation_range(histogram_of(x), unsigned, "mse")[1])
    assert found <= best * 1.02


def test_mse_of_a_uniform_distribution_keeps_it_all() -> None:
    x = torch.linspace(0, 1, 4001)
    low, high = activation_range(histogram_of(x), Integers.unsigned(8), "mse")
    assert low == 0
    assert high == pytest.approx(1, abs=0.02)


def test_constants() -> None:
    integers = Integers.unsigned(8)
    for rule in ("minmax", "mse"):
        assert activation_range(histogram_of(torch.zeros(9)), integers, rule) == (0, 0)
        low, high = activation_range(histogram_of(torch.full((9,), 2.5)), integers, rule)
        scale, zero_point = asymmetric(torch.tensor(low), torch.tensor(high), integers)
        x = torch.tensor(2.5)
        assert fake_quantize(x, scale, zero_point, integers) == pytest.approx(2.5, rel=1e-3)
        zeros = weight_bounds(torch.zeros(3, 4), 0, Integers.signed(8), rule)
        assert zeros.tolist() == [0, 0, 0]
