"""Stub."""

from torch import Tensor

from tinier.tensors.grid import Grid


def hqq(w: Tensor, grid: Grid) -> Grid:
    """Stub."""
    return grid
