"""LAMP: layer-adaptive magnitude, which ranks channels of all layers against each other."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.criteria.base import (
    SMALLEST,
    Criterion,
    chosen,
    parameters,
    per_channel,
    relative,
    slots_of,
)
from tinier.graph.groups import Group
from tinier.network import Network
from tinier.statistics import Statistics


@dataclass(frozen=True)
class LAMP(Criterion):
    """The share of a channel in the squared norm of all channels of its group that are not smaller.

    sᵢ = vᵢ / Σ_{j: vⱼ ≥ vᵢ} vⱼ, vᵢ = Σₖ Σ_{w of channel i in slot k} w² / meanⱼ of the same: the largest of each group has score 1, so that
    no group vanishes. Suits ranking across groups; within a group the order is that of ``Magnitude``.

    Source:
        Lee et al. 2021, "Layer-adaptive sparsity for the magnitude-based pruning", equation 4.

    Differs:
        For channels, on their squared norms over the group. Equal norms get equal scores, where the paper orders them by index.
    """

    name: ClassVar[str] = "lamp"
    comparable: ClassVar[bool] = True

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``; needs no statistics. Cost: one pass over the weights and a sort."""
        known = parameters(network)
        result = {}
        for group in groups:
            total = torch.zeros(group.size, dtype=torch.float64)
            for slot, weight in slots_of(group, known):
                total += relative(per_channel(weight.double().square(), slot, group.size))
            result[group.name] = lamp(total)
        return result

    def weights(
        self, network: Network, names: Collection[str], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """w² / Σ v² over the weights v of the parameter with |v| ≥ |w|."""
        return {n: lamp(w.double().square()) for n, w in chosen(network, names).items()}


def lamp(squares: Tensor) -> Tensor:
    """v / Σ of all that are not smaller, up to rounding; of any shape, float64."""
    flat = squares.flatten()
    ascending = flat.sort().values
    from_here = ascending.flip(0).cumsum(0).flip(0)
    first = torch.searchsorted(ascending, flat * (1 - 1e-9)).clamp(max=max(len(flat) - 1, 0))
    return (flat / from_here[first].clamp(min=SMALLEST)).view(squares.shape)
