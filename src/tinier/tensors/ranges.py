"""Ranges to quantize: min–max, or the range of least squared error."""

from collections.abc import Callable

import torch
from torch import Tensor

from tinier.tensors.affine import Integers, asymmetric, fake_quantize, symmetric
from tinier.tensors.histogram import Histogram

# Fractions of the min–max range that the search tries: coarse ones, then fine ones around the best coarse one.
_COARSE = tuple(1 - step / 20 for step in range(17))
_FINE = tuple(step / 100 for step in (-4, -3, -2, -1, 1, 2, 3, 4))


def weight_bounds(weight: Tensor, axis: int | None, integers: Integers, rule: str) -> Tensor:
    """Largest absolute value that each channel keeps; larger weights are clipped.

    Args:
        weight: any shape, finite.
        axis: dimension of the channels; None for one bound for all.
        integers: what the weights become, symmetric.
        rule: ``"minmax"``: max |w|. ``"mse"``: the bound b among fractions of it with least Σ (w − ŵ(b))².

    Returns:
        (channels,) float32, or a scalar when ``axis`` is None.

    Cost:
        25 passes over the weights for ``"mse"``.
    """
    rows = weight.detach().float()
    rows = rows.reshape(1, -1) if axis is None else rows.movedim(axis, 0).flatten(1)
    most = rows.abs().amax(1)
    best = most.clone()
    if rule == "mse":
        least = torch.full_like(most, float("inf"))
        for refine in (False, True):
            centre = best.clone()
            for fraction in _FINE if refine else _COARSE:
                bound = (centre + most * fraction).clamp_max(most) if refine else most * fraction
                scale = symmetric(bound, integers)
                rounded = fake_quantize(rows, scale, torch.zeros(()), integers, 0)
                error = (rows - rounded).square().sum(1)
                best = torch.where(error < least, bound, best)
                least = torch.minimum(least, error)
    return best[0] if axis is None else best


def activation_range(histogram: Histogram, integers: Integers, rule: str) -> tuple[float, float]:
    """Range of values that activations keep; values outside are clipped.

    Args:
        histogram: of the activations; not empty.
        integers: what they become.
        rule: ``"minmax"``: the smallest and the largest value. ``"mse"``: the range with least expected (x − x̂)².

    Returns:
        (low, high) with low ≤ 0 ≤ high.

    Cost:
        About 125 passes over the bins for ``"mse"``.
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if rule == "minmax" or low == high:
        return low, high
    values, weights = histogram.points()

    def error(low: float, high: float) -> float:
        scale, zero_point = asymmetric(torch.tensor(low), torch.tensor(high), integers)
        rounded = fake_quantize(values, scale.double(), zero_point, integers)
        return float((weights * (values - rounded).square()).sum())

    # Both ends together first, then each end by itself, twice.
    both = _least(lambda f: error(low * f, high * f))
    ends = [both, both]
    for _ in range(2):
        for end in (0, 1):
            if (low, high)[end] == 0:
                continue

            def one(fraction: float, end: int = end) -> float:
                trial = [*ends]
                trial[end] = fraction
                return error(low * trial[0], high * trial[1])

            ends[end] = _least(one, ends[end])
    return low * ends[0], high * ends[1]


def _least(error: Callable[[float], float], start: float = 1.0) -> float:
    """The fraction with the least error; ``start`` where others only equal it."""
    best, least = start, error(start)
    for fraction in _COARSE:
        found = error(fraction)
        if found < least:
            best, least = fraction, found
    centre = best
    for offset in _FINE:
        fraction = min(centre + offset, 1.0)
        found = error(fraction)
        if found < least:
            best, least = fraction, found
    return best
