"""Magnitude: the channels with small weights leave first."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.criteria.base import (
    Criterion,
    by_channel,
    chosen,
    parameters,
    per_channel,
    relative,
    slots_of,
)
from tinier.errors import InputError
from tinier.graph.groups import Group
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.units import is_number

CACHED = 2**18  # entries of a weight that are squared at once


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The p-norm of the weights of a channel, over every place where its group occurs.

    With v_{k,i} = Σ_{w of channel i in slot k} |w|ᵖ, sᵢ = (Σₖ v_{k,i} / meanⱼ v_{k,j})^(1/p); biases do not count, for they say
    nothing about a channel's use. Suits ranking within a group, and across groups once divided by the mean of each.

    Attributes:
        p: 1 or 2, any number above 0.

    Source:
        Li et al. 2017, "Pruning filters for efficient ConvNets", section 3.1 (p = 1, producing filter only); Fang et al. 2023,
        "DepGraph", equation 4 (over the group).

    Differs:
        Each slot is divided by its mean, so that scaling a layer up and the next one down changes nothing.
    """

    name: ClassVar[str] = "magnitude"

    p: float = 2.0

    def __post_init__(self) -> None:
        if not is_number(self.p) or not self.p > 0:
            raise InputError(f"magnitude: p={self.p!r}; a number above 0 is needed, such as 1 or 2")

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``; needs no statistics. Cost: one pass over the weights."""
        known = parameters(network)
        result = {}
        for group in groups:
            total = torch.zeros(group.size, dtype=torch.float64)
            for slot, weight in slots_of(group, known):
                if self.p == 2 and weight.dtype in (torch.float32, torch.float64):
                    found = by_channel(_squares(weight, slot.dim), slot.index(), group.size)
                else:
                    found = per_channel(weight.abs().double() ** self.p, slot, group.size)
                total += relative(found)
            result[group.name] = total ** (1 / self.p)
        return result

    def weights(
        self, network: Network, names: Collection[str], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """|w|: every p gives the same order."""
        return {n: weight.double().abs() for n, weight in chosen(network, names).items()}


def _squares(weight: Tensor, dim: int) -> Tensor:
    """Σ w² over all dimensions but one, a cache's worth at a time; (length,) float64."""
    length = weight.shape[dim]
    if dim == 0:
        return torch.linalg.vector_norm(weight.reshape(length, -1), dim=1).double().square()
    rows = weight.reshape(math.prod(weight.shape[:dim]), -1)
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=weight.device)
    for some in rows.split(max(CACHED // rows.shape[1], 1)):
        total += torch.linalg.vecdot(some, some, dim=0)
    return total.view(length, -1).sum(1)
