"""Entropy of activations: the channels whose activations vary least leave first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.criteria.base import Criterion, by_channel, found, observed
from tinier.errors import InputError
from tinier.graph.groups import Group
from tinier.network import Network
from tinier.statistics import Statistics


@dataclass(frozen=True)
class ActivationEntropy(Criterion):
    """The entropy of a channel's mean activation over the examples.

    Hᵢ = −Σ_b p_b log p_b, p_b the share of examples whose mean of channel i over all positions falls into bin b of ``bins`` equal bins
    between its smallest and largest value; a mean over the places of the group and the positions of the channel. In nats, 0 for a channel
    that says the same of every example. The most informative are kept. Suits ranking within a group, and across groups once
    divided by the mean of each. It takes some hundred examples: of n examples no entropy is above log n.

    Attributes:
        bins: m, 2 or more.

    Source:
        Luo and Wu 2017, "An entropy-based pruning method for CNN compression", equation 1.

    Differs:
        Measured where the channel is read. Bins are joined from 512 streamed ones whose width is a power of two.
    """

    name: ClassVar[str] = "activation_entropy"
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    bins: int = 32

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise InputError(f"activation_entropy: bins={self.bins}; 2 or more are needed")

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``. Cost: one run of the network over the data; 2 kB for each channel."""
        statistics = observed(self, statistics, groups)
        result = {}
        for group in groups:
            total = count = torch.zeros(group.size, dtype=torch.float64)
            for read, index in {u.read: u.index for u in statistics.uses[group.name]}.items():
                entropy = statistics.histograms[read].entropy(self.bins)
                total = total + by_channel(entropy, index, group.size)
                count = count + by_channel(torch.ones(len(index)), index, group.size)
            if bool(count.any()):
                result[group.name] = total / count
        return found(self, network, result, "no operator of the graph reads one")
