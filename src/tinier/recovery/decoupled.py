"""Decoupled distillation: what the teacher says of the right class, and of the others among themselves, weigh apart."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.recovery.base import Loss


@dataclass(frozen=True)
class Decoupled(Loss):
    """``T² · (α · KL(b_t ‖ b_s) + β · KL(p̂_t ‖ p̂_s))``: b is (p_target, 1 − p_target), p̂ the softmax over the other classes.

    With β = 1 − b_t[target], of each example, and α = 1 it is `SoftTargets`. The target is the teacher's first class: no labels are needed.

    Attributes:
        alpha: factor of the target's part.
        beta: factor of the others' part.
        temperature: T, above 0.
        weight: factor of the loss.
        output: which output of the network holds the logits.
        dim: their dimension of classes, of which there must be 3 or more.

    Source:
        Zhao et al. 2022, "Decoupled knowledge distillation", equation 7.

    Differs:
        The target is what the teacher says, not the label.
    """

    name: ClassVar[str] = "decoupled"
    alpha: float = 1.0
    beta: float = 2.0
    temperature: float = 4.0
    weight: float = 1.0
    output: int = 0
    dim: int = -1

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"Decoupled: temperature {self.temperature}; it must be above 0")

    def __call__(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], labels: Tensor | None
    ) -> Tensor:
        ours, theirs = (
            side[self.output].float().movedim(self.dim, -1) / self.temperature
            for side in (student, teacher)
        )
        target = theirs.argmax(-1, keepdim=True)
        binary = _kl(_binary(theirs, target), _binary(ours, target))
        among = _kl(_others(theirs, target), _others(ours, target))
        return self.weight * self.temperature**2 * (self.alpha * binary + self.beta * among).mean()


def _binary(z: Tensor, target: Tensor) -> Tensor:
    """(…, 2) log-probabilities of the target and of all others."""
    log_p = F.log_softmax(z, -1)
    others = log_p.scatter(-1, target, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, target), others], -1)


def _others(z: Tensor, target: Tensor) -> Tensor:
    """(…, classes − 1) log-probabilities of the others among themselves."""
    kept = torch.ones_like(z, dtype=torch.bool).scatter(-1, target, False)
    return F.log_softmax(z[kept].reshape(*z.shape[:-1], -1), -1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.sum(log_p.exp() * (log_p - log_q), -1)
