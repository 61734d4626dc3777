"""Distillation for classifiers: match the original's softened class probabilities."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.recovery.base import Loss


@dataclass(frozen=True)
class SoftTargets(Loss):
    """``T² · KL(softmax(z_teacher / T) ‖ softmax(z_student / T))``, a mean over everything but the classes.

    The factor T² keeps the gradient's size when T changes: as T → ∞ the loss tends to ``var(z_student − z_teacher) / 2``,
    the variance being over the classes.

    Attributes:
        temperature: T, above 0; larger values give the unlikely classes more say.
        weight: factor of the loss.
        output: which output of the network holds the logits.
        dim: their dimension of classes.

    Source:
        Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network", section 2.
    """

    name: ClassVar[str] = "soft_targets"
    temperature: float = 4.0
    weight: float = 1.0
    output: int = 0
    dim: int = -1

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"SoftTargets: temperature {self.temperature}; it must be above 0")

    def __call__(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], labels: Tensor | None
    ) -> Tensor:
        log_p = F.log_softmax(teacher[self.output].float() / self.temperature, self.dim)
        log_q = F.log_softmax(student[self.output].float() / self.temperature, self.dim)
        divergence = torch.sum(log_p.exp() * (log_p - log_q), self.dim).mean()
        return self.weight * self.temperature**2 * divergence
