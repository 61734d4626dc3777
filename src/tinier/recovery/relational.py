"""Distillation of relations: match the distances and angles between the examples of a batch; shapes of features may differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.recovery.base import FeatureLoss, FeatureTerm
from tinier.recovery.features import SMALL, OverPoints, pooled


@dataclass(frozen=True)
class Relational(FeatureLoss):
    """Huber distances between student and teacher of ``‖x_i − x_j‖ / mean`` and of the cosines of the angles at x_j in (x_i, x_j, x_k).

    Features are averaged over their places first.

    Attributes:
        distance: factor of the part of the distances.
        angle: factor of the part of the angles.
        most: examples of a batch whose angles are compared, as their number grows with the cube.

    Source:
        Park et al. 2019, "Relational knowledge distillation", equations 5 to 9.

    Differs:
        At every point, not at the last embedding alone; images and sequences are averaged first, for the time that angles take.
    """

    name: ClassVar[str] = "relational"
    distance: float = 1.0
    angle: float = 2.0
    most: int = 32

    def on(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> FeatureTerm:
        return OverPoints(self._distance, 1.0)

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        a, b = pooled(student), pooled(teacher)
        found = self.distance * F.smooth_l1_loss(_distances(a), _distances(b))
        return found + self.angle * F.smooth_l1_loss(
            _angles(a[: self.most]), _angles(b[: self.most])
        )


def _distances(x: Tensor) -> Tensor:
    """(batch, batch) over their mean without the diagonal."""
    squares = (x[:, None] - x[None]).square().sum(2) if x.numel() < 2**16 else _squares(x)
    # The gradient of a root at 0, on the diagonal, is not finite.
    found = torch.where(squares > SMALL, squares.clamp_min(SMALL).sqrt(), 0.0)
    pairs = max(int((found.detach() > 0).sum()), 1)
    return found / (found.sum() / pairs).clamp_min(SMALL)


def _squares(x: Tensor) -> Tensor:
    norms = x.square().sum(1)
    return (norms[:, None] + norms[None] - 2 * x @ x.T).clamp_min(0)


def _angles(x: Tensor) -> Tensor:
    """(batch, batch, batch) cosines at the first of the three."""
    edges = F.normalize(x[None] - x[:, None], dim=2)
    return edges @ edges.transpose(1, 2)
