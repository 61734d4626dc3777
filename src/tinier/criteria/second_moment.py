"""Second moment: the channels whose activations have little energy leave first."""

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
class SecondMoment(Criterion):
    """The mean square of a channel's activations where operators read it.

    sᵢ = meanₖ (E a²_{k,i} / meanⱼ E a²_{k,j}), over the places k where the group is read. Suits ranking within a group, and across groups
    once divided by the mean of each.

    Source:
        The diagonal of the matrix of second moments of Luo et al. 2017, "ThiNet", and He et al. 2017, "Channel pruning for
        accelerating very deep neural networks", without the weights behind it.

    Differs:
        Both solve for a subset; this is the energy alone. ``Wanda`` adds the weights, ``OBS`` the rest of the matrix.
    """

    name: ClassVar[str] = "second_moment"
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
                    relative(by_channel(statistics.moments[read].squares, index, group.size))
                    for read, index in reads.items()
                ) / torch.tensor(len(reads), dtype=torch.float64)
        return found(self, network, result, "no operator of the graph reads one")
