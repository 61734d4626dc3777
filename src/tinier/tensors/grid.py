"""Grids of a weight matrix: the values that each of its rows, or groups of its columns, can take."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinier.tensors.affine import Integers


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a matrix (m, n): ŵ = s · (q − z).

    Attributes:
        scale: (m or 1, G) float32, each for n/G neighbouring columns.
        zero_point: like ``scale``, int64.
        integers: what the weights become.
    """

    scale: Tensor
    zero_point: Tensor
    integers: Integers

    def quantize(self, w: Tensor) -> Tensor:
        """(m, n) integers nearest to ``w``."""
        rows, columns = w.shape
        groups = w.reshape(rows, self.scale.shape[1], -1)
        q = (groups / self.scale[..., None]).round() + self.zero_point[..., None]
        q = q.clamp(self.integers.low, self.integers.high).to(self.integers.dtype)
        return q.reshape(rows, columns)

    def dequantize(self, q: Tensor) -> Tensor:
        """(m, n) float32 of integers."""
        groups = q.reshape(len(q), self.scale.shape[1], -1).to(torch.int64)
        return ((groups - self.zero_point[..., None]) * self.scale[..., None]).reshape(q.shape)

    def nearest(self, w: Tensor) -> Tensor:
        """The nearest values that the grid has."""
        return self.dequantize(self.quantize(w))
