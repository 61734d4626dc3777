"""Zeros: the channels that are mostly zero leave first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.criteria.base import Criterion, by_channel, found, observed
from tinier.graph.groups import Group
from tinier.network import Network
from tinier.statistics import Statistics


@dataclass(frozen=True)
class Zeros(Criterion):
    """How often a channel's activations are not zero where operators read it.

    sᵢ = 1 − APoZᵢ, APoZᵢ = share of exact zeros among all values of channel i, in [0, 1]. It says something behind ReLU only: behind smooth
    activation functions all scores are 1. Suits ranking within a group, and across groups once divided by the mean of each.

    Source:
        Hu et al. 2016, "Network trimming", equation 1.

    Differs:
        Measured where the channel is read, behind pooling and normalisation, over all places of a group.
    """

    name: ClassVar[str] = "apoz"
    needs: ClassVar[frozenset[str]] = frozenset({"activations"})

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``. Cost: one run of the network over the data."""
        statistics = observed(self, statistics, groups)
        result = {}
        for group in groups:
            zeros = values = torch.zeros(group.size, dtype=torch.float64)
            for read, index in {u.read: u.index for u in statistics.uses[group.name]}.items():
                moments = statistics.moments[read]
                zeros = zeros + by_channel(moments.zeros, index, group.size)
                counts = torch.full((len(index),), float(moments.count))
                values = values + by_channel(counts, index, group.size)
            if bool(values.any()):
                result[group.name] = (1 - zeros / values).clamp(min=0)
        return found(self, network, result, "no operator of the graph reads one")
