"""Ranges and streaming histograms against direct computation."""

import math

import numpy as np
import pytest
import torch

from tinier.errors import DataError, InputError
from tinier.tensors.affine import Integers, asymmetric, fake_quantize
from tinier.tensors.clipping import divergence, squared_error
from tinier.tensors.histogram import BINS, Histogram
from tinier.tensors.ranges import RULES, activation_range


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def histogram_of(*batches: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
        if bool(batch.isfinite().all()):
            histogram.weigh(batch, torch.ones_like(batch))  # all alike, for the rule that asks
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


@pytest.mark.parametrize("most", [1, 7, 90, 10_000])
def test_sampling_keeps_the_ends_and_does_not_depend_on_batches(most: int) -> None:
    x = values(12, 6, 5, 7).relu()  # 210 values each: n must be no multiple of 2, 3, 5 or 7
    x[3, 1, 2, 4], x[8, 5, 0, 1] = -50, 60
    whole = histogram_of(x)

    def sampled(sizes: list[int]) -> Histogram:
        result = Histogram()
        for part in x.split(sizes):
            result.add(part, 0, most)
        return result

    found = sampled([12])
    for sizes in ([1] * 12, [5, 7], [4, 4, 4]):
        assert_equal(sampled(sizes), found)
    assert (found.low, found.high, found.parts) == (-50, 60, 12)
    ends = x.flatten(1)
    assert found.mean_ends == pytest.approx(
        (float(ends.amin(1).mean()), float(ends.amax(1).mean()))
    )
    every = next(n for n in range(-(-210 // most), 1000) if math.gcd(n, 210) == 1)
    assert abs(found.count - whole.count) < every
    looked = Histogram()
    looked.add(x.flatten()[::every])
    looked._widen(found.exponent)
    assert torch.equal(found.counts, looked.counts * every)
    assert found.zeros == looked.zeros * every


@pytest.mark.parametrize("rule", RULES)
def test_ranges_of_a_sample_cost_no_more_on_all_values(rule: str) -> None:
    x = values(64, 40_000) * (values(1, 40_000, seed=1) / 2).exp()
    whole, sampled, integers = Histogram(), Histogram(), Integers.unsigned(8)
    whole.add(x, 0)
    sampled.add(x, 0, 20_000)
    for histogram in (whole, sampled):
        histogram.weigh(x[:8], torch.ones_like(x[:8]))
    wanted, found = (activation_range(h, integers, rule) for h in (whole, sampled))
    if rule in ("minmax", "moving_average"):
        assert found == wanted
    elif rule == "percentile":
        outside = float(((x < found[0]) | (x > found[1])).double().mean())
        assert outside == pytest.approx(
            1e-4, rel=0.3
        )  # 128 values of the sample, give or take three deviations
    else:
        cost = {"entropy": divergence}.get(rule, squared_error)(whole, integers)
        low, high = (
            torch.tensor(ends, dtype=torch.float64) for ends in zip(wanted, found, strict=True)
        )
        best, ours = cost(low, high).tolist()
        assert ours <= 1.05 * best
        assert found != wanted


def test_a_sample_of_a_large_part_weighs_as_much_as_the_part() -> None:
    large, small = Histogram(), Histogram()
    large.add(values(4, 30_000), 0, 1000)
    small.add(values(4, 300, seed=1) + 100, 0, 1000)
    both = large.merged(small)
    assert both.quantile(0.5) < 10
    assert both.count == pytest.approx(4 * 30_300, rel=1e-3)


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


def rounding_error(x: torch.Tensor, ends: tuple[float, float], integers: Integers) -> float:
    scale, zero_point = asymmetric(torch.tensor(ends[0]), torch.tensor(ends[1]), integers)
    return float((fake_quantize(x, scale, zero_point, integers) - x).double().square().sum())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "heavy", "outlier", "relu"])
def test_mse_is_as_good_as_a_search_of_all_pairs_on_the_values(bits: int, kind: str) -> None:
    x = values(3000)
    x = {"normal": x, "heavy": x**3, "relu": x.relu()}.get(kind, torch.cat([x, values(1) * 200]))
    integers = Integers.unsigned(bits)
    shares = [1 - i / 25 for i in range(24)] + [0.03, 0.025, 0.02, 0.015, 0.01]
    low, high = min(float(x.min()), 0.0), float(x.max())
    lows = [low * share for share in shares] if low else [0.0]
    best = min(rounding_error(x, (a, high * share), integers) for a in lows for share in shares)
    found = rounding_error(x, activation_range(histogram_of(x), integers, "mse"), integers)
    assert found <= best * 1.01


def test_squared_error_is_that_of_the_values() -> None:
    """What the histogram says of a range against the values themselves: apart by what lies within a bin."""
    x = torch.cat([values(20_000), torch.zeros(500)])
    for bits in (1, 2, 5, 8):
        integers = Integers(0, 2**bits - 1)
        cost = squared_error(histogram_of(x), integers)
        for ends in ((-5.0, 5.0), (-1.0, 2.0), (-0.3, 0.0), (0.0, 0.7)):
            told = cost(*(torch.tensor([end], dtype=torch.float64) for end in ends))
            assert float(told) == pytest.approx(rounding_error(x, ends, integers), rel=0.01)


def test_squared_error_of_many_integers_goes_over_into_that_of_few() -> None:
    """Above 2047 steps rounding costs s²/12; below it is summed."""
    histogram = histogram_of(values(20_000))
    ends = [torch.tensor([end], dtype=torch.float64) for end in (-5.0, 5.0)]
    summed = squared_error(histogram, Integers(0, 2047))(*ends)
    formula = squared_error(histogram, Integers(0, 2048))(*ends)
    assert float(summed) == pytest.approx(float(formula) * (2048 / 2047) ** 2, rel=1e-3)
    x = values(20_000)
    for low, high in ((-1.5, 2.0), (-0.2, 0.0), (-9.0, 0.1)):
        ends = [torch.tensor([end], dtype=torch.float64) for end in (low, high)]
        told = float(squared_error(histogram, Integers.unsigned(16))(*ends))
        clipped = float((x - x.clamp(low, high)).double().square().sum())
        assert told == pytest.approx(clipped, rel=1e-3)


def kl_divergence(counts: np.ndarray, width: float, low: float, high: float, n: int) -> float:
    """One bin and one integer at a time, of the range low … high with n + 1 integers; written from the definition."""
    scale = float(np.float32((high - low) / n))
    zero_point = round(-low / scale)
    owner: dict[int, int] = {}
    for i in range(len(counts)):
        integer = ((i - len(counts) // 2 + 0.5) * width) / scale + zero_point
        if counts[i] and -0.5 <= integer < n + 0.5:
            owner[i] = int(np.floor(integer + 0.5))
    if not owner:
        return float("inf")
    p = {i: float(counts[i]) for i in owner}
    p[min(owner)] += counts[: min(owner)].sum()
    p[max(owner)] += counts[max(owner) + 1 :].sum()
    divergence = 0.0
    for i, integer in owner.items():
        alike = [j for j, other in owner.items() if other == integer]
        q = sum(counts[j] for j in alike) / len(alike) / counts.sum()
        divergence += p[i] / counts.sum() * np.log(p[i] / counts.sum() / q)
    return divergence


@pytest.mark.parametrize("kind", ["normal", "heavy", "relu", "sparse", "negative"])
def test_divergence_against_one_bin_at_a_time(kind: str) -> None:
    x = values(2000)
    x = {
        "normal": x,
        "heavy": x**3,
        "relu": x.relu(),
        "sparse": torch.cat([torch.zeros(50), torch.tensor([0.1, -0.4, 3.0, 2.9, -7.0])]),
        "negative": -x.abs() - 1,
    }[kind]
    histogram = histogram_of(x)
    counts, width = histogram.counts.numpy(), 2.0**histogram.exponent
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    for n in (3, 15, 60):
        shares = [(1.0, 1.0), (0.5, 1.0), (1.0, 0.4), (0.3, 0.7), (0.05, 0.05)]
        ends = [(low * a, high * b) for a, b in shares if high * b - low * a > n * width]
        lows, highs = (torch.tensor(side, dtype=torch.float64) for side in zip(*ends, strict=True))
        told = divergence(histogram, Integers(0, n))(lows, highs)
        expected = [kl_divergence(counts, width, *pair, n) for pair in ends]
        assert told.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert bool((told >= -1e-12).all())


@pytest.mark.parametrize("kind", ["relu", "heavy", "outlier"])
def test_entropy_is_as_good_as_a_search_of_all_bounds(kind: str) -> None:
    x = values(5000).abs()
    x = {"relu": x, "heavy": x**3}.get(kind, torch.cat([x, torch.tensor([40.0])]))
    histogram, integers = histogram_of(x), Integers.unsigned(5)
    width = 2.0**histogram.exponent
    bounds = torch.arange(33, int(x.max() / width) + 1, dtype=torch.float64) * width
    cost = divergence(histogram, integers)
    best = float(cost(torch.zeros_like(bounds), bounds).min())
    low, high = activation_range(histogram, integers, "entropy")
    found = float(cost(*(torch.tensor([end], dtype=torch.float64) for end in (low, high))))
    assert low == 0
    assert found <= best * 1.05


def test_entropy_does_not_stop_at_sparse_histograms() -> None:
    """Few values far apart leave most bins empty, which makes other calibrators divide by nothing."""
    for x in (
        torch.tensor([0.0, 1e-3, 900.0]),
        torch.tensor([-5.0, 5.0]),
        torch.tensor([3.0, 4.0]),
    ):
        for bits in (2, 4, 8, 16):
            low, high = activation_range(histogram_of(x), Integers.unsigned(bits), "entropy")
            assert low <= 0 <= high
            assert high - low > 0


@pytest.mark.parametrize("percentile", [99.99, 99.0, 90.0, 100.0])
@pytest.mark.parametrize("kind", ["normal", "zeros", "shifted", "few"])
def test_percentiles_are_those_of_numpy_within_a_bin(percentile: float, kind: str) -> None:
    x = values(7001)
    x = {"normal": x, "shifted": x - 9, "few": x[:5]}.get(kind, x * (values(7001, seed=2) > 1))
    histogram, integers = histogram_of(x), Integers.unsigned(8)
    width = 2.0**histogram.exponent
    rest = (100 - percentile) / 2
    expected = np.percentile(x.double().numpy(), [rest, 100 - rest])
    low, high = activation_range(histogram, integers, "percentile", percentile=percentile)
    assert low == pytest.approx(min(expected[0], 0), abs=width)
    assert high == pytest.approx(max(expected[1], 0), abs=width)
    low, high = activation_range(
        histogram, Integers.signed(8), "percentile", symmetric=True, percentile=percentile
    )
    assert high == pytest.approx(np.percentile(x.double().abs().numpy(), percentile), abs=width)
    assert low == -high


def test_percentile_of_almost_nothing_but_zeros_clips_nothing() -> None:
    x = torch.zeros(100_000)
    x[5] = 2.0
    assert activation_range(histogram_of(x), Integers.unsigned(8), "percentile") == (0, 2)


def test_moving_average_is_the_mean_over_parts() -> None:
    x, y = values(6, 50), values(3, 50, seed=1) * 4
    histogram = Histogram()
    histogram.add(x, 0)
    histogram.add(y.T, 1)
    low, high = activation_range(histogram, Integers.unsigned(8), "moving_average")
    both = torch.cat([x, y])
    assert low == pytest.approx(float(both.amin(1).double().mean()), rel=1e-12)
    assert high == pytest.approx(float(both.amax(1).double().mean()), rel=1e-12)
    wide, narrow = histogram_of(values(10) * 9), histogram_of(values(10, seed=4))
    assert wide.merged(narrow).mean_ends == wide.mean_ends
    assert narrow.merged(wide).mean_ends == wide.mean_ends


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("integers", [Integers.signed(8), Integers(-8, 7), Integers.signed(4)])
def test_symmetric_ranges_have_zero_point_0(rule: str, integers: Integers) -> None:
    for x in (values(3000) + 0.5, values(3000).relu(), -values(3000).abs(), torch.full((4,), -2.0)):
        low, high = activation_range(histogram_of(x), integers, rule, symmetric=True)
        scale, zero_point = asymmetric(torch.tensor(low), torch.tensor(high), integers)
        assert int(zero_point) == 0
        assert float(scale) == pytest.approx(high / integers.high, rel=1e-6)
        assert high <= float(x.abs().max())
    with pytest.raises(InputError, match=r"Integers\.signed"):
        activation_range(histogram_of(values(9)), Integers.unsigned(8), rule, symmetric=True)


def test_symmetric_mse_is_as_good_as_a_search_of_all_bounds() -> None:
    x, integers = values(4000) ** 3, Integers.signed(4)
    most = float(x.abs().max())
    best = min(
        rounding_error(x, (-most * i / 300, most * i / 300), integers) for i in range(9, 301)
    )
    ends = activation_range(histogram_of(x), integers, "mse", symmetric=True)
    assert rounding_error(x, ends, integers) <= best * 1.01


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_rules_scale_with_the_values(rule: str, scale: float) -> None:
    factor = 2.0 ** round(math.log2(scale))
    one = activation_range(histogram_of(values(999)), Integers.unsigned(8), rule)
    other = activation_range(histogram_of(values(999) * factor), Integers.unsigned(8), rule)
    assert other == pytest.approx((one[0] * factor, one[1] * factor), rel=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_ranges_of_nothing_or_of_what_is_not_finite_are_refused(rule: str) -> None:
    with pytest.raises(DataError, match="of no values"):
        activation_range(Histogram(), Integers.unsigned(8), rule)
    for bad in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(DataError, match="NaN or infinity"):
            activation_range(histogram_of(torch.tensor([1.0, bad])), Integers.unsigned(8), rule)


def test_unknown_rules_and_percentiles_are_refused() -> None:
    histogram = histogram_of(values(9))
    with pytest.raises(InputError, match="'mode': unknown; there are minmax, percentile, moving"):
        activation_range(histogram, Integers.unsigned(8), "mode")
    for percentile in (0.0, -1.0, 100.1):
        with pytest.raises(InputError, match="at most 100"):
            activation_range(histogram, Integers.unsigned(8), "percentile", percentile=percentile)


def test_mse_of_a_uniform_distribution_keeps_it_all() -> None:
    x = torch.linspace(0, 1, 4001)
    low, high = activation_range(histogram_of(x), Integers.unsigned(8), "mse")
    assert low == 0
    assert high == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("rule", RULES)
def test_constants(rule: str) -> None:
    integers = Integers.unsigned(8)
    assert activation_range(histogram_of(torch.zeros(9)), integers, rule) == (0, 0)
    for constant in (2.5, -2.5, 1.0, 1e-38):
        ends = activation_range(histogram_of(torch.full((9,), constant)), integers, rule)
        assert ends == (min(constant, 0), max(constant, 0)) or constant == 1e-38
        if abs(constant) > 1e-9:
            scale, zero_point = asymmetric(torch.tensor(ends[0]), torch.tensor(ends[1]), integers)
            x = torch.tensor(constant)
            assert fake_quantize(x, scale, zero_point, integers) == pytest.approx(
                constant, rel=1e-3
            )
