"""Distillation of where a network looks: match the energy of the features over the places of an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from tinier.errors import RefusedError
from tinier.recovery.base import FeatureLoss, FeatureTerm
from tinier.recovery.features import OverPoints, channels_last, of_same_size


@dataclass(frozen=True)
class AttentionTransfer(FeatureLoss):
    """``‖ Q_s/‖Q_s‖ − Q_t/‖Q_t‖ ‖²``, Q the mean over the channels of the squared features at each place; widths may differ.

    Attributes:
        weight: factor of the loss.

    Source:
        Zagoruyko and Komodakis 2017, "Paying more attention to attention", equation 2, with p = 2 and squared.
    """

    name: ClassVar[str] = "attention_transfer"
    weight: float = 1.0

    def on(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> FeatureTerm:
        for ours, theirs in zip(student, teacher, strict=True):
            if ours.ndim < 3:
                raise RefusedError(
                    f"attention_transfer: features of shape {tuple(ours.shape)} have no places; pair layers before they are averaged"
                )
            of_same_size(ours, theirs)
        return OverPoints(_distance, self.weight)


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    a, b = (
        F.normalize(channels_last(x).square().mean(2), dim=1)
        for x in of_same_size(student, teacher)
    )
    return (a - b).square().sum(1).mean()
