"""The proxy loss of integers, and what lowers it: coordinate descent on the integers and scales fitted to them.

The proxy loss of a weight matrix is tr((W − Ŵ) H (W − Ŵ)ᵀ) with H = E[x xᵀ]: the mean squared change of the outputs W x. Its
rows are independent of each other, so everything is done for all rows at once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tinier.errors import DataError, InputError
from tinier.tensors.affine import SMALLEST_SCALE
from tinier.tensors.grid import Grid

# Float64 values of a matrix that are worked on at once; rows are independent.
CHUNK = 1 << 22
_PROJECTED_SWEEPS = 30


def proxy_loss(w: Tensor, q: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """(w_i − ŵ_i) H (w_i − ŵ_i)ᵀ of each row i.

    Args:
        w: (m, n) float.
        q: (m, n) integers of the grid.
        hessian: (n, n).
        grid: of the integers.

    Returns:
        (m,) float64, at least 0.

    Cost:
        m n² float64 multiply-adds.
    """
    h = hessian.double()
    losses = []
    for rows, part in chunks(w.detach()):
        error = part.double() - rows_of(grid, rows).dequantize(q[rows]).double()
        losses.append(((error @ h) * error).sum(1))
    return torch.cat(losses).clamp_min(0)


def sweep(
    w: Tensor, q: Tensor, hessian: Tensor, grid: Grid, *, passes: int = 1, block: int = 128
) -> Tensor:
    """Coordinate descent on the integers: each in turn becomes the one with the least proxy loss, the others as they are.

    With g = (W − Ŵ) H the step of weight (i, j) that is best is g_ij / H_jj; q_ij moves by it, rounded to the grid, where that
    lowers the loss. The loss of no row rises.

    Args:
        w: (m, n) float, finite.
        q: (m, n) integers of the grid.
        hessian: (n, n), positive semidefinite. Columns whose diagonal is 0 stay.
        grid: of the integers.
        passes: sweeps over all columns; it ends early when one changes nothing.
        block: columns after which the rest of g is updated.

    Returns:
        (m, n) integers like ``q``.

    Raises:
        InputError: shapes do not fit.
        DataError: the weights or H are not finite.

    Cost:
        (1 + passes) m n² float64 multiply-adds.

    Source:
        Nair and Suggala 2024, "CDQuant", algorithm 1; Behdin et al. 2023, "QuantEase", whose cyclic order this has.
    """
    matrix = weights_of(w)
    h = hessian_of(hessian, matrix.shape[1])
    parts = [
        _swept(part, q[rows], h, rows_of(grid, rows), passes, block)
        for rows, part in chunks(matrix)
    ]
    return torch.cat(parts)


def refit_scales(w: Tensor, q: Tensor, hessian: Tensor, grid: Grid) -> Grid:
    """The scales with the least proxy loss for given integers, all groups of a row together.

        s_i = argmin (w_i − C_i s) H (w_i − C_i s)ᵀ,    C_i has q_ij − z in row j and the column of j's group

    which (C_iᵀ H C_i) s_i = C_iᵀ H w_i solves. Where a scale of that is not positive, or the system is singular, the scales of the
    row are fitted one after another and kept positive. A row that gains nothing keeps its scales.

    Args:
        w: (m, n) float, finite.
        q: (m, n) integers of the grid.
        hessian: (n, n), positive semidefinite.
        grid: of the integers. Of one that all rows share, one s is fitted to all of them.

    Returns:
        Grid with other scales; zero points stay, as do the scales of groups whose integers all are the zero point.

    Raises:
        InputError: shapes do not fit.
        DataError: the weights or H are not finite.

    Cost:
        2 m n² float64 multiply-adds, and m G³ / 3.
    """
    matrix = weights_of(w)
    h = hessian_of(hessian, matrix.shape[1])
    rows, groups = grid.scale.shape
    _, zero_point = grid.columns(matrix.shape[1])
    shared = rows == 1
    quadratics, linears, losses, scales = [], [], [], []
    for part_rows, part in chunks(matrix, groups**2):
        own = rows_of(grid, part_rows)
        error = part.double() - own.dequantize(q[part_rows]).double()
        pull = error @ h  # (r, n)
        c = (q[part_rows].long() - (zero_point if shared else zero_point[part_rows])).double()
        quadratic = torch.stack(
            [
                _by_group((c[:, columns] @ h[columns]) * c, groups)
                for columns in torch.arange(c.shape[1]).chunk(groups)
            ],
            1,
        )  # (r, G, G)
        linear, loss = _by_group(c * pull, groups), (error * pull).sum(1)
        if shared:
            quadratics.append(quadratic.sum(0))
            linears.append(linear.sum(0))
            losses.append(loss.sum(0))
        else:
            scales.append(_refitted(quadratic, linear, loss, own.scale))
    if shared:
        quadratic, linear, loss = (
            torch.stack(parts).sum(0)[None] for parts in (quadratics, linears, losses)
        )
        scales.append(_refitted(quadratic, linear, loss, grid.scale))
    return Grid(torch.cat(scales), grid.zero_point, grid.integers)


def chunks(w: Tensor, least: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows, each of about `CHUNK` values, or fewer where a row needs ``least`` of them."""
    size = max(1, CHUNK // max(w.shape[1], least))
    for start in range(0, w.shape[0], size):
        rows = slice(start, start + size)
        yield rows, w[rows]


def rows_of(grid: Grid, rows: slice) -> Grid:
    """The grid of some rows."""
    if grid.scale.shape[0] == 1:
        return grid
    return Grid(grid.scale[rows], grid.zero_point[rows], grid.integers)


def weights_of(w: Tensor) -> Tensor:
    """The weights as float32 (m, n), checked."""
    matrix = w.detach().float()
    if matrix.ndim != 2 or not matrix.numel():
        raise InputError(
            f"weights of shape {tuple(w.shape)}: error feedback needs a matrix (outputs, inputs) that is not empty"
        )
    if not bool(torch.isfinite(matrix).all()):
        raise DataError("weights to quantize are not finite: they have NaN or infinity")
    return matrix


def hessian_of(hessian: Tensor, n: int) -> Tensor:
    """H as float64, made exactly symmetric, without the columns of dead inputs, checked."""
    h = hessian.detach().double()
    if h.shape != (n, n):
        raise InputError(
            f"second moments of shape {tuple(h.shape)}: weights of {n} inputs need {(n, n)}"
        )
    if not bool(torch.isfinite(h).all()):
        raise DataError("second moments are not finite: the inputs have NaN or infinity")
    if bool((h.diagonal() < 0).any()):
        raise DataError(
            "second moments are negative on the diagonal: they are not those of any data"
        )
    h = (h + h.mT) / 2
    dead = h.diagonal() == 0
    if bool(dead.any()):
        h[dead] = 0.0
        h[:, dead] = 0.0
    return h


def _refitted(quadratic: Tensor, linear: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """s + argmin_d dᵀ A d − 2 bᵀ d: A (r, G, G), b (r, G), the loss (r,) at d = 0 and s (r, G) → (r, G) float32."""
    old = scale.double()
    diagonal = quadratic.diagonal(dim1=1, dim2=2)  # (r, G)
    used = diagonal > 0
    pairs = used[:, :, None] & used[:, None, :]
    a = torch.where(pairs, quadratic, 0.0) + torch.diag_embed((~used).double())
    b = torch.where(used, linear, 0.0)
    factor, failed = torch.linalg.cholesky_ex(a)
    new = old + torch.cholesky_solve(b[..., None], factor)[..., 0]
    sound = (failed == 0) & torch.isfinite(new).all(1) & (new > 0).all(1)
    if not bool(sound.all()):
        new = torch.where(sound[:, None], new, _projected(a, b, old))
    fitted = new.float().clamp_min(SMALLEST_SCALE)
    d = fitted.double() - old
    gain = 2 * (b * d).sum(1) - torch.einsum("rg,rgk,rk->r", d, a, d)
    # Less than this is within what float32 scales can express.
    return torch.where((gain > 1e-4 * loss)[:, None], fitted, scale)


def _projected(a: Tensor, b: Tensor, old: Tensor) -> Tensor:
    """Gauss–Seidel on A d = b that keeps s + d above a thousandth of s: (r, G, G), (r, G), (r, G) → s + d (r, G)."""
    d = torch.zeros_like(b)
    for _ in range(_PROJECTED_SWEEPS):
        for g in range(b.shape[1]):
            rest = b[:, g] - (a[:, g] * d).sum(1)
            d[:, g] = torch.maximum(d[:, g] + rest / a[:, g, g], -0.999 * old[:, g])
    return old + d


def _swept(w: Tensor, q: Tensor, h: Tensor, grid: Grid, passes: int, block: int) -> Tensor:
    """`sweep` of a few rows: (r, n) weights and integers, H (n, n) → (r, n) integers."""
    n = w.shape[1]
    scale = grid.columns(n)[0].mT.double().contiguous()  # (n, r or 1)
    integers = q.mT.double().contiguous()  # (n, r)
    pull = h @ (w.double() - grid.dequantize(q).double()).mT  # (n, r): half the gradient
    diagonal = h.diagonal().tolist()
    for _ in range(passes):
        moved = False
        for start in range(0, n, block):
            stop = min(start + block, n)
            steps = torch.zeros(stop - start, w.shape[0], dtype=torch.float64)
            near = pull[start:stop].clone()
            for j in range(start, stop):
                if diagonal[j] <= 0:
                    continue
                # Halves round to 0: they would gain nothing.
                best = (near[j - start] / (diagonal[j] * scale[j])).round_().add_(integers[j])
                best.clamp_(grid.integers.low, grid.integers.high)
                step = (best - integers[j]) * scale[j]
                integers[j] = best
                steps[j - start] = step
                near.addr_(h[j, start:stop], step, alpha=-1)
            if bool(steps.any()):
                moved = True
                pull -= h[:, start:stop] @ steps
        if not moved:
            break
    return integers.mT.to(q.dtype)


def _by_group(values: Tensor, groups: int) -> Tensor:
    """Sums of the columns of each group: (r, n) → (r, G)."""
    return values.reshape(values.shape[0], groups, -1).sum(-1)
