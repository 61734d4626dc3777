"""Entropy of weights: the channels whose weights vary least leave first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.criteria.base import Criterion, parameters, rows, slots_of
from tinier.errors import InputError
from tinier.graph.groups import Group
from tinier.network import Network
from tinier.statistics import Statistics


@dataclass(frozen=True)
class WeightEntropy(Criterion):
    """The entropy of a channel's weights.

    Hᵢ = −Σ_b p_b log p_b, p_b the share of the weights of channel i in bin b of ``bins`` equal bins between the smallest and the largest
    weight of the whole layer; a mean over the slots of the group in weights of two dimensions or more. In nats. Suits ranking
    within a group, and across groups once divided by the mean of each: of n weights no entropy is above log n.

    Attributes:
        bins: 2 or more.

    Source:
        The measure of Luo and Wu 2017, "An entropy-based pruning method for CNN compression", equation 1, taken of weights.

    Differs:
        Bins span the layer, not the channel: a channel of small weights, all near 0, has a low entropy.
    """

    name: ClassVar[str] = "weight_entropy"

    bins: int = 32

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise InputError(f"weight_entropy: bins={self.bins}; 2 or more are needed")

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``; needs no statistics. Cost: one pass over the weights."""
        known = parameters(network)
        result = {}
        for group in groups:
            slots = list(slots_of(group, known))
            wide = [(slot, weight) for slot, weight in slots if weight.ndim > 1] or slots
            total = torch.zeros(group.size, dtype=torch.float64)
            for slot, weight in wide:
                total += _entropy(rows(weight, slot, group.size), weight, self.bins)
            result[group.name] = total / max(len(wide), 1)
        return result


def _entropy(values: Tensor, weight: Tensor, bins: int) -> Tensor:
    """(channels, entries) → (channels,) in nats."""
    low, high = float(weight.min()), float(weight.max())
    if not high > low:
        return torch.zeros(len(values), dtype=torch.float64)
    index = ((values - low) / (high - low) * bins).long().clamp(0, bins - 1)
    counts = torch.zeros(len(values), bins, dtype=torch.float64)
    counts.scatter_add_(1, index, torch.ones_like(values))
    return torch.special.entr(counts / values.shape[1]).sum(1)
