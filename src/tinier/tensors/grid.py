"""The integer grid of a weight matrix: a scale and a zero point for each row and each group of neighbouring columns."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from tinier.errors import DataError, InputError
from tinier.tensors import affine
from tinier.tensors.affine import SMALLEST_SCALE, Integers

RULES = ("minmax", "percentile", "mse")

# Values that are searched at once: a few arrays of so many float32 stay in the cache of a core.
_CHUNK = 1 << 18
# The search tries scales that fall by this factor, down to 4 % of the range that clips nothing, then finer steps.
_RATIO = 0.9
_COARSE = 30
# The same for the two ends of an asymmetric range, of which all pairs are tried.
_END_RATIO = 0.8
_END_COARSE = 12


@dataclass(frozen=True)
class Grid:
    """The values s · (q − z) that quantized weights of a matrix (m, n) can take, for integers q from low to high.

    Attributes:
        scale: (m or 1, G) float32, positive; G divides n, and group g holds the columns g · n/G … (g + 1) · n/G − 1.
        zero_point: (m or 1, G) int64, one of the integers.
        integers: low … high.

    Raises:
        InputError: the shapes are not those.
    """

    scale: Tensor  # (m or 1, G) float32
    zero_point: Tensor  # (m or 1, G) int64
    integers: Integers

    def __post_init__(self) -> None:
        if self.scale.ndim != 2 or self.scale.shape != self.zero_point.shape:
            raise InputError(
                f"scale {tuple(self.scale.shape)} and zero point {tuple(self.zero_point.shape)} of a grid: "
                "both need the shape (rows or 1, groups)"
            )

    def quantize(self, w: Tensor) -> Tensor:
        """q = clamp(round(w / s) + z, low, high); halves round to even, as `affine.quantize` does.

        Args:
            w: (m, n) float.

        Returns:
            (m, n) in ``integers.dtype``.

        Raises:
            InputError: the matrix does not fit the grid.
        """
        scale, zero_point = self._cells(w)
        parts = w.detach().float().reshape(w.shape[0], scale.shape[1], -1)
        q = affine.quantize(parts, scale, zero_point, self.integers)
        return q.reshape(w.shape)

    def dequantize(self, q: Tensor) -> Tensor:
        """ŵ = s · (q − z), as `affine.dequantize` does.

        Args:
            q: (m, n) integers.

        Returns:
            (m, n) float32.

        Raises:
            InputError: the matrix does not fit the grid.
        """
        scale, zero_point = self._cells(q)
        parts = q.reshape(q.shape[0], scale.shape[1], -1)
        return affine.dequantize(parts, scale, zero_point).reshape(q.shape)

    def nearest(self, w: Tensor) -> Tensor:
        """The nearest value of the grid to each weight: (m, n) float → (m, n) float32."""
        return self.dequantize(self.quantize(w))

    def columns(self, n: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each of ``n`` columns.

        Args:
            n: columns of the matrix; the groups divide it.

        Returns:
            ((m or 1, n) float32, (m or 1, n) int64).
        """
        size = n // self.scale.shape[1]
        return self.scale.repeat_interleave(size, 1), self.zero_point.repeat_interleave(size, 1)

    def _cells(self, w: Tensor) -> tuple[Tensor, Tensor]:
        rows, groups = self.scale.shape
        if w.ndim != 2 or rows not in (1, w.shape[0]) or w.shape[1] % groups:
            raise InputError(
                f"a grid of {rows} rows and {groups} groups does not fit a matrix of shape {tuple(w.shape)}: "
                "it needs as many rows (or 1), and the groups must divide the columns"
            )
        return self.scale[..., None], self.zero_point[..., None]


def group_count(n: int, size: int) -> int:
    """How many groups of ``size`` neighbouring columns n columns have.

    Args:
        n: columns, 1 or more.
        size: columns of a group, 1 or more.

    Raises:
        InputError: the size does not divide n; the message names sizes that do.
    """
    if size >= 1 and n % size == 0:
        return n // size
    divisors = _divisors(n)
    below = [d for d in divisors if d <= max(size, 1)]
    # Kernels like multiples of eight; the largest that fits is the nearest to what was asked for.
    good = sorted({d for d in below if d % 8 == 0} | {below[-1]})[-3:]
    if good == [1]:
        good = [1, n]
    raise InputError(f"group size {size} does not divide {n} inputs; use {_either(good)}")


