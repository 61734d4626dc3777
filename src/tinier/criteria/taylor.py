"""Taylor: the channels whose removal changes the loss least, to first order, leave first."""

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
)
from tinier.errors import RefusedError
from tinier.graph.groups import Group
from tinier.network import Network
from tinier.statistics import Statistics


@dataclass(frozen=True)
class Taylor(Criterion):
    """The squared first-order change of the loss when the weights of a channel become zero.

    sᵢ = (Σ_{w of channel i} w · ∂L/∂w)², over all parameters of the group, biases too; L is the mean loss of the data. Suits ranking within
    a group, and across groups once divided by the mean of each: a loss of one channel at a time does not foresee that of many.

    Source:
        Molchanov et al. 2019, "Importance estimation for neural network pruning", equations 7 and 8.

    Differs:
        The gradient is of all data at once, where the paper squares that of each minibatch and so depends on their size. On the data that
        a network was trained on to the end it is near 0: then prefer ``TaylorActivation`` or ``Fisher``, which look at each example.
    """

    name: ClassVar[str] = "taylor"
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
            total = torch.zeros(group.size, dtype=torch.float64)
            for slot in group.slots:
                if slot.parameter in known:
                    change = (
                        known[slot.parameter].double().cpu() * statistics.gradients[slot.parameter]
                    )
                    total += per_channel(change, slot, group.size)
            result[group.name] = total.square()
        return result

    def weights(
        self, network: Network, names: Collection[str], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """(w · ∂L/∂w)²."""
        statistics = observed_weights(self, statistics)
        known = chosen(network, names)
        missing = [name for name in names if name not in statistics.gradients]
        if missing:
            raise RefusedError(f"{missing[0]}: the statistics have no gradient of it")
        return {
            name: (weight.double().cpu() * statistics.gradients[name]).square()
            for name, weight in known.items()
        }
