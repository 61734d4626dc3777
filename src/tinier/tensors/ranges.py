"""Ranges of activations to quantize: one rule a function, all from one streaming histogram."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from tinier.errors import DataError, InputError
from tinier.tensors.affine import Integers
from tinier.tensors.clipping import (
    Cost,
    cheapest,
    cheapest_bound,
    divergence,
    squared_error,
    symmetric_ends,
)
from tinier.tensors.histogram import Histogram

PERCENTILE = 99.99
# How many shares of a range the searches try first. Squared errors are smooth; the divergence jumps where a bin goes from one
# integer to the next.
_SMOOTH, _JAGGED = 32, 400


def activation_range(
    histogram: Histogram,
    integers: Integers,
    rule: str,
    *,
    symmetric: bool = False,
    percentile: float = PERCENTILE,
) -> tuple[float, float]:
    """Range of values that activations keep; values outside are clipped.

    Args:
        histogram: of the activations; not empty, finite.
        integers: what they become.
        rule: a key of ``RULES``.
        symmetric: the zero point is 0 and the range that of all the integers, which must be negative and positive ones.
        percentile: in (0, 100], of ``"percentile"``: how much is kept, in %. Half of the rest is clipped at each end, or where the
            range is symmetric all of it, by |x|.

    Returns:
        (low, high) with low ≤ 0 ≤ high, which `affine.asymmetric` makes a scale and a zero point of; (0, 0) where all values are 0.

    Raises:
        DataError: no value was counted, or one was not finite.
        InputError: an unknown rule, a percentile outside (0, 100], symmetric integers without a sign; "importance" of a histogram that was
            not told any.

    Cost:
        Does not grow with the number of values. O(BINS) for most; 1.5 ms for ``"mse"`` and 8 ms for ``"entropy"`` with 8 bits.

    Source:
        ``"entropy"``: Migacz 2017, "8-bit Inference with TensorRT". ``"moving_average"``: Jacob et al. 2018, section 3.1.
        ``"importance"``: the diagonal of the Gauss–Newton matrix, as Li et al. 2021, "BRECQ", equation 10 has it for blocks.

    Differs:
        ``"importance"`` is half squared gradients and half plain squared errors: gradients of a few examples are noisy, and values that
        did not matter in them are not free.
        ``"moving_average"`` is the plain mean over the examples, which does not depend on their order as an exponential one does.
    """
    if rule not in RULES:
        raise InputError(f"ranges={rule!r}: unknown; there are {', '.join(RULES)}")
    if not 0 < percentile <= 100:
        raise InputError(f"percentile={percentile:g}: above 0 and at most 100 is needed")
    if symmetric and not integers.low < 0 < integers.high:
        raise InputError(
            f"symmetric ranges need integers on both sides of 0, not {integers.low} … {integers.high}: Integers.signed(bits)"
        )
    if histogram.low > histogram.high:
        raise DataError("a range of no values: activations of one or more examples are needed")
    if not histogram.finite:
        raise DataError("a range to quantize is not finite: the values have NaN or infinity")
    asked = _Asked(histogram, integers, symmetric, percentile)
    # Where all values are one, there is nothing to choose.
    constant = histogram.low == histogram.high
    low, high = _minmax(asked) if constant else RULES[rule].choose(asked)
    if not symmetric:
        return min(low, 0.0), max(high, 0.0)
    return symmetric_ends(max(-low, high), integers)


@dataclass(frozen=True)
class _Asked:
    """What a range is chosen by: arguments of `activation_range`."""

    histogram: Histogram
    integers: Integers
    symmetric: bool
    percentile: float

    @property
    def bound(self) -> float:
        """The largest absolute value."""
        return max(-self.histogram.low, self.histogram.high)


def _minmax(asked: _Asked) -> tuple[float, float]:
    return asked.histogram.low, asked.histogram.high


def _percentile(asked: _Asked) -> tuple[float, float]:
    histogram, kept = asked.histogram, asked.percentile / 100
    if asked.symmetric:
        bound = histogram.magnitudes().quantile(kept)
        return (-bound, bound) if bound else _minmax(asked)
    low, high = histogram.quantile((1 - kept) / 2), histogram.quantile((1 + kept) / 2)
    # Where nearly all values are 0, nothing is clipped.
    return (low, high) if low < 0 or high > 0 else _minmax(asked)


def _moving_average(asked: _Asked) -> tuple[float, float]:
    return asked.histogram.mean_ends


def _cheapest(
    cost: Callable[[Histogram, Integers], Cost], tries: int, asked: _Asked
) -> tuple[float, float]:
    of = cost(asked.histogram, asked.integers)
    if asked.symmetric:
        bound = cheapest_bound(of, asked.bound, asked.integers, tries)
        return -bound, bound
    return cheapest(of, min(asked.histogram.low, 0.0), max(asked.histogram.high, 0.0), tries)


def weighted_error(histogram: Histogram, integers: Integers) -> Cost:
    """As `clipping.squared_error`, each value with 1 and its importance over the mean importance."""
    if histogram.importance is None:
        raise InputError(
            'ranges="importance": nobody said which values matter; collect(network, batches, needs=("importance",)) does'
        )
    counts, importance = histogram.counts.double(), histogram.importance
    total = float(importance.sum())
    if total:
        counts = counts + importance * (counts.sum() / total)
    return squared_error(replace(histogram, counts=counts), integers)


@dataclass(frozen=True)
class Rule:
    """One way to choose a range.

    Attributes:
        what: the range that it keeps, in one line.
        choose: (low, high) for a histogram with more than one value.
    """

    what: str
    choose: Callable[[_Asked], tuple[float, float]]


# Every rule; what errors name and the documentation lists.
RULES: dict[str, Rule] = {
    "minmax": Rule("the smallest and the largest value: nothing is clipped", _minmax),
    "percentile": Rule("all but the outermost 0.01 % of the values", _percentile),
    "moving_average": Rule("the mean over examples of each one's ends", _moving_average),
    "mse": Rule(
        "the range with the least squared error of rounding and clipping",
        partial(_cheapest, squared_error, _SMOOTH),
    ),
    "importance": Rule(
        "the range with the least squared error, where errors count as they change the network's outputs",
        partial(_cheapest, weighted_error, _SMOOTH),
    ),
    "entropy": Rule(
        "the range with the least KL divergence from the values",
        partial(_cheapest, divergence, _JAGGED),
    ),
}
