"""Optimal brain surgeon: the channels that others can stand in for leave first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.criteria.base import Criterion, found, observed, parameters
from tinier.criteria.curvature import blocks
from tinier.errors import InputError
from tinier.graph.groups import Group
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.statistics.places import layers_by_node
from tinier.units import is_number


@dataclass(frozen=True)
class OBS(Criterion):
    """The error that is left in the layers behind a channel after the best compensation by the other channels.

    sᵢ = Σ over the linear layers and convolutions that read channel i of tr(W_S ([(G + λI)⁻¹]_SS)⁻¹ W_Sᵀ) / tr(W G Wᵀ), with S the
    columns of channel i in the weight matrix W and G the covariance of its rows of input (unfolded, for convolutions): the smallest
    mean squared error of the layer's output, a share of its variance, that removing S leaves when W and the bias are fitted again.
    For the removal of one channel at a time; ``OBSGreedy`` accounts for those that left before. Suits ranking within a group, and across
    groups once divided by the mean of each, where compensation follows.

    Attributes:
        ridge: λ as a share of the mean of the diagonal of G.

    Source:
        Hassibi and Stork 1993, "Second order derivatives for network pruning: optimal brain surgeon", equation 5; over columns, Kurtic et
        al. 2023, "ZipLM", equation 2, with H = 2 XᵀX + λI, which is 2 G n up to the means.

    Differs:
        The covariance in place of the second moments, for the bias is fitted again too; divided by the variance of the output, so that
        layers compare; places that are no linear layer or convolution do not count.
    """

    name: ClassVar[str] = "obs"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    ridge: float = 1e-2

    def __post_init__(self) -> None:
        if not is_number(self.ridge) or not self.ridge > 0:
            raise InputError(f"obs: ridge={self.ridge!r}; a number above 0 is needed, such as 0.01")

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``. Cost: one run of the network over the data, Gram matrices, and n³ for each of them."""
        statistics = observed(self, statistics, groups)
        known, layers = parameters(network), layers_by_node(network.traced)
        result = {}
        for group in groups:
            if any(use.layer for use in statistics.uses[group.name]):
                total = torch.zeros(group.size, dtype=torch.float64)
                for block in blocks(group, layers, known, statistics, self.ridge):
                    total += block.errors(group.size)
                result[group.name] = total
        return found(self, network, result, "no linear layer or convolution reads one")
