"""Gradient: the channels that the loss does not move leave first."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.criteria.base import (
    Criterion,
    chosen,
    observed,
    observed_weights,
    parameters,
    per_channel,
    slots_of,
)
from tinier.errors import RefusedError
from tinier.graph.groups import Group
from tinier.network import Network
from tinier.statistics import Statistics


@dataclass(frozen=True)
class Gradient(Criterion):
    """The magnitude of the loss's gradient for the weights of a channel.

    sᵢ = Σ_{w of channel i} |∂L/∂w| over the slots of the group, L the mean loss of the data. Suits ranking within a group, and across
    groups once divided by the mean of each.

    Source:
        The sensitivity of Mozer and Smolensky 1989, "Skeletonization", taken of weights in place of a factor on the unit.

    Differs:
        It does not multiply by the weight; ``Taylor`` does.
    """

    name: ClassVar[str] = "gradient"
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    weight_needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``. Cost: one run of the network over the data, and one backward."""
        statistics = observed(self, statistics, groups)
        known = parameters(network)
        result = {}
        for group in groups:
            result[group.name] = torch.zeros(group.size, dtype=torch.float64)
            for slot, _ in slots_of(group, known):
                gradient = statistics.gradients[slot.parameter].abs()
                result[group.name] += per_channel(gradient, slot, group.size)
        return result

    def weights(
        self, network: Network, names: Collection[str], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """|∂L/∂w|."""
        statistics = observed_weights(self, statistics)
        known = chosen(network, names)
        missing = [name for name in names if name not in statistics.gradients]
        if missing:
            raise RefusedError(f"{missing[0]}: the statistics have no gradient of it")
        return {name: statistics.gradients[name].abs() for name in known}
