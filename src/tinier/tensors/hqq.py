"""Half-quadratic quantization: scales and zero points that few large errors do not pull away, found without data."""

from math import isfinite

import torch
from torch import Tensor

from tinier.errors import DataError, InputError
from tinier.tensors import affine
from tinier.tensors.affine import SMALLEST_SCALE
from tinier.tensors.grid import Grid
from tinier.tensors.grid_search import CHUNK


def hqq(
    w: Tensor,
    grid: Grid,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    steps: int = 20,
    scales: bool = True,
    zero_points: bool | None = None,
) -> Grid:
    """The grid with a small Σ |w − ŵ|^p, which for p < 1 forgives a few large errors, the outliers, for many small ones.

    Half-quadratic splitting of the error into E and what the grid explains: with w in units of the first scale,

        E = sign(r) · max(|r| − |r|^(p−1) / β, 0),    r = w − s (q − z)
        z = mean(q − (w − E) / s),    s = Σ (w − E) (q − z) / Σ (q − z)²,    β ← κ β

    and q rounded anew, for a number of steps. Then z is rounded down and up, and s fitted to each by the same steps.

    Args:
        w: (m, n) float, finite.
        grid: where it starts, such as of `choose`.
        p: of the norm, in (0, 1].
        beta: β, above 0.
        growth: κ, at least 1.
        steps: of each fit, 1 or more.
        scales: whether s is fitted too.
        zero_points: whether z is; None: unless all are the middle of the integers, as in a symmetric grid.

    Returns:
        Grid with integer zero points. The sum of no row and group is above that of the grid given (of no group, where all rows
        share a grid).

    Raises:
        InputError: the matrix does not fit the grid, or an argument is out of its range.
        DataError: the weights are not finite.

    Cost:
        2 · steps passes over the weights for symmetric grids, 7 · steps for others (3 and 11 seconds for 4096 × 4096 on one core); a
        few arrays of 2¹⁸ float32, or of the size of the weights where all rows share a grid.

    Source:
        Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models": their alternation of E and z.

    Differs:
        Zero points end as integers, which ONNX and OpenVINO need; the paper's stay float. That leaves z little to gain, so that s is
        fitted too, which the paper holds fixed. Errors are measured in steps of the grid, not in the unit of the weights, so that
        β means the same for all layers. The best grid on the way is kept, by its own objective.
    """
    for name, value, fits in (
        ("p", p, 0 < p <= 1),
        ("beta", beta, beta > 0 and isfinite(beta)),
        ("growth", growth, growth >= 1 and isfinite(growth)),
        ("steps", steps, steps >= 1),
    ):
        if not fits:
            raise InputError(
                f"{name} {value:g}: p in (0, 1], beta above 0, growth and steps of at least 1 are needed"
            )
    matrix = w.detach().float()
    grid.check(matrix)
    if not bool(torch.isfinite(matrix).all()):
        raise DataError("weights to quantize are not finite: they have NaN or infinity")
    low, high = grid.integers.low, grid.integers.high
    if zero_points is None:
        middle = 0 if low < 0 < high else (low + high + 1) // 2
        zero_points = bool((grid.zero_point != middle).any())
    rows, groups = grid.scale.shape
    cells = matrix.reshape(len(matrix), groups, -1)
    if rows == 1:
        cells = cells.transpose(0, 1).reshape(1, groups, -1)
    size = max(1, CHUNK // cells[0].numel())
    found = []
    for start in range(0, rows, size):
        part = slice(start, start + size)
        own = Grid(grid.scale[part], grid.zero_point[part], grid.integers)
        splitting = _Splitting(cells[part], own, p, beta, growth, steps)
        splitting.fit(scales, zero_points)
        found.append((splitting.scale, splitting.zero_point))
    scale, zero_point = (torch.cat(each) for each in zip(*found, strict=True))
    return Grid(scale[..., 0], zero_point[..., 0], grid.integers)


class _Splitting:
    """Half-quadratic splitting of some cells, and the best grid that it passed.

    Args:
        x: (r, G, K) float32 values of the cells.
        grid: (r, G), where it starts.
        p, beta, growth, steps: as in `hqq`.
    """

    def __init__(
        self, x: Tensor, grid: Grid, p: float, beta: float, growth: float, steps: int
    ) -> None:
        self.x, self.integers = x, grid.integers
        self.first = grid.scale[..., None]  # (r, G, 1), the unit of errors
        self.p, self.beta, self.growth, self.steps = p, beta, growth, steps
        self.scale, self.zero_point = self.first, grid.zero_point[..., None]  # (r, G, 1)
        self.error = torch.full(self.first.shape, torch.inf, dtype=torch.float64)  # (r, G, 1)
        self._attempt(self.scale, self.zero_point)

    def fit(self, scales: bool, zero_points: bool) -> None:
        """Fit what may change."""
        first = self.zero_point
        places = [first]
        if zero_points:
            _, z = self._split(first.float(), scales, True)
            low, high = self.integers.low, self.integers.high
            places += [z.floor().long().clamp(low, high), z.ceil().long().clamp(low, high)]
        for place in places:
            self._attempt(self.first, place)
            if scales:
                self._split(place.float(), True, False)

    def _split(self, z: Tensor, scales: bool, zero_points: bool) -> tuple[Tensor, Tensor]:
        """Alternate from the first scale and a zero point z (r, G, 1); returns (s / first scale, z)."""
        w = self.x / self.first
        s, beta = torch.ones_like(self.first), self.beta
        for _ in range(self.steps):
            q = (w / s).add_(z).round_().clamp_(self.integers.low, self.integers.high)
            r = w - (q - z) * s
            size = r.abs()
            e = (size - size.pow(self.p - 1) / beta).clamp_min_(0).mul_(r.sign())
            explained = w - e
            if zero_points:
                z = (q - explained / s).mean(-1, dtype=torch.float64, keepdim=True).float()
            if scales:
                c = q - z
                top = (explained * c).sum(-1, dtype=torch.float64, keepdim=True)
                bottom = c.square().sum(-1, dtype=torch.float64, keepdim=True)
                fitted = (top / bottom.clamp_min(1e-300)).float()
                s = torch.where((bottom > 0) & (fitted > 0), fitted, s)
            beta *= self.growth
            if not zero_points:
                self._attempt(self.first * s, z.long())
        return s, z

    def _attempt(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take another grid (r, G, 1) in the cells where it has a smaller sum."""
        scale = scale.clamp_min(SMALLEST_SCALE)
        rounded = affine.fake_quantize(self.x, scale, zero_point, self.integers)
        error = ((self.x - rounded) / self.first).abs_().pow_(self.p)
        total = error.sum(-1, dtype=torch.float64, keepdim=True)
        better = total < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.zero_point = torch.where(better, zero_point, self.zero_point)
        self.error = torch.where(better, total, self.error)
