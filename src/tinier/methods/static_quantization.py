"""Static quantization after training: integer weights, and activations rounded to ranges that data showed."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tinier.edits.base import Plan, Values
from tinier.edits.quantize import Quantize, QuantizeWeight, refuse_quantized
from tinier.errors import InputError, RefusedError
from tinier.graph.fold import fold, parameter_of, read
from tinier.graph.placement import ROLES, Placement, place
from tinier.methods.base import Method
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.tensors.affine import Integers, asymmetric, symmetric, within
from tinier.tensors.histogram import Histogram
from tinier.tensors.ranges import activation_range, weight_bounds
from tinier.tensors.saturation import without_saturation

Bounds = tuple[float, float]
UNBOUNDED: Bounds = (float("-inf"), float("inf"))
RULES = ("minmax", "mse")
# A bias is a 32-bit integer in units of input scale · weight scale; this leaves the sum of products a bit.
_LARGEST_BIAS = 2**30


@dataclass(frozen=True)
class StaticQuantization(Method):
    """Weights symmetric with one scale a channel, activations asymmetric with one scale a tensor.

    Attributes:
        ranges: ``"minmax"``, or ``"mse"`` for the ranges with the least squared error.
        bits: of weights and activations, 2 to 16.
        saturation_free: scale weights so that 16-bit sums of u8 × s8 kernels cannot saturate; needed on x86 CPUs without
            VNNI, and costs accuracy elsewhere.

    Source:
        Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
    """

    name: ClassVar[str] = "static_quantization"

    ranges: str = "minmax"
    bits: int = 8
    saturation_free: bool = False

    def __post_init__(self) -> None:
        if self.ranges not in RULES:
            raise InputError(f"ranges={self.ranges!r}: {' or '.join(RULES)} is needed")
        if not 2 <= self.bits <= 16:
            raise InputError(f"bits={self.bits}: 2 to 16 are possible")

    def plan(self, network: Network, statistics: Statistics | None = None) -> Plan:
        """Choose the scales.

        Args:
            network: a float network; left as it is.
            statistics: of this network, from `tinier.statistics.collect`; needed.

        Raises:
            InputError: no statistics.
            RefusedError: the network is quantized already, has nothing to quantize, or the statistics are of another.
        """
        refuse_quantized(network)
        if statistics is None:
            raise InputError("static quantization needs data: statistics=collect(network, batches)")
        module = fold(network.traced.module)
        placement = place(module)
        if not placement.weights:
            raise RefusedError(f"{network.name} has no convolution or linear layer to quantize")
        activations = self._activations(network, placement, statistics)
        return Plan((*activations, *self._weights(module, placement, activations)))

    def skipped(self, network: Network) -> list[tuple[str, str, str]]:
        """(node, operator, reason) of each operator that stays float."""
        return place(fold(network.traced.module)).skipped

    def repaired(self, network: Network) -> dict[str, tuple[int, ...]]:
        """Weight → channels that ``saturation_free`` scales down."""
        if not self.saturation_free:
            return {}
        module = fold(network.traced.module)
        found = {}
        for name, (axis, _) in place(module).weights.items():
            _, channels = self._scale(_weight(module, name), axis)
            if channels:
                found[name] = channels
        return found

    def _activations(
        self, network: Network, placement: Placement, statistics: Statistics
    ) -> list[Quantize]:
        """Values that share a scale get the range of all of them together."""
        integers = Integers.unsigned(self.bits)
        missing = [name for name in placement.values if name not in statistics.activations]
        if missing:
            raise RefusedError(
                f"{network.name}: the statistics have nothing of {missing[0]}; "
                "collect them of this very network"
            )
        together: dict[str, Histogram] = {}
        bounds: dict[str, Bounds] = {}
        for name, root in placement.shares.items():
            histogram = statistics.activations[name]
            together[root] = together[root].merged(histogram) if root in together else histogram
            low, high = placement.bounds.get(name, UNBOUNDED)
            bounds[root] = (
                max(low, bounds.get(root, UNBOUNDED)[0]),
                min(high, bounds.get(root, UNBOUNDED)[1]),
            )
        chosen = {
            root: self._parameters(histogram, bounds[root], integers)
            for root, histogram in together.items()
        }
        edits = []
        for name, readers in placement.values.items():
            scale, zero_point = chosen[placement.shares[name]]
            own = placement.bounds.get(name, UNBOUNDED)
            before = placement.before.get(name)
            if before and not _fits(scale, zero_point, integers, own):
                # The clamp cannot fuse into the shared scale: the operator before it gets the range of what the clamp
                # lets through, and stays an integer operator.
                first = self._parameters(statistics.activations[name], own, integers)
                edits.append(_edit(before, first, integers, ()))
            edits.append(_edit(name, (scale, zero_point), integers, readers))
        return edits

    def _parameters(
        self, histogram: Histogram, bounds: Bounds, integers: Integers
    ) -> tuple[float, int]:
        """(scale, zero point) of values with this histogram, within the bounds of a clamp where they all are."""
        low, high = activation_range(histogram, integers, self.ranges)
        scale, zero_point = asymmetric(torch.tensor(low), torch.tensor(high), integers)
        if bounds[0] <= low and high <= bounds[1]:
            scale = within(scale, zero_point, integers, *bounds)
        return float(scale), int(zero_point)

    def _weights(
        self, module: fx.GraphModule, placement: Placement, activations: list[Quantize]
    ) -> list[QuantizeWeight]:
        integers = Integers.signed(self.bits)
        steps = {edit.tensor: edit.scale for edit in activations}
        nodes = {node.name: node for node in module.graph.nodes}
        edits = []
        for name, (axis, users) in placement.weights.items():
            weight = _weight(module, name)
            scale, _ = self._scale(weight, axis)
            for user in users:
                scale = torch.maximum(scale, _least_for_bias(module, nodes[user], steps))
            edits.append(
                QuantizeWeight(
                    name,
                    Values(scale[:, None].clone()),
                    Values(torch.zeros(len(scale), 1, dtype=torch.int64)),
                    integers.low,
                    integers.high,
                    axis,
                    users,
                )
            )
        return edits

    def _scale(self, weight: torch.Tensor, axis: int) -> tuple[torch.Tensor, tuple[int, ...]]:
        """(scales (channels,), the channels repaired against saturation)."""
        integers = Integers.signed(self.bits)
        scale = symmetric(weight_bounds(weight, axis, integers, self.ranges), integers)
        if not self.saturation_free or self.bits > 8:  # 16-bit kernels have wide sums
            return scale, ()
        return without_saturation(weight.movedim(axis, 0), scale, integers)


def _edit(
    name: str, parameters: tuple[float, int], integers: Integers, readers: tuple[str, ...]
) -> Quantize:
    scale, zero_point = parameters
    return Quantize(name, scale, zero_point, integers.low, integers.high, readers)


def _fits(scale: float, zero_point: int, integers: Integers, bounds: Bounds) -> bool:
    """Whether all representable values lie within the bounds, so that a runtime can leave the clamp out."""
    ends = torch.tensor([integers.low - zero_point, integers.high - zero_point]) * torch.tensor(
        scale
    )
    return bounds[0] <= float(ends[0]) and float(ends[1]) <= bounds[1]


def _weight(module: fx.GraphModule, name: str) -> torch.Tensor:
    weight = read(module, name)
    assert weight is not None
    if not bool(torch.isfinite(weight).all()):
        raise RefusedError(f"{name} has NaN or infinity; the network cannot be quantized")
    return weight.detach()


def _least_for_bias(module: fx.GraphModule, node: fx.Node, steps: dict[str, float]) -> torch.Tensor:
    """The smallest weight scales with which the bias fits 32 bits; folded channels that are nearly dead have tiny ones."""
    role = ROLES[node.target]
    source = node.args[role.weight_input]
    name = parameter_of(node.args[role.bias]) if len(node.args) > role.bias else None
    bias = None if name is None else read(module, name)
    if bias is None or not isinstance(source, fx.Node):
        return torch.zeros(1)
    return bias.detach().abs() / (steps[source.name] * _LARGEST_BIAS)
