"""Batch-norm scale: the channels that their batch norm turns down leave first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from tinier.criteria.base import Criterion, found, parameters, per_channel
from tinier.graph.groups import Group
from tinier.graph.rules import argument, operator_name
from tinier.network import Network
from tinier.statistics import Statistics


@dataclass(frozen=True)
class BatchNormScale(Criterion):
    """The magnitude of the scale that batch norms give a channel.

    sᵢ = mean |γᵢ| over the batch norms of the group. Groups without a batch norm stay whole. After training with an L1 penalty on γ
    (without one, γ says little) it suits ranking within a group, and across groups.

    Source:
        Liu et al. 2017, "Learning efficient convolutional networks through network slimming", section 3.

    Differs:
        A mean over the batch norms of coupled layers, which the paper leaves to a channel selection layer. The ranking across
        groups divides by their means, for batch norms in front of an addition have other scales than those in front of ReLU.
    """

    name: ClassVar[str] = "batch_norm_scale"

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``; needs no statistics."""
        known, scales = parameters(network), _scales(network)
        result = {}
        for group in groups:
            own = [slot for slot in group.slots if slot.parameter in scales]
            if own:
                each = [per_channel(known[s.parameter].abs(), s, group.size) for s in own]
                counts = [per_channel(known[s.parameter].abs() * 0 + 1, s, group.size) for s in own]
                result[group.name] = torch.stack(each).sum(0) / torch.stack(counts).sum(0)
        return found(self, network, result, "none has a batch norm with a scale")


def _scales(network: Network) -> set[str]:
    """Names of the parameters that scale a batch norm."""
    result = set()
    for node in network.traced.module.graph.nodes:
        if node.op == "call_function" and "batch_norm" in operator_name(node):
            weight = argument(node, 1, "weight")
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                result.add(str(weight.target))
    return result
