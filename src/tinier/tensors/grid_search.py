"""Search of the scale and zero point with the least squared error, for many cells of values at once."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tinier.tensors import affine
from tinier.tensors.affine import SMALLEST_SCALE, Integers

# Values that are searched at once: a few arrays of so many float32 stay in the cache of a core.
CHUNK = 1 << 18
# The search tries scales that fall by this factor, from 1.6 times the smallest that clips nothing (a few weights may lie
# better on fewer integers) down to 4 % of it, then finer steps.
_RATIO = 0.96
_COARSE = range(-12, 80)
# The same for the two ends of an asymmetric range, of which all pairs are tried.
_END_RATIO = 0.8
_END_COARSE = 12


def best_scale(
    x: Tensor, weights: Tensor | None, integers: Integers, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor]:
    """The scale of least Σ h (x − x̂)² of each cell; its zero point stays.

    Scales around and below the one that clips nothing are tried, then finer ones around the best, then the closed form.

    Args:
        x: (r, G, K) float32 values of the cells.
        weights: h, (r or 1, G, K) float32; None for 1.
        integers: what the values become.
        scale: (r, G) float32 that clips nothing.
        zero_point: (r, G) int64.

    Returns:
        (scale, zero point), (r, G) each; never worse than the ones given.

    Cost:
        About 100 passes over the values; a few arrays of ``CHUNK`` float32.
    """
    best = _Best(x, weights, integers, scale, zero_point)
    first = best.scale
    for step in _COARSE:
        best.attempt(first * _RATIO**step, best.zero_point)
    for fraction in (1 / 3, 1 / 9):
        centre = best.scale
        for step in (-2, -1, 1, 2):
            best.attempt(centre * _RATIO ** (step * fraction), best.zero_point)
    for _ in range(3):
        best.fit()
    return best.scale, best.zero_point


def best_ends(
    x: Tensor,
    weights: Tensor | None,
    integers: Integers,
    scale: Tensor,
    zero_point: Tensor,
    low: Tensor,
    high: Tensor,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range of least Σ h (x − x̂)² of each cell.

    All pairs of ends of a coarse list are tried, then finer ends, then neighbouring zero points and the closed form.

    Args:
        x: (r, G, K) float32 values of the cells.
        weights: h, (r or 1, G, K) float32; None for 1.
        integers: what the values become.
        scale: (r, G) float32 that clips nothing.
        zero_point: (r, G) int64.
        low: (r, G) float32, smallest value of each cell, at most 0.
        high: (r, G) float32, largest value, at least 0.

    Returns:
        (scale, zero point), (r, G) each; never worse than the ones given.

    Cost:
        About 180 passes over the values; a few arrays of ``CHUNK`` float32.
    """
    best = _Best(x, weights, integers, scale, zero_point)
    ends = torch.stack([low.double(), high.double()])  # (2, r, G)
    factors = torch.ones_like(ends)  # of the best pair

    def attempt(trial: Tensor) -> None:
        before = best.error
        best.attempt(*affine.asymmetric(ends[0] * trial[0], ends[1] * trial[1], best.integers))
        better = best.error < before
        factors.copy_(torch.where(better, trial, factors))

    fractions = [_END_RATIO**step for step in range(_END_COARSE)]
    ones = torch.ones_like(ends)
    for below in fractions:
        for above in fractions:
            attempt(torch.stack([ones[0] * below, ones[1] * above]))
    for fraction in (1 / 2, 1 / 4, 1 / 8, 1 / 16):
        for changed in ((0,), (1,), (0, 1)):
            centre = factors.clone()
            for step in (-1, 1):
                trial = centre.clone()
                trial[list(changed)] *= _END_RATIO ** (step * fraction)
                attempt(trial)
    for shift in (0, -1, 1, 0, 0):
        best.fit(shift)
    return best.scale, best.zero_point


class _Best:
    """The grid of least error that was tried so far, of each cell.

    Args:
        x: (r, G, K) float32 values of the cells.
        weights: (r or 1, G, K) float32 of their squared errors; None for 1.
        integers: what the values become.
        scale: (r, G) float32, the first to try.
        zero_point: (r, G) int64.
    """

    def __init__(
        self,
        x: Tensor,
        weights: Tensor | None,
        integers: Integers,
        scale: Tensor,
        zero_point: Tensor,
    ) -> None:
        self.x, self.weights, self.integers = x, weights, integers
        self.scale, self.zero_point = scale, zero_point  # (r, G)
        self.error = torch.full(scale.shape, torch.inf, dtype=torch.float64)  # (r, G)
        self.attempt(scale, zero_point)

    def attempt(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take another grid in the cells where it has a smaller error."""
        scale = scale.clamp_min(SMALLEST_SCALE)
        error = torch.zeros_like(self.error)
        for x, h, steps in self._steps(scale, zero_point):
            e = steps.mul_(scale[..., None]).sub_(x).square_()
            error += (e if h is None else e.mul_(h)).sum(-1, dtype=torch.float64)
        better = error < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.zero_point = torch.where(better, zero_point, self.zero_point)
        self.error = torch.where(better, error, self.error)

    def fit(self, shift: int = 0) -> None:
        """Try the scale s = Σ h w (q − z) / Σ h (q − z)² that is the best for the integers of the best grid."""
        top, bottom = torch.zeros_like(self.error), torch.zeros_like(self.error)
        zero_point = (self.zero_point + shift).clamp(self.integers.low, self.integers.high)
        for x, h, steps in self._steps(self.scale, zero_point):
            weighted = steps if h is None else steps * h
            top += (weighted * x).sum(-1, dtype=torch.float64)
            bottom += (weighted * steps).sum(-1, dtype=torch.float64)
        fitted = torch.where(bottom > 0, top / bottom.clamp_min(1e-300), self.scale.double())
        self.attempt(fitted.float(), zero_point)

    def _steps(
        self, scale: Tensor, zero_point: Tensor
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """(values, weights, q − z) of one slice of each cell after another."""
        size = max(1, CHUNK // scale.numel())
        scale, shift = scale[..., None], zero_point[..., None].float()
        for start in range(0, self.x.shape[-1], size):
            x = self.x[..., start : start + size]
            h = None if self.weights is None else self.weights[..., start : start + size]
            steps = (x / scale).round_().add_(shift)
            yield x, h, steps.clamp_(self.integers.low, self.integers.high).sub_(shift)
