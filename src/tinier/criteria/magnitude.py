"""Magnitude: the channels with small weights leave first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.criteria.base import Criterion, per_channel
from tinier.graph.groups import Group
from tinier.network import Network
from tinier.statistics import Statistics


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The p-norm of the weights of a channel, over every place where its group occurs.

    With v_{k,i} = Σ_{w of channel i in slot k} |w|ᵖ, sᵢ = (Σₖ v_{k,i} / meanⱼ v_{k,j})^(1/p); biases do not count, for they say
    nothing about a channel's use.

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

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``; needs no statistics."""
        weights = dict(network.traced.module.named_parameters(remove_duplicate=False))
        result = {}
        for group in groups:
            total = torch.zeros(group.size, dtype=torch.float64)
            for slot in group.slots:
                weight = weights.get(slot.parameter)
                if weight is None or slot.parameter.endswith("bias"):
                    continue
                powers = weight.detach().abs().double() ** self.p
                values = per_channel(powers, slot, group.size).cpu()
                total += values / values.mean().clamp(min=1e-30)
            result[group.name] = total ** (1 / self.p)
        return result
