"""Distillation of features: match the teacher's values inside, after a linear map where widths differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tinier.recovery.base import FeatureLoss, FeatureTerm
from tinier.recovery.features import Projected, channels_last, of_same_size, relative_error

FITS = ("learned", "least_squares")
DAMPING = 1e-3  # of the mean of the Gram matrix's diagonal


@dataclass(frozen=True)
class Hints(FeatureLoss):
    """``mean((A·h_student − h_teacher)²) / var(h_teacher)`` at each pair of points, A a linear map of the channels.

    Attributes:
        weight: factor of the loss.
        fit: of A: "learned", trained beside the student from the identity where widths are equal, else from random orthogonal rows;
            "least_squares", fixed after a fit to the first examples.

    Source:
        Romero et al. 2015, "FitNets: Hints for thin deep nets", equation 3; for transformers Jiao et al. 2020, "TinyBERT", equation 8.

    Differs:
        The error is relative to the variance of the teacher's values, so that points of other scales weigh the same.
    """

    name: ClassVar[str] = "hints"
    weight: float = 1.0
    fit: str = "learned"

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"Hints: fit={self.fit!r}; {' or '.join(FITS)} is possible")

    def on(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> FeatureTerm:
        maps = []
        for ours, theirs in zip(student, teacher, strict=True):
            a, b = (channels_last(x.float()) for x in of_same_size(ours, theirs))
            layer = nn.Linear(a.shape[-1], b.shape[-1], bias=self.fit == "least_squares")
            with torch.no_grad():
                if self.fit == "least_squares":
                    _fit(layer, a.flatten(0, 1), b.flatten(0, 1))
                elif a.shape[-1] == b.shape[-1]:
                    layer.weight.copy_(torch.eye(a.shape[-1]))
                else:
                    nn.init.orthogonal_(layer.weight)
            layer.requires_grad_(self.fit == "learned")
            maps.append(layer.to(ours.device))
        return Projected(maps, relative_error, self.weight)


def _fit(layer: nn.Linear, x: Tensor, y: Tensor) -> None:
    """Least squares of y (rows, outputs) by x (rows, inputs), damped, in place."""
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    gram = (x - mean_x).T @ (x - mean_x)
    gram += (
        DAMPING * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    )
    weight = torch.linalg.solve(gram, (x - mean_x).T @ (y - mean_y)).T
    layer.weight.copy_(weight)
    layer.bias.copy_(mean_y - weight @ mean_x)
