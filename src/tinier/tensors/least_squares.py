"""Linear least squares from streamed sums: ridge regression that shrinks towards weights that are known."""

import torch
from torch import Tensor

RIDGE = 1e-2  # shrinkage towards the known weights, as a share of the mean square of an input


class Sums:
    """Weighted sums over examples from which a linear layer is fitted; the examples themselves are not kept.

    Several independent fits of one shape (the groups of a convolution) are made at once.

    Args:
        fits: number of independent fits g.
        inputs: unknowns of each output n.
        outputs: outputs of each fit m.
    """

    def __init__(self, fits: int, inputs: int, outputs: int) -> None:
        self.weight = 0.0
        self.rows = 0
        self.x = torch.zeros(fits, inputs, dtype=torch.float64)  # Σ w x
        self.y = torch.zeros(fits, outputs, dtype=torch.float64)  # Σ w y
        self.xx = torch.zeros(
            fits, inputs, inputs, dtype=torch.float64
        )  # Σ w x xᵀ, the Gram matrix
        self.xy = torch.zeros(fits, inputs, outputs, dtype=torch.float64)  # Σ w x yᵀ
        self.yy = torch.zeros(fits, outputs, dtype=torch.float64)  # Σ w y²

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Add examples.

        Args:
            x: (g, rows, n) inputs.
            y: (g, rows, m) outputs that are wanted for them.
            weights: (rows,), at least 0, of each example; None for 1.

        Cost:
            rows · g · n · (n + m) multiply-adds in float64; memory does not grow with the number of calls.
        """
        x, y = x.detach().double().cpu(), y.detach().double().cpu()
        weighted = x
        if weights is None:
            self.weight += x.shape[1]
        else:
            w = weights.detach().double().cpu()
            self.weight += float(w.sum())
            weighted = x * w[:, None]
        self.rows += x.shape[1]
        self.x += weighted.sum(1)
        self.xx += weighted.mT @ x
        self.xy += weighted.mT @ y
        wy = y if weights is None else y * w[:, None]
        self.y += wy.sum(1)
        self.yy += (wy * y).sum(1)

    def error(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Mean squared error of each output: Σ w ‖y − W x − b‖² / Σ w.

        Args:
            weight: (g, m, n) float64.
            bias: (g, m) float64.

        Returns:
            (g, m) float64, at least 0.
        """
        quadratic = torch.einsum("gmn,gnk,gmk->gm", weight, self.xx, weight)
        total = quadratic - 2 * torch.einsum("gmn,gnm->gm", weight, self.xy) + self.yy
        line = torch.einsum("gmn,gn->gm", weight, self.x)
        total += bias.square() * self.weight + 2 * bias * (line - self.y)
        return (total / max(self.weight, 1e-300)).clamp(min=0)

    def fit(
        self, weight: Tensor, bias: Tensor, ridge: float, intercept: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Ridge regression that shrinks towards a known solution.

            W̃, b̃ = argmin Σ w ‖y − W̃ x − b̃‖² + λ ‖W̃ − W‖²,    λ = ridge · tr(G) / n

        with G = Σ w (x − x̄)(x − x̄)ᵀ, or Σ w x xᵀ where there is no intercept. It is solved for the difference:
        W̃ᵀ = Wᵀ + (G + λ I)⁻¹ (C − G Wᵀ) with C = Σ w (x − x̄)(y − ȳ)ᵀ, and b̃ = ȳ − W̃ x̄. An output that rounding would make
        worse keeps its old row.

        Args:
            weight: (g, m, n) float64, W.
            bias: (g, m) float64; without an intercept it stays as it is.
            ridge: at least 0; 0 gives the solution nearest to W where G is singular.
            intercept: whether the bias is fitted.

        Returns:
            (g, m, n) and (g, m) float64.

        Cost:
            g · n³/3 multiply-adds.
        """
        xx, xy = self.xx, self.xy
        total = max(self.weight, 1e-300)
        if intercept:
            xx = xx - self.x[:, :, None] * self.x[:, None, :] / total
            xy = xy - self.x[:, :, None] * self.y[:, None, :] / total
        else:
            xy = xy - self.x[:, :, None] * bias[:, None, :]
        rest = xy - xx @ weight.mT
        strength = ridge * xx.diagonal(dim1=1, dim2=2).mean(1)
        fitted = weight + _solve(xx, rest, strength).mT
        shift = bias
        if intercept:
            shift = (self.y - torch.einsum("gmn,gn->gm", fitted, self.x)) / total
        better = self.error(fitted, shift) <= self.error(weight, bias)
        return torch.where(better[..., None], fitted, weight), torch.where(better, shift, bias)


def _solve(gram: Tensor, right: Tensor, strength: Tensor) -> Tensor:
    """(G + λ I)⁻¹ R for each of a batch; the least-norm solution where that is singular."""
    size = gram.shape[-1]
    loaded = gram + strength[:, None, None] * torch.eye(size, dtype=gram.dtype)
    factor, failed = torch.linalg.cholesky_ex(loaded)
    diagonal = factor.diagonal(dim1=1, dim2=2)
    sound = (failed == 0) & (diagonal.amin(1) > 1e-7 * diagonal.amax(1))
    if bool(sound.all()):
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(loaded)
    floor = values.amax(1, keepdim=True).clamp(min=0) * size * 1e-15
    inverse = torch.where(values > floor, 1 / values.clamp(min=1e-300), 0.0)
    return vectors @ (inverse[:, :, None] * (vectors.mT @ right))
