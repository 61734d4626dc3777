"""Wanda: weights count as much as what they are multiplied with."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tinier.criteria.base import (
    Criterion,
    by_channel,
    chosen,
    found,
    observed,
    observed_weights,
    parameters,
    relative,
)
from tinier.errors import InputError, RefusedError
from tinier.graph.groups import Group, channel_groups
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.statistics.places import by_column, layers_by_node, reading_places


@dataclass(frozen=True)
class Wanda(Criterion):
    """The magnitude of the weights behind a channel times the norm of its activations.

    For weights, s = |W_{o,c}| ‖x_c‖₂, x_c the input c over all rows of the data. For channels sᵢ = Σ over the linear layers and
    convolutions that read channel i, of Σ_{o, c of i} |W_{o,c}| ‖x_c‖₂, each layer divided by its mean. Suits ranking within a group,
    as in the paper, and across groups once divided by the mean of each.

    Source:
        Sun et al. 2024, "A simple and effective pruning approach for large language models", equation 1.

    Differs:
        Summed over weights for channels. In convolutions, a norm is that of the whole input channel, whatever the kernel position.
    """

    name: ClassVar[str] = "wanda"
    needs: ClassVar[frozenset[str]] = frozenset({"activations"})
    weight_needs: ClassVar[frozenset[str]] = frozenset({"activations"})

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``. Cost: one run of the network over the data."""
        statistics = observed(self, statistics, groups)
        known, layers = parameters(network), layers_by_node(network.traced)
        result: dict[str, Tensor] = {}
        for group in groups:
            uses = [use for use in statistics.uses[group.name] if use.layer]
            for use in uses:
                layer = layers[use.node]
                matrix = layer.matrix(known[layer.weight]).double().cpu()
                norms = statistics.moments[use.read].squares.sqrt()
                columns = matrix.abs().sum(1) * by_column(layer, norms, matrix.shape[2])
                index = by_column(layer, use.index, matrix.shape[2])
                score = relative(by_channel(columns.flatten(), index.flatten(), group.size))
                result[group.name] = result.get(group.name, 0) + score
        return found(self, network, result, "no linear layer or convolution reads one")

    def weights(
        self, network: Network, names: Collection[str], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """|W| ‖x‖₂; a weight that several layers share gets the sum."""
        statistics = observed_weights(self, statistics)
        result: dict[str, Tensor] = {}
        known = chosen(network, names)
        for place in reading_places(network.traced, channel_groups(network.traced)):
            if place.layer is None or place.layer.weight not in known:
                continue
            weight = known[place.layer.weight]
            matrix = place.layer.matrix(weight).double().cpu()
            if place.read not in statistics.moments:
                raise InputError(f"{place.layer.weight}: the statistics are of another network")
            norms = statistics.moments[place.read].squares.sqrt()
            scores = matrix.abs() * by_column(place.layer, norms, matrix.shape[2])[:, None]
            own = place.layer.parameter(scores, weight.shape)
            result[place.layer.weight] = result.get(place.layer.weight, 0) + own
        for name in names:
            if name not in result:
                raise RefusedError(
                    f"{name}: wanda needs the input of a linear layer or convolution; no such layer has this weight: exclude it"
                )
        return {name: result[name] for name in names}
