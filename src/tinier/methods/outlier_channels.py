"""Outlier channels: inputs of linear layers whose range ruins the integers of all others are multiplied in float."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from tinier.edits.base import Plan
from tinier.edits.outliers import PRODUCTS, SplitOutliers
from tinier.errors import InputError
from tinier.graph.dynamic import round_dynamically, round_tokens
from tinier.graph.fold import fold, read
from tinier.graph.layers import Layer, linear_layer
from tinier.graph.walk import Walk
from tinier.methods.base import Method
from tinier.methods.sampled import samples_of
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.tensors.affine import Integers, asymmetric, fake_quantize
from tinier.tensors.grid import choose
from tinier.tensors.histogram import Histogram
from tinier.tensors.ranges import activation_range

MOST = 64  # examples
ROWS = 1024  # of a layer's input, from each half of the examples
NEAR = 1.1  # times the least error: fewer channels are worth so much


@dataclass(frozen=True)
class OutlierChannels(Method):
    """Split off the input channels with the largest values, as many as pay by the error of the layers that read them.

    Attributes:
        bits: of weights.
        activations: bits of activations; None for ranges of each run.
        per_token: ranges of each run are those of each row.
        symmetric_activations: zero points of activations are 0.
        ranges: of activations, a rule of `tinier.tensors.ranges.RULES`.
        weight_ranges: "minmax", "percentile" or "mse".
        per_tensor: one scale for all channels of a weight.
        share: of the channels that may be split off, in (0, 1).
        least_gain: part of the squared error of the layers that read the channels that must go away.
        exclude: weights that stay float: what only they read is not split.

    Source:
        Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", section 3.2.

    Differs:
        The channels are chosen once, and their number by the error of the layers' results on half of the examples, which must fall on the
        other half, too; not those above a threshold of 6.0 at each run.
    """

    name: ClassVar[str] = "outlier_channels"

    bits: int = 8
    activations: int | None = 8
    per_token: bool = False
    symmetric_activations: bool = False
    ranges: str = "mse"
    weight_ranges: str = "mse"
    per_tensor: bool = False
    share: float = 0.05
    least_gain: float = 0.15
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InputError(f"share={self.share}: a part of the channels in (0, 1) is needed")

    def plan(self, network: Network, statistics: Statistics | None = None) -> Plan:
        """Choose the channels.

        Args:
            network: a float network, folded or not; left as it is.
            statistics: with ``samples`` of inputs.

        Returns:
            `SplitOutliers` edits; none where nothing gains.

        Raises:
            InputError: samples are missing.

        Cost:
            A run of the network; for each value that linear layers read, its layers on 2 · 1024 rows for each of about log₂ (share · n)
            numbers of channels.
        """
        data = samples_of(network, statistics, MOST, "splitting outliers")
        module = fold(network.traced.module)
        layers: dict[fx.Node, list[Layer]] = {}
        for node in module.graph.nodes:
            layer = self._splits(module, node)
            if layer is not None:
                layers.setdefault(layer.source, []).append(layer)
        edits = []
        walk = Walk(module, data)
        while walk.next() is not None:
            node = walk.step()
            if node in layers:
                halves = _halves([values[node] for values in walk.values])
                tensors = {one.weight: _value(module, one.weight) for one in layers[node]}
                channels = self._channels(halves, layers[node], tensors)
                if channels:
                    names = tuple(one.weight for one in layers[node])
                    edits.append(SplitOutliers(node.name, channels, names))
        return Plan(tuple(edits))

    def _splits(self, module: fx.GraphModule, node: fx.Node) -> Layer | None:
        """A linear layer whose weight nothing else reads and that is quantized."""
        layer = linear_layer(node) if node.target in PRODUCTS else None
        if layer is None or layer.weight in self.exclude:
            return None
        places = [n for n in module.graph.find_nodes(op="get_attr") if n.target == layer.weight]
        weight = read(module, layer.weight)
        alone = sum(len(place.users) for place in places) == 1
        return layer if alone and weight is not None and weight.dtype == torch.float32 else None

    def _channels(
        self,
        halves: tuple[Tensor, Tensor],
        layers: Sequence[Layer],
        tensors: Mapping[str, Tensor],
    ) -> tuple[int, ...]:
        """The channels that pay; none where none do."""
        largest = torch.cat(halves).abs().amax(0)  # (n,)
        order = largest.argsort(descending=True)
        most = int(self.share * len(order))
        counts = [2**power for power in range(most.bit_length())] if most else []
        weights = [layer.matrix(tensors[layer.weight])[0] for layer in layers]  # (m, n) each
        errors = {k: self._error(halves[0], weights, order[:k]) for k in (0, *counts)}
        least = min(errors.values())
        count = next(k for k in errors if errors[k] <= NEAR * least)
        limit = 1 - self.least_gain
        if not count or errors[count] > limit * errors[0]:
            return ()
        before, after = (self._error(halves[1], weights, order[:k]) for k in (0, count))
        return tuple(sorted(order[:count].tolist())) if after <= limit * before else ()

    def _error(self, x: Tensor, weights: Sequence[Tensor], outliers: Tensor) -> float:
        """Σ over the layers of ‖y − ŷ‖² / ‖y‖²; x is (rows, n)."""
        rest = x.clone()
        rest[:, outliers] = 0
        rounded = self._rounded(rest)
        total = 0.0
        for weight in weights:
            inner = weight.clone()
            inner[:, outliers] = 0
            grid = choose(
                inner,
                Integers.signed(self.bits),
                rule=self.weight_ranges,
                per_tensor=self.per_tensor,
            )
            y = x @ weight.mT
            z = rounded @ grid.nearest(inner).mT + x[:, outliers] @ weight[:, outliers].mT
            power = float(y.square().sum())
            total += float((y - z).square().sum()) / power if power else 0.0
        return total

    def _rounded(self, x: Tensor) -> Tensor:
        if self.activations is None:
            found: Tensor = (round_tokens if self.per_token else round_dynamically)(x)
            return found
        signs, bits = self.symmetric_activations, self.activations
        integers = Integers.unsigned(bits)
        if signs:
            integers = Integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        histogram = Histogram()
        histogram.add(x)
        low, high = activation_range(histogram, integers, self.ranges, symmetric=signs)
        scale, zero_point = asymmetric(torch.tensor(low), torch.tensor(high), integers)
        return fake_quantize(x, scale, zero_point, integers)


def _value(module: fx.GraphModule, name: str) -> Tensor:
    value = read(module, name)
    assert value is not None
    return value.detach()


def _halves(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(rows, n) of every other example."""
    result = []
    for half in (0, 1):
        parts = [value[half::2] if len(value) > 1 else value for value in values]
        rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        result.append(rows[:: -(-len(rows) // ROWS)])
    return result[0], result[1]
