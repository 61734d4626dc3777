"""How the values of a tensor are distributed, and what integers make of them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tinier.tensors.affine import SMALLEST_SCALE, Integers, asymmetric
from tinier.tensors.clipping import Spread, squared_error
from tinier.tensors.histogram import Histogram
from tinier.tensors.ranges import activation_range

BARS = 96  # of the histogram that is shown
SIGMAS = 6  # standard deviations from the mean, beyond which a value is an outlier
NOISE = 0.01  # of the power of the values, that a bit width may lose
TRIED = (2, 3, 4, 5, 6, 7, 8)
_TOLD = (8, 4)


@dataclass(frozen=True)
class Distribution:
    """What there is to know of a tensor's values before they become integers.

    Attributes:
        count: how many values.
        low, high: smallest and largest value.
        mean, deviation: mean and standard deviation, right to the width of a bin of the histogram.
        kurtosis: E[(x − μ)⁴] / σ⁴: 3 for a normal distribution, more with heavier tails, 0 for a constant.
        outliers: share in [0, 1] more than 6 standard deviations from the mean.
        zeros: share in [0, 1] that is exactly 0.
        entropy: in [0, 8] bits, of the 8-bit integers that min–max makes of the values.
        noise: bits → share of the power Σ x² that rounding and clipping lose.
        bits: the least of 2 … 8 with less than 1 % of noise; None where 8 are too few.
        ranges: rule, "minmax" or "mse" → the range that 8 bits keep.
        bars: (96,) how many values lie in each of so many equal parts of low … high.
    """

    count: int
    low: float
    high: float
    mean: float
    deviation: float
    kurtosis: float
    outliers: float
    zeros: float
    entropy: float
    noise: Mapping[int, float]
    bits: int | None
    ranges: Mapping[str, tuple[float, float]]
    bars: tuple[float, ...]

    def decibels(self, bits: int) -> float:
        """Signal-to-noise ratio 10 log10(Σ x² / Σ (x − x̂)²); infinite where nothing is lost."""
        noise = self.noise[bits]
        return -10 * math.log10(noise) if noise > 0 else math.inf


def distribution(
    histogram: Histogram,
    *,
    symmetric: bool = False,
    noise: Callable[[int], float] | None = None,
) -> Distribution:
    """Describe a histogram.

    Args:
        histogram: finite, not empty.
        symmetric: integers with a sign and zero point 0, as weights have; else unsigned ones with a zero point.
        noise: bits → Σ (x − x̂)² / Σ x², where it is known better; None for one range of least squared error for all values.

    Raises:
        DataError: no value was counted, or one was not finite.

    Cost:
        About 10 ms, however many values there are.
    """
    integers = {
        bits: Integers.signed(bits) if symmetric else Integers.unsigned(bits) for bits in TRIED
    }
    ranges = {
        rule: activation_range(histogram, integers[8], rule, symmetric=symmetric)
        for rule in ("minmax", "mse")
    }
    spread = Spread(histogram)
    count, mean = histogram.count, float(spread.total) / histogram.count
    second, fourth = (float(spread.central(mean, power)) / count for power in (2, 4))
    second += histogram.zeros / count * mean**2
    fourth += histogram.zeros / count * mean**4
    deviation = math.sqrt(max(second, 0.0)) if histogram.high > histogram.low else 0.0
    reach = SIGMAS * deviation
    ends = torch.tensor([mean - reach, mean + reach], dtype=torch.float64)
    below = _below(histogram, spread, ends)

    def clipped(bits: int) -> float:
        low, high = activation_range(histogram, integers[bits], "mse", symmetric=symmetric)
        power = float(spread.square)
        if not power:
            return 0.0
        if high - low < SMALLEST_SCALE / 2:
            return 1.0  # all of it rounds to 0
        sides = (torch.tensor([end], dtype=torch.float64) for end in (low, high))
        return max(float(squared_error(histogram, integers[bits])(*sides)), 0.0) / power

    lost = noise or clipped
    told = {bits: lost(bits) for bits in _TOLD}
    return Distribution(
        count,
        histogram.low,
        histogram.high,
        mean,
        deviation,
        # The fourth power of a tiny deviation may be too small for a float.
        fourth / second**2 if deviation and second**2 else 0.0,
        1 - float(below[1] - below[0]) / count if deviation else 0.0,
        histogram.zeros / count,
        _entropy(histogram, spread, ranges["minmax"], integers[8]),
        told,
        _least_bits(lost, told),
        ranges,
        _bars(histogram, spread),
    )


def _least_bits(lost: Callable[[int], float], told: dict[int, float]) -> int | None:
    if told[8] >= NOISE:
        return None
    few = [bits for bits in TRIED if bits < 8 and (bits > 4 or told[4] < NOISE)]
    return next((bits for bits in few if told.get(bits, 1.0) < NOISE or lost(bits) < NOISE), 8)


def _below(histogram: Histogram, spread: Spread, t: Tensor) -> Tensor:
    """How many values are below each point, zeros among them; (k,) float64."""
    return spread.below(t) + (t > 0).double() * histogram.zeros


def _bars(histogram: Histogram, spread: Spread) -> tuple[float, ...]:
    shares = torch.linspace(0, 1, BARS + 1, dtype=torch.float64)
    edges = histogram.low + (histogram.high - histogram.low) * shares
    counts = _below(histogram, spread, edges)
    counts[0], counts[-1] = 0, histogram.count
    return tuple(counts.diff().clamp_min(0).tolist())


def _entropy(
    histogram: Histogram, spread: Spread, ends: tuple[float, float], integers: Integers
) -> float:
    if histogram.low == histogram.high:
        return 0.0
    low, high = (torch.tensor(end, dtype=torch.float64) for end in ends)
    scale, zero_point = asymmetric(low, high, integers)
    levels = torch.arange(integers.low, integers.high, dtype=torch.float64) + 0.5
    below = spread.below(scale.double() * (levels - zero_point))
    counts = torch.cat([below.new_zeros(1), below, spread.count[None]]).diff().clamp_min(0)
    counts[int(zero_point) - integers.low] += histogram.zeros
    p = counts / counts.sum()
    return float(-(torch.special.xlogy(p, p)).sum() / math.log(2))
