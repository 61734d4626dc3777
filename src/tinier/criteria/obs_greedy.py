"""Optimal brain surgeon, greedy: one channel leaves after the other, each scored with those before it gone."""

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
class OBSGreedy(Criterion):
    """The error of removing channels one by one, the cheapest first, each after the best compensation of those before.

    In each round every channel that is left scores as in ``OBS``; the lowest leaves, W becomes W − W_S ([H⁻¹]_SS)⁻¹ [H⁻¹]_S:
    and H⁻¹ becomes H⁻¹ − [H⁻¹]_:S ([H⁻¹]_SS)⁻¹ [H⁻¹]_S:. Its score is the error that it adds, or that of the one before if that is larger.
    Two equal channels score differently: the first is free, the second is not. Suits ranking within a group, and across groups once
    divided by the mean of each, where compensation follows.

    Attributes:
        ridge: λ as a share of the mean of the diagonal of G.

    Source:
        Kurtic et al. 2023, "ZipLM: inference-aware structured pruning of language models", algorithm 1.

    Differs:
        Over all layers that read the group at once; the covariance in place of the second moments; errors are shares of the variance
        of the output.
    """

    name: ClassVar[str] = "obs_greedy"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    ridge: float = 1e-2

    def __post_init__(self) -> None:
        if not is_number(self.ridge) or not self.ridge > 0:
            raise InputError(
                f"obs_greedy: ridge={self.ridge!r}; a number above 0 is needed, such as 0.01"
            )

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``. Cost: as ``OBS``, and for each channel n · (n + outputs) · s multiply-adds, s its columns."""
        statistics = observed(self, statistics, groups)
        known, layers = parameters(network), layers_by_node(network.traced)
        result = {}
        for group in groups:
            if not any(use.layer for use in statistics.uses[group.name]):
                continue
            own = blocks(group, layers, known, statistics, self.ridge)
            scores, last = torch.zeros(group.size, dtype=torch.float64), 0.0
            left = torch.ones(group.size, dtype=torch.bool)
            for _ in range(group.size):
                total = torch.zeros(group.size, dtype=torch.float64)
                for block in own:
                    total += block.errors(group.size)
                channel = int(torch.where(left, total, torch.inf).argmin())
                # Strictly rising, so that the order of removal is the order of the scores.
                last = max(float(total[channel]), last * (1 + 1e-9) + 1e-30)
                scores[channel], left[channel] = last, False
                for block in own:
                    block.remove(channel)
            result[group.name] = scores
        return found(self, network, result, "no linear layer or convolution reads one")
