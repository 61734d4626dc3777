"""Contrastive distillation: a student's feature is nearer to the teacher's of the same example than to those of the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinier.recovery.base import FeatureLoss, FeatureTerm
from tinier.recovery.features import pooled


@dataclass(frozen=True)
class Contrastive(FeatureLoss):
    """``−log softmax_j(⟨f(s_i), g(t_j)⟩ / τ)[i]``, both ways, f and g learned linear maps to the unit sphere.

    Its least value is not 0 but about ``log(1 + (n − 1)·e^{−2/τ})`` for n examples.

    Attributes:
        weight: factor of the loss.
        temperature: τ, above 0.
        width: of the sphere.

    Source:
        Tian et al. 2020, "Contrastive representation distillation", equation 14; within a batch as InfoNCE (van den Oord et al. 2018).

    Differs:
        The others are those of the batch, not of a memory of all examples, which needs no labels and no memory.
    """

    name: ClassVar[str] = "contrastive"
    weight: float = 1.0
    temperature: float = 0.1
    width: int = 128

    def __post_init__(self) -> None:
        if not self.temperature > 0 or self.width < 1:
            raise ValueError(
                f"Contrastive: temperature {self.temperature} and width {self.width}; both must be above 0"
            )

    def on(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> FeatureTerm:
        return _Term(
            self, [pooled(x).shape[1] for x in student], [pooled(x).shape[1] for x in teacher]
        )


class _Term(FeatureTerm):
    def __init__(self, settings: Contrastive, ours: Sequence[int], theirs: Sequence[int]) -> None:
        super().__init__()
        self.settings = settings
        self.ours = nn.ModuleList(nn.Linear(size, settings.width) for size in ours)
        self.theirs = nn.ModuleList(nn.Linear(size, settings.width) for size in theirs)

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor | None
    ) -> Tensor:
        terms = []
        for a, b, f, g in zip(student, teacher, self.ours, self.theirs, strict=True):
            one = F.normalize(f(pooled(a).float()), dim=1)
            two = F.normalize(g(pooled(b.detach()).float()), dim=1)
            scores = one @ two.T / self.settings.temperature  # (batch, batch)
            right = torch.arange(len(scores), device=scores.device)
            terms.append((F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2)
        return self.settings.weight * torch.stack(terms).mean()