def choose(
    w: Tensor,
    integers: Integers,
    *,
    rule: str = "minmax",
    groups: int = 1,
    per_tensor: bool = False,
    symmetric: bool = True,
    percentile: float = 99.9,
    importance: Tensor | None = None,
) -> Grid:
    """The grid of a weight matrix: a scale (and zero point) for each row and group.

    ``"minmax"`` clips nothing. ``"percentile"`` clips to a percentile of |w|. ``"mse"`` has the least
    Σ_j h_j (w_ij − ŵ_ij)², with h = 1 or the importance E[x_j²] of the columns; it is never worse than ``"minmax"``.

    Args:
        w: (m, n) float, finite, not empty.
        integers: what the weights become.
        rule: one of ``RULES``.
        groups: G, groups of n/G neighbouring columns with a scale of their own each; see `group_count`.
        per_tensor: one scale for all rows; the grid then has the shape (1, G).
        symmetric: the zero point is 0, or the middle (8 of 0 … 15) where the integers are all of one sign. Otherwise each cell's
            range [min w, max w], widened to hold 0, has a zero point of its own, and ``"mse"`` searches both of its ends.
        percentile: in (0, 100], of ``"percentile"``, interpolated linearly. Where it is 0 (weights that are mostly
            zeros) nothing is clipped.
        importance: (n,) or (m, n), at least 0, of ``"mse"``: E[x²] of the input columns. Only ratios matter; in a cell where all are
            0 they count as equal.

    Returns:
        Grid with scale and zero point of shape (m or 1, G). A cell of zeros has, as in `affine.symmetric`, the smallest scale of the
        others (symmetric), or scale 1 (asymmetric).

    Raises:
        InputError: the rule is not known, the groups do not divide n, or an argument has another shape or range.
        DataError: weights or importance are not finite, or importance is negative.

    Cost:
        Passes over the weights: 1; for ``"mse"`` about 45 symmetric, 200 asymmetric (0.7 and 4 seconds for 4096 × 4096 on one
        core). Extra memory: a few MB, and a copy of ``w`` and the importance when ``per_tensor``.

    Source:
        Importance: the diagonal of the Hessian of ‖(w − ŵ) x‖², as in Lin et al. 2023, "AWQ", and llama.cpp's importance matrix.

    Differs:
        Of integers that reach farther below zero (−8 … 7) the longer reach is used: ``"minmax"`` takes the smallest scale that
        clips nothing, max(max w / 7, −min w / 8), which `affine.symmetric` does not; ``"mse"`` also clips where that is better.
    """
    matrix = _matrix(w, groups)
    if rule not in RULES:
        raise InputError(f"rule {rule!r} is not known; use {_either(RULES)}")
    if not 0 < percentile <= 100:
        raise InputError(f"percentile {percentile:g} is not in (0, 100]")
    cells = _in_cells(matrix, groups, per_tensor)
    weights = None
    if importance is not None:
        if rule != "mse":
            raise InputError(
                f"importance weighs squared errors, which rule {rule!r} has none of; use 'mse'"
            )
        h = _importance(importance, matrix)
        weights = _in_cells(h.expand(matrix.shape) if per_tensor else h, groups, per_tensor)
    clip = percentile if rule == "percentile" else 100.0
    ends = [_ends(cells[rows], clip) for rows in _rows(cells)]
    low, high = (torch.cat([pair[end] for pair in ends]) for end in (0, 1))
    scale, zero_point = _grid_of(low, high, integers, symmetric)
    if rule == "mse":
        for rows in _rows(cells):
            best = _Best(
                cells[rows],
                None
                if weights is None
                else _weights(weights if weights.shape[0] == 1 else weights[rows]),
                integers,
                scale[rows],
                zero_point[rows],
            )
            if symmetric:
                _search_scale(best)
            else:
                _search_ends(best, low[rows], high[rows])
            scale[rows], zero_point[rows] = best.scale, best.zero_point
    return Grid(scale, zero_point, integers)


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
        size = max(1, _CHUNK // scale.numel())
        scale, shift = scale[..., None], zero_point[..., None].float()
        for start in range(0, self.x.shape[-1], size):
            x = self.x[..., start : start + size]
            h = None if self.weights is None else self.weights[..., start : start + size]
            steps = (x / scale).round_().add_(shift)
            yield x, h, steps.clamp_(self.integers.low, self.integers.high).sub_(shift)


def _search_scale(best: _Best) -> None:
    """Scales from the one that clips nothing downward, then finer around the best, then the closed form."""
    first = best.scale
    for step in range(1, _COARSE):
        best.attempt(first * _RATIO**step, best.zero_point)
    for fraction in (1 / 3, 1 / 9, 1 / 27):
        centre = best.scale
        for step in (-2, -1, 1, 2):
            best.attempt(centre * _RATIO ** (step * fraction), best.zero_point)
    for _ in range(3):
        best.fit()


def _search_ends(best: _Best, low: Tensor, high: Tensor) -> None:
    """All pairs of ends of a coarse list, then each end finer, then neighbouring zero points and the closed form."""
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


def _grid_of(
    low: Tensor, high: Tensor, integers: Integers, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero point (r, G) of the ranges low ≤ 0 ≤ high (r, G)."""
    if not symmetric:
        return affine.asymmetric(low, high, integers)
    middle = 0 if integers.low < 0 < integers.high else (integers.low + integers.high + 1) // 2
    below, above = middle - integers.low, integers.high - middle
    if below < 1 or above < 1:
        raise InputError(
            f"integers {integers.low} … {integers.high} have none on both sides of a zero point: a symmetric grid needs at least 3"
        )
    bound = torch.maximum(high.double(), -low.double() * above / below)
    scale = affine.symmetric(bound, Integers(-below, above))
    return scale, torch.full(scale.shape, middle, dtype=torch.int64)


def _ends(x: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """The ranges low ≤ 0 ≤ high, each (r, G), of cells (r, G, K), clipped to a percentile of the absolute values."""
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
    if percentile < 100:
        size = x.abs()
        place = percentile / 100 * (x.shape[-1] - 1)
        under = int(place)
        a = size.kthvalue(under + 1, -1).values
        b = size.kthvalue(min(under + 2, x.shape[-1]), -1).values
        bound = torch.lerp(a, b, place - under)
        bound = torch.where(bound > 0, bound, torch.inf)
        low, high = torch.maximum(low, -bound), torch.minimum(high, bound)
    return low, high


def _matrix(w: Tensor, groups: int) -> Tensor:
    """The weights as float32 (m, n), checked."""
    if w.ndim != 2 or not w.numel():
        raise InputError(
            f"weights of shape {tuple(w.shape)}: a grid needs a matrix (outputs, inputs) that is not empty"
        )
    n = w.shape[1]
    if groups < 1 or n % groups:
        near = [d for d in _divisors(n) if d <= max(groups, 1)][-1:]
        near += [d for d in _divisors(n) if d > groups][:1]
        raise InputError(
            f"{groups} groups do not divide {n} inputs; use {_either(sorted(set(near)))} groups"
        )
    matrix = w.detach().float()
    if not bool(torch.isfinite(matrix).all()):
        raise DataError("weights to quantize are not finite: they have NaN or infinity")
    return matrix


def _importance(importance: Tensor, matrix: Tensor) -> Tensor:
    """The importance as (m or 1, n), checked."""
    h = importance.detach()
    if h.shape not in (matrix.shape, matrix.shape[1:]):
        raise InputError(
            f"importance of shape {tuple(h.shape)}: weights of shape {tuple(matrix.shape)} need {tuple(matrix.shape[1:])} "
            "or their own shape"
        )
    if not bool(torch.isfinite(h).all()) or bool((h < 0).any()):
        raise DataError(
            "importance has negative or not finite values: it is a mean square, at least 0"
        )
    return h if h.ndim == 2 else h[None]


def _weights(h: Tensor) -> Tensor:
    """(…, K) importance → float32 with the largest of each cell 1; a cell without any counts all alike."""
    h = h.double()
    most = h.amax(-1, keepdim=True)
    return torch.where(most > 0, h / most.clamp_min(1e-300), 1.0).float()


def _in_cells(matrix: Tensor, groups: int, per_tensor: bool) -> Tensor:
    """(m, n) → (m, G, n/G), or (1, G, m · n/G) with the values of all rows together."""
    cells = matrix.reshape(matrix.shape[0], groups, -1)
    return cells.transpose(0, 1).reshape(1, groups, -1) if per_tensor else cells


def _rows(cells: Tensor) -> Iterator[slice]:
    """Slices of rows with about `_CHUNK` values each."""
    size = max(1, _CHUNK // cells[0].numel())
    return (slice(start, start + size) for start in range(0, cells.shape[0], size))


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _either(options: list[int] | tuple[str, ...]) -> str:
    """ "8, 40 or 100"."""
    *most, last = (str(option) for option in options)
    return f"{', '.join(most)} or {last}" if most else last
