"""Distillation between distributions of next tokens: the generalised Jensen–Shannon divergence."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.recovery.base import Loss


@dataclass(frozen=True)
class JensenShannon(Loss):
    """``β · KL(p ‖ m) + (1 − β) · KL(q ‖ m)``, m = β·p + (1 − β)·q, p the teacher's and q the student's, a mean over the tokens.

    Small β behaves as KL(p ‖ q), which covers all that the teacher says; large β as KL(q ‖ p), which keeps to what it says most.

    Attributes:
        beta: in (0, 1).
        temperature: T of both, above 0.
        weight: factor of the loss.
        output: which output of the network holds the logits.
        dim: their dimension of classes or tokens.

    Source:
        Agarwal et al. 2024, "On-policy distillation of language models" (GKD), equation 2.
    """

    name: ClassVar[str] = "jensen_shannon"
    beta: float = 0.5
    temperature: float = 1.0
    weight: float = 1.0
    output: int = 0
    dim: int = -1

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1 or not self.temperature > 0:
            raise ValueError(
                f"JensenShannon: beta {self.beta} and temperature {self.temperature}; beta in (0, 1) and a temperature above 0 are needed"
            )

    def __call__(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], labels: Tensor | None
    ) -> Tensor:
        log_p, log_q = (
            F.log_softmax(side[self.output].float() / self.temperature, self.dim)
            for side in (teacher, student)
        )
        parts = torch.stack([log_p + math.log(self.beta), log_q + math.log(1 - self.beta)])
        log_m = parts.logsumexp(0)
        first = torch.sum(log_p.exp() * (log_p - log_m), self.dim).mean()
        second = torch.sum(log_q.exp() * (log_q - log_m), self.dim).mean()
        return self.weight * self.temperature**2 * (self.beta * first + (1 - self.beta) * second)
