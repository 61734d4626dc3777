"""Distillation of order: match the correlations of the class probabilities, not their values."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.recovery.base import Loss


@dataclass(frozen=True)
class Correlation(Loss):
    """``T² · (β · (1 − ρ over the classes) + γ · (1 − ρ over the batch))``, ρ Pearson's correlation of softened probabilities.

    Attributes:
        beta: factor of the relation between classes, of each example.
        gamma: factor of the relation between examples, of each class.
        temperature: T, above 0.
        weight: factor of the loss.
        output: which output of the network holds the logits.
        dim: their dimension of classes.

    Source:
        Huang et al. 2022, "Knowledge distillation from a stronger teacher" (DIST), equations 8 to 10.
    """

    name: ClassVar[str] = "correlation"
    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = 4.0
    weight: float = 1.0
    output: int = 0
    dim: int = -1

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"Correlation: temperature {self.temperature}; it must be above 0")

    def __call__(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], labels: Tensor | None
    ) -> Tensor:
        p, q = (
            (side[self.output].float() / self.temperature).softmax(self.dim).movedim(self.dim, -1)
            for side in (teacher, student)
        )
        p, q = p.flatten(0, -2), q.flatten(0, -2)  # (examples and places, classes)
        between_classes = (1 - _pearson(p, q)).mean()
        between_examples = (1 - _pearson(p.T, q.T)).mean()
        found = self.beta * between_classes + self.gamma * between_examples
        return self.weight * self.temperature**2 * found


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """(rows,) correlations of the rows; 1 where both are constant."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    norms = a.norm(dim=1) * b.norm(dim=1)
    flat = (a.norm(dim=1) < 1e-8) & (b.norm(dim=1) < 1e-8)
    return torch.where(flat, 1.0, (a * b).sum(1) / norms.clamp_min(1e-8))
