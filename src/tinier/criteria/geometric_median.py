"""Geometric median: the channels that others can stand in for leave first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.criteria.base import SMALLEST, Criterion, parameters, rows, slots_of
from tinier.graph.groups import Group
from tinier.network import Network
from tinier.statistics import Statistics


@dataclass(frozen=True)
class GeometricMedian(Criterion):
    """How far the weights of a channel are from those of all others of its group.

    sᵢ = Σⱼ ‖Fᵢ − Fⱼ‖₂, F all weights of a channel in the slots of its group: the lowest is nearest to the geometric median, and
    most replaceable. Suits ranking within a group, and across groups once divided by the mean of each.

    Source:
        He et al. 2019, "Filter pruning via geometric median for deep neural networks acceleration", equation 7.

    Differs:
        Over the whole group, consumers too, each slot divided by its mean norm; vectors of one number (norms, biases) do not count.
    """

    name: ClassVar[str] = "geometric_median"

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``; needs no statistics. Cost: size² multiply-adds for each weight of a channel."""
        known = parameters(network)
        result = {}
        for group in groups:
            slots = list(slots_of(group, known))
            wide = [(slot, weight) for slot, weight in slots if weight.ndim > 1] or slots
            distances = torch.zeros(group.size, group.size, dtype=torch.float64)
            for slot, weight in wide:
                values = rows(weight, slot, group.size)
                squares = values.square().sum(1)
                scale = squares.mean().clamp(min=SMALLEST)
                between = squares[:, None] + squares[None] - 2 * values @ values.mT
                # Below the rounding of the products, two channels are the same.
                distances += torch.where(between > 1e-12 * scale, between, 0) / scale
            result[group.name] = distances.sqrt().sum(1)
        return result
