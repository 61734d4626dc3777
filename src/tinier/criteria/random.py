"""Random: the control that every criterion has to beat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.criteria.base import Criterion
from tinier.graph.groups import Group
from tinier.network import Network
from tinier.statistics import Statistics


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform scores.

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
