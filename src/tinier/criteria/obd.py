"""Optimal brain damage: the weights with little curvature behind them leave first."""

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
class OBD(Criterion):
    """The second-order change of the loss when weights become zero, with a diagonal Hessian.

    sᵢ = ½ Σ_{w of channel i} h_w w², h_w = E (∂L/∂w)² over examples: the diagonal of the Fisher information, empirical with labels and true
    without (see ``observe``). Suits ranking within a group, and
    across groups once divided by the mean of each: a loss of one channel at a time does not foresee that of many.

    Source:
        LeCun et al. 1990, "Optimal brain damage", equation 5.

    Differs:
        The Fisher diagonal in place of the Hessian's: never negative, and equal to it in expectation where the network has learned
        the distribution of the labels.
    """

    name: ClassVar[str] = "obd"
    needs: ClassVar[frozenset[str]] = frozenset({"squares"})
    weight_needs: ClassVar[frozenset[str]] = frozenset({"squares"})

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``. Cost: one run of the network, and one backward, for each example alone."""
        statistics = observed(self, statistics, groups)
        known = parameters(network)
        result = {}
        for group in groups:
            result[group.name] = torch.zeros(group.size, dtype=torch.float64)
            for slot in group.slots:
                if slot.parameter in known:
                    weight = known[slot.parameter].double().cpu()
                    change = 0.5 * statistics.squares[slot.parameter] * weight.square()
                    result[group.name] += per_channel(change, slot, group.size)
        return result

    def weights(
        self, network: Network, names: Collection[str], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """½ h w²."""
        statistics = observed_weights(self, statistics)
        known = chosen(network, names)
        missing = [name for name in names if name not in statistics.squares]
        if missing:
            raise RefusedError(f"{missing[0]}: the statistics have no gradient of it")
        return {
            name: 0.5 * statistics.squares[name] * weight.double().cpu().square()
            for name, weight in known.items()
        }
