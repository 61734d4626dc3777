"""Distillation for transformers: match which tokens' hidden states are alike; widths and numbers of heads may differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.errors import RefusedError
from tinier.recovery.base import FeatureLoss, FeatureTerm
from tinier.recovery.features import OverPoints


@dataclass(frozen=True)
class HiddenRelations(FeatureLoss):
    """``KL(softmax(H_t·H_tᵀ/√d_t) ‖ softmax(H_s·H_sᵀ/√d_s))`` over the tokens of each example, in heads that the channels are cut into.

    Attributes:
        weight: factor of the loss.
        heads: into how many equal parts the channels are cut; it must divide both widths.

    Source:
        Wang et al. 2021, "MiniLMv2: Multi-head self-attention relation distillation", equations 3 and 4.

    Differs:
        Relations are those of hidden states, which every network has, not of queries, keys and values.
    """

    name: ClassVar[str] = "hidden_relations"
    weight: float = 1.0
    heads: int = 8

    def on(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> FeatureTerm:
        for ours, theirs in zip(student, teacher, strict=True):
            shapes = f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
            if ours.ndim != 3 or theirs.ndim != 3 or ours.shape[1] != theirs.shape[1]:
                raise RefusedError(
                    f"hidden_relations: features of shapes {shapes}; (batch, tokens, channels) of as many tokens are needed"
                )
            if ours.shape[2] % self.heads or theirs.shape[2] % self.heads:
                raise RefusedError(
                    f"hidden_relations: {self.heads} heads do not divide the widths of {shapes}; give another heads="
                )
        return OverPoints(self._distance, self.weight)

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_p, log_q = self._relations(teacher), self._relations(student)
        return torch.sum(log_p.exp() * (log_p - log_q), -1).mean()

    def _relations(self, x: Tensor) -> Tensor:
        """(batch, heads, tokens, tokens) logarithms of the relations."""
        parts = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return (parts @ parts.transpose(2, 3) / parts.shape[3] ** 0.5).log_softmax(-1)
