"""Random: the control that every criterion has to beat."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.criteria.base import Criterion, chosen
from tinier.graph.groups import Group
from tinier.network import Network
from tinier.statistics import Statistics


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform scores. Suits any ranking equally badly.

    Attributes:
        seed: of the scores.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``; needs no statistics."""
        generator = torch.Generator().manual_seed(self.seed)
        return {
            group.name: torch.rand(group.size, generator=generator, dtype=torch.float64)
            for group in groups
        }

    def weights(
        self, network: Network, names: Collection[str], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """Uniform; depends on the order of ``names``."""
        generator = torch.Generator().manual_seed(self.seed)
        return {
            name: torch.rand(weight.shape, generator=generator, dtype=torch.float64)
            for name, weight in chosen(network, names).items()
        }
