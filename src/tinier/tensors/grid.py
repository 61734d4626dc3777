"""The integer grid of a weight matrix: a scale and a zero point for each row and each group of neighbouring columns."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from tinier.errors import DataError, InputError
from tinier.tensors import affine
from tinier.tensors.affine import Integers
from tinier.tensors.grid_search import CHUNK, best_ends, best_scale

RULES = ("minmax", "percentile", "mse")


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

    def check(self, w: Tensor) -> None:
        """Refuse a matrix that the grid does not fit.

        Args:
            w: (m, n), of any type.

        Raises:
            InputError: it is no matrix, has another number of rows, or columns that the groups do not divide.
        """
        rows, groups = self.scale.shape
        if w.ndim != 2 or rows not in (1, w.shape[0]) or w.shape[1] % groups:
            raise InputError(
                f"a grid of {rows} rows and {groups} groups does not fit a matrix of shape {tuple(w.shape)}: "
                "it needs as many rows (or 1), and the groups must divide the columns"
            )

    def _cells(self, w: Tensor) -> tuple[Tensor, Tensor]:
        self.check(w)
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
        Passes over the weights: 1; for ``"mse"`` about 100 symmetric, 180 asymmetric (2 and 4 seconds for 4096 × 4096 on one
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
    weights: Tensor | None = None
    if importance is not None:
        if rule != "mse":
            raise InputError(
                f"importance weighs squared errors, which rule {rule!r} has none of; use 'mse'"
            )
        each = _importance(importance, matrix)
        each = each.expand(matrix.shape) if per_tensor else each
        weights = _in_cells(each, groups, per_tensor)
    clip = percentile if rule == "percentile" else 100.0
    ends = [_ends(cells[rows], clip) for rows in _rows(cells)]
    low, high = (torch.cat([pair[end] for pair in ends]) for end in (0, 1))
    scale, zero_point = _grid_of(low, high, integers, symmetric)
    if rule == "mse":
        for rows in _rows(cells):
            h = None
            if weights is not None:
                h = _weights(weights if weights.shape[0] == 1 else weights[rows])
            start = (scale[rows], zero_point[rows])
            if symmetric:
                found = best_scale(cells[rows], h, integers, *start)
            else:
                found = best_ends(cells[rows], h, integers, *start, low[rows], high[rows])
            scale[rows], zero_point[rows] = found
    return Grid(scale, zero_point, integers)


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
    """Slices of rows with about `CHUNK` values each."""
    size = max(1, CHUNK // cells[0].numel())
    return (slice(start, start + size) for start in range(0, cells.shape[0], size))


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _either(options: list[int] | tuple[str, ...]) -> str:
    """ "8, 40 or 100"."""
    *most, last = (str(option) for option in options)
    return f"{', '.join(most)} or {last}" if most else last
