"""Distillation for any output that is a number: match the original's outputs themselves."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.recovery.base import Loss


@dataclass(frozen=True)
class OutputMSE(Loss):
    """``mean((y_student − y_teacher)²) / var(y_teacher)``, a mean over the outputs that are floats.

    Dividing by the variance of the batch makes outputs of different scales weigh the same: 1 is as good as a constant.

    Attributes:
        weight: factor of the loss.
    """

    name: ClassVar[str] = "output_mse"
    weight: float = 1.0

    def __call__(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], labels: Tensor | None
    ) -> Tensor:
        errors = [
            torch.mean((ours.float() - theirs.float()) ** 2)
            / theirs.float().var(correction=0).clamp_min(1e-8)
            for ours, theirs in zip(student, teacher, strict=True)
            if ours.is_floating_point()
        ]
        if not errors:
            raise ValueError("OutputMSE: no output of the network is a float")
        return self.weight * torch.stack(errors).mean()
