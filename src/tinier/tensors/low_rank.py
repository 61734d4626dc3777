"""Matrices and convolution kernels as products of smaller ones, with the least error where a layer's inputs lie."""

import torch
from torch import Tensor

from tinier.errors import DataError

DAMPING = 1e-6  # of the mean of the second moments' diagonal
SWEEPS = 3  # of the alternating improvement of a Tucker decomposition


def whitener(moments: Tensor | None, columns: int) -> Tensor:
    """L with L·Lᵀ = the second moments of the inputs, damped; the identity without them.

    Args:
        moments: (n, n) Σ x xᵀ, or None.
        columns: n.

    Returns:
        (n, n) float64.

    Raises:
        DataError: the moments are not finite.
    """
    if moments is None:
        return torch.eye(columns, dtype=torch.float64)
    if not bool(moments.isfinite().all()):
        raise DataError("second moments of inputs must be finite")
    # A symmetric root exists for singular moments, too; the damping keeps directions that no input had.
    values, vectors = torch.linalg.eigh(moments.double())
    values = values.clamp_min(0) + DAMPING * values.mean().clamp_min(1e-30)
    return (vectors * values.sqrt()) @ vectors.T


def decomposed(weight: Tensor, root: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition U·S·Vᵀ of W·L.

    Args:
        weight: (m, n).
        root: (n, n), L of `whitener`.

    Returns:
        (m, k), (k,) descending, (k, n), float64; k = min(m, n).

    Cost:
        O(m·n·min(m, n)).
    """
    u, s, v = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    return u, s, v


def factors(parts: tuple[Tensor, Tensor, Tensor], root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of the given rank with the least ‖(W − A·B)·L‖_F.

    Args:
        parts: of `decomposed`.
        root: L.
        rank: r, from 1 to min(m, n).

    Returns:
        (m, r) and (r, n) float64; the singular values are shared evenly.

    Source:
        Eckart and Young 1936; with inputs Wang et al. 2024, "SVD-LLM", section 3.1, and Chen et al. 2021, "DRONE".
    """
    u, s, v = parts
    half = s[:rank].sqrt()
    return u[:, :rank] * half, torch.linalg.solve(root, (half[:, None] * v[:rank]).T).T


def rank_of_energy(singular: Tensor, energy: float) -> int:
    """The least rank that keeps a share of the squared singular values.

    Args:
        singular: (k,) descending.
        energy: in (0, 1].
    """
    squares = singular.double().square()
    total = squares.sum()
    if not bool(total > 0):
        return 1
    share = squares.cumsum(0) / total
    return min(int((share < energy - 1e-12).sum()) + 1, len(singular))


def tucker2(kernel: Tensor, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """U_out, core and U_in with kernel ≈ core ×₁ U_out ×₂ U_in: orthogonal factors of the two channel dimensions.

    Args:
        kernel: (m, n, …).
        outputs: r₁, from 1 to m.
        inputs: r₂, from 1 to n.

    Returns:
        (m, r₁), (r₁, r₂, …), (n, r₂), float64.

    Cost:
        A few singular value decompositions of the kernel's unfoldings.

    Source:
        Kim et al. 2016, "Compression of deep convolutional neural networks for fast and low power mobile applications", section 3.1;
        De Lathauwer et al. 2000, the higher-order orthogonal iteration.
    """
    flat = kernel.double().flatten(2)  # (m, n, places)
    left = _leading(flat.flatten(1), outputs)
    right = _leading(flat.transpose(0, 1).flatten(1), inputs)
    for _ in range(SWEEPS):
        left = _leading(torch.einsum("mnp,nr->mrp", flat, right).flatten(1), outputs)
        right = _leading(torch.einsum("mnp,ms->nsp", flat, left).flatten(1), inputs)
    core = torch.einsum("mnp,ms,nr->srp", flat, left, right)
    return left, core.reshape(outputs, inputs, *kernel.shape[2:]), right


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """(rows, rank) the first left singular vectors."""
    return torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
