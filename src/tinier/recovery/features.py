"""What feature losses share: channels, places, projections, and terms that sum over points."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinier.errors import RefusedError
from tinier.recovery.base import FeatureTerm

SMALL = 1e-8
Distance = Callable[[Tensor, Tensor], Tensor]


def channels_last(x: Tensor) -> Tensor:
    """(batch, channels, height, width), (batch, length, channels) or (batch, channels) → (batch, places, channels)."""
    if x.ndim > 3:
        return x.flatten(2).transpose(1, 2)
    return x if x.ndim == 3 else x.flatten(1)[:, None]


def pooled(x: Tensor) -> Tensor:
    """(batch, channels): images averaged over their places, sequences over their length."""
    if x.ndim > 3:
        return x.flatten(2).mean(2)
    return x.mean(1) if x.ndim == 3 else x.flatten(1)


def of_same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Images averaged to the smaller height and width of the two; others as they are.

    Raises:
        RefusedError: the ranks differ, or the lengths of sequences do.
    """
    if student.ndim != teacher.ndim or (student.ndim == 3 and student.shape[1] != teacher.shape[1]):
        raise RefusedError(
            f"features of shapes {tuple(student.shape)} and {tuple(teacher.shape)} cannot be compared place by place; "
            "pair other layers"
        )
    if student.ndim != 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    (a, b), (c, d) = student.shape[2:], teacher.shape[2:]
    size = (min(a, c), min(b, d))
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)


class OverPoints(FeatureTerm):
    """The mean over the points of a distance between student and teacher, times a weight.

    Args:
        distance: (student's, teacher's) feature → scalar.
        weight: factor.
    """

    def __init__(self, distance: Distance, weight: float) -> None:
        super().__init__()
        self.distance, self.weight = distance, weight

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor | None
    ) -> Tensor:
        pairs = zip(student, teacher, strict=True)
        terms = [self.distance(a.float(), b.detach().float()) for a, b in pairs]
        return self.weight * torch.stack(terms).mean()


class Projected(FeatureTerm):
    """A distance at each point after the student's channels were mapped linearly to as many as the teacher's, times a weight.

    Args:
        maps: one for each point, (…, student's channels) → (…, teacher's).
        distance: of (batch, places, channels) tensors.
        weight: factor.
    """

    def __init__(self, maps: Sequence[nn.Module], distance: Distance, weight: float) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)
        self.distance, self.weight = distance, weight

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor | None
    ) -> Tensor:
        terms = []
        for ours, theirs, project in zip(student, teacher, self.maps, strict=True):
            a, b = of_same_size(ours.float(), theirs.detach().float())
            terms.append(self.distance(project(channels_last(a)), channels_last(b)))
        return self.weight * torch.stack(terms).mean()


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean((a − b)²) / var(b)``: 1 is as good as a constant."""
    return (student - teacher).square().mean() / teacher.var(correction=0).clamp_min(SMALL)
