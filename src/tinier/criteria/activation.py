"""Activation: the channels that are quiet leave first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.criteria.base import Criterion, by_channel, found, observed, relative
from tinier.graph.groups import Group
from tinier.network import Network
from tinier.statistics import Statistics


@dataclass(frozen=True)
class Activation(Criterion):
    """The mean magnitude of a channel's activations where operators read it.

    sᵢ = meanₖ (E|a_{k,i}| / meanⱼ E|a_{k,j}|), over the places k where the group is read. Suits ranking within a group, and across groups
    once divided by the mean of each.

    Source:
        Molchanov et al. 2017, "Pruning convolutional neural networks for resource efficient inference", section 2.2, Θ_MA.

    Differs:
        The magnitude, so that activations without ReLU do not cancel; a mean over the places of a group, each divided by its mean.
    """

    name: ClassVar[str] = "activation"
    needs: ClassVar[frozenset[str]] = frozenset({"activations"})

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``. Cost: one run of the network over the data."""
        statistics = observed(self, statistics, groups)
        result = {}
        for group in groups:
            reads = {use.read: use.index for use in statistics.uses[group.name]}
            if reads:
                result[group.name] = sum(
                    relative(by_channel(statistics.moments[read].absolute, index, group.size))
                    for read, index in reads.items()
                ) / torch.tensor(len(reads), dtype=torch.float64)
        return found(self, network, result, "no operator of the graph reads one")
