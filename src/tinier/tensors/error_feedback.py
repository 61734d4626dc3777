"""Rounding with error feedback: the error of each column is made good by the columns that are still to be rounded."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinier.errors import InputError
from tinier.tensors import affine
from tinier.tensors.grid import Grid
from tinier.tensors.proxy_loss import (
    chunks,
    hessian_of,
    proxy_loss,
    refit_scales,
    rows_of,
    sweep,
    weights_of,
)

ORDERS = ("activation", "group", "none")

# Cholesky factors whose diagonals span more than this are of a matrix that is singular in float64.
_SINGULAR = 1e-7
# Damping that grows from here where none was asked for, and as far as this, in units of the mean diagonal.
_LEAST_DAMPING, _MOST_DAMPING = 1e-6, 1e3


@dataclass(frozen=True)
class Feedback:
    """The integers of a weight matrix, and how they came about.

    Attributes:
        integers: (m, n), in the grid's dtype.
        grid: the grid that they are of; another than the one given only where scales were fitted again.
        loss: (m,) float64, the proxy loss of each row.
        nearest_loss: (m,) float64, that of rounding to nearest on the grid given, never below ``loss``; where a scale that all rows
            share was fitted again, this holds for the sums.
        damping: λ that was used, in units of the mean diagonal of H; 0 where there was no feedback.
        fell_back: why weights were rounded to nearest, in words; empty where they were not.
    """

    integers: Tensor  # (m, n)
    grid: Grid
    loss: Tensor  # (m,)
    nearest_loss: Tensor  # (m,)
    damping: float = 0.0
    fell_back: str = ""


def error_feedback(
    w: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    damping: float = 0.01,
    block: int = 128,
    order: str = "activation",
    passes: int = 0,
    refits: int = 0,
) -> Feedback:
    """Round a weight matrix so that its outputs, not its entries, change the least.

    Columns are rounded one after another. With U upper triangular, Uᵀ U = (H + λ h̄ I)⁻¹ and h̄ the mean diagonal, column j leaves
    e = (w_j − ŵ_j) / U_jj, and each later column k becomes w_k − e · U_jk. Rows for which rounding to nearest has the lower proxy
    loss keep that. Then ``passes`` of `sweep`, and ``refits`` times `refit_scales` and ``passes`` again.

    Args:
        w: (m, n) float, finite.
        hessian: (n, n), symmetric and positive semidefinite up to rounding: H = E[x xᵀ] times any factor.
        grid: the grid of ``w``. Its scales are fixed beforehand, so that any order of columns works with groups.
        damping: λ, at least 0. It grows tenfold until the Cholesky factorisation succeeds.
        block: columns after which the rest of the matrix is updated; the result does not depend on it but for rounding.
        order: of the columns. ``"activation"``: largest diagonal of H first. ``"group"``: groups in that order, columns in that
            order within them. ``"none"``: as they are.
        passes: coordinate descent sweeps over the integers, 0 or more.
        refits: how often the scales are fitted to the integers, 0 or more.

    Returns:
        Feedback. Inputs that are always 0 have their weights rounded to nearest. With H = I all are.

    Raises:
        InputError: shapes do not fit, or an argument is out of its range.
        DataError: the weights or H are not finite.

    Cost:
        About 2 n³ / 3 + 2.5 m n² float64 multiply-adds, m n² more for each pass and 2 m n² for each refit; three (n, n) float64
        and about 6 · 2²² float64.

    Source:
        Frantar et al. 2022, "GPTQ", algorithm 1; Chee et al. 2023, "QuIP", theorems 1 and 6, that this linear feedback is the best. Sweeps:
        Nair and Suggala 2024, "CDQuant".

    Differs:
        Inputs that are dead keep their weights, which GPTQ sets to 0. The factor U comes from one Cholesky factorisation of the reversed
        H, not from two and an inverse. Scales are not computed along the way, and the result is compared with rounding to nearest.
    """
    matrix = weights_of(w)
    n = matrix.shape[1]
    if order not in ORDERS:
        raise InputError(
            f"order {order!r} is not known; use {', '.join(ORDERS[:-1])} or {ORDERS[-1]}"
        )
    for name, value, least in (
        ("damping", damping, 0),
        ("block", block, 1),
        ("passes", passes, 0),
        ("refits", refits, 0),
    ):
        if not least <= value < float("inf"):
            raise InputError(f"{name} {value:g}: a finite number of at least {least} is needed")
    h = hessian_of(hessian, n)
    q = grid.quantize(matrix)
    nearest_loss = proxy_loss(matrix, q, h, grid)
    alive = h.diagonal() > 0
    if not bool(alive.any()):
        why = "rounded to nearest: all inputs are 0 in the data, so that no rounding is better than another"
        return Feedback(q, grid, nearest_loss, nearest_loss, 0.0, why)
    places = _ordered(h, grid, order)
    # Dead inputs have nothing to do with the others; any positive diagonal keeps the factorisation sound.
    mean = h.diagonal()[alive].mean()
    scaled = (h / mean).diagonal_scatter(torch.where(alive, h.diagonal() / mean, 1.0))
    factor, used = _factor(scaled[places][:, places], damping)
    if factor is None:
        why = "rounded to nearest: the second moments of the inputs have no Cholesky factor, even damped; they are not those of any data"
        return Feedback(q, grid, nearest_loss, nearest_loss, 0.0, why)
    fed = torch.cat(
        [
            _columns(part, rows_of(grid, rows), factor, places, block)
            for rows, part in chunks(matrix)
        ]
    )
    fed[:, ~alive] = q[:, ~alive]
    loss = proxy_loss(matrix, fed, h, grid)
    better = loss < nearest_loss
    q = torch.where(better[:, None], fed, q)
    loss = torch.where(better, loss, nearest_loss)
    if passes or refits:
        refined, fitted = _refined(matrix, q, h, grid, passes, refits, block)
        after = proxy_loss(matrix, refined, h, fitted)
        # Where the loss is near nothing, the rounding of float32 values s · (q − z) can undo what was gained.
        worse = after > loss
        if refits and len(grid.scale) == 1:  # the rows' scale is one
            worse = (after.sum() > loss.sum()).expand(worse.shape)
        q = torch.where(worse[:, None], q, refined)
        loss = torch.where(worse, loss, after)
        if refits:
            scale = torch.where(worse[: len(grid.scale), None], grid.scale, fitted.scale)
            grid = Grid(scale, grid.zero_point, grid.integers)
    return Feedback(q, grid, loss, nearest_loss, used)


def _refined(
    w: Tensor, q: Tensor, h: Tensor, grid: Grid, passes: int, refits: int, block: int
) -> tuple[Tensor, Grid]:
    q = sweep(w, q, h, grid, passes=passes, block=block) if passes else q
    for _ in range(refits):
        grid = refit_scales(w, q, h, grid)
        q = sweep(w, q, h, grid, passes=passes, block=block) if passes else q
    return q, grid


def _columns(w: Tensor, grid: Grid, factor: Tensor, places: Tensor, block: int) -> Tensor:
    """GPTQ: (r, n) weights, their grid, U (n, n) of the columns in their order → (r, n) integers."""
    n = w.shape[1]
    scale, zero_point = (each[:, places].mT.contiguous() for each in grid.columns(n))  # (n, r or 1)
    rest = w[:, places].mT.double().contiguous()  # (n, r)
    q = torch.empty(rest.shape, dtype=grid.integers.dtype)
    for start in range(0, n, block):
        stop = min(start + block, n)
        errors = torch.empty(stop - start, w.shape[0], dtype=torch.float64)
        for j in range(start, stop):
            q[j] = affine.quantize(rest[j].float(), scale[j], zero_point[j], grid.integers)
            rounded = affine.dequantize(q[j], scale[j], zero_point[j])
            error = (rest[j] - rounded) / factor[j, j]
            rest[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
            errors[j - start] = error
        rest[stop:] -= factor[start:stop, stop:].mT @ errors
    integers = torch.empty(w.shape, dtype=q.dtype)
    integers[:, places] = q.mT
    return integers


def _factor(h: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """(U, λ) with Uᵀ U = (H + λ I)⁻¹ for H (n, n) of mean diagonal 1, upper triangular; None where no λ will do."""
    size = torch.eye(len(h), dtype=torch.float64)
    while damping <= _MOST_DAMPING:
        # With H = R Rᵀ and R upper triangular, which the Cholesky factor of H read backwards is, U = R⁻¹.
        lower, failed = torch.linalg.cholesky_ex((h + damping * size).flip(0, 1))
        pivots = lower.diagonal()
        if not int(failed) and bool(pivots.min() > _SINGULAR * pivots.max()):
            return torch.linalg.solve_triangular(lower.flip(0, 1), size, upper=True), damping
        damping = max(10 * damping, _LEAST_DAMPING)
    return None, 0.0


def _ordered(h: Tensor, grid: Grid, order: str) -> Tensor:
    """The columns in the order in which they are rounded: (n,) int64."""
    diagonal = h.diagonal()
    if order == "none":
        return torch.arange(len(h))
    if order == "activation":
        return diagonal.argsort(descending=True, stable=True)
    each = diagonal.reshape(grid.scale.shape[1], -1)  # (G, n/G)
    inside = each.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(len(each))[:, None] * each.shape[1]
    return (first + inside)[each.mean(1).argsort(descending=True, stable=True)].flatten()
