"""Store weights as integers, and round activations to them: quantize/dequantize pairs in the traced graph."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx

from tinier.edits.base import Edit
from tinier.errors import RefusedError
from tinier.graph.fold import fold, parameter_of, pruned, read, write
from tinier.graph.placement import ROLES, Kind
from tinier.network import Network
from tinier.tensors.affine import Integers, quantize

pairs = torch.ops.quantized_decomposed
_BIAS = Integers(-(2**31), 2**31 - 1)


@dataclass(frozen=True)
class Quantize(Edit):
    """Quantize one tensor: x̂ = s · (clamp(round(x / s) + z, low, high) − z).

    Attributes:
        tensor: a parameter's name (weights), or a node of the traced graph (activations).
        scale: s, one, or one for each slice along ``axis``; float32 numbers.
        zero_point: z, like ``scale``.
        low, high: the integers.
        axis: dimension of a weight with scales of its own; None for activations.
        readers: nodes that read the quantized values; empty for all.
    """

    kind: ClassVar[str] = "quantize"

    tensor: str
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    low: int
    high: int
    axis: int | None = None
    readers: tuple[str, ...] = ()

    @property
    def integers(self) -> Integers:
        """The integers that the values become."""
        return Integers(self.low, self.high)

    def row(self) -> tuple[str, str]:
        bits = self.integers.steps.bit_length()
        what = f"{bits} bits, {self.low} … {self.high}"
        if self.axis is not None:
            ends = f"{min(self.scale):.3g} … {max(self.scale):.3g}"
            return self.tensor, f"{what}, {len(self.scale)} scales {ends}"
        return self.tensor, f"{what}, scale {self.scale[0]:.3g}, zero point {self.zero_point[0]}"

    @classmethod
    def apply_all(cls, edits: "list[Edit]", network: Network) -> Network:
        """The traced graph with batch norms folded, integer weights and a pair after each quantized activation.

        Raises:
            RefusedError: the network is quantized already, or has no such node or parameter.
        """
        traced = network.traced
        refuse_quantized(network)
        module = fold(traced.module)
        chosen = [edit for edit in edits if isinstance(edit, Quantize)]
        nodes = {node.name: node for node in module.graph.nodes}
        activations = [edit for edit in chosen if edit.axis is None]
        weights = [edit for edit in chosen if edit.axis is not None]
        _store_biases(module, activations, weights)
        for edit in activations:
            if edit.tensor not in nodes:
                raise RefusedError(f"{network.name} has no value {edit.tensor} to quantize")
            _insert_pair(nodes[edit.tensor], edit)
        for edit in weights:
            if read(module, edit.tensor) is None:
                raise RefusedError(f"{network.name} has no parameter {edit.tensor} to quantize")
            _store_weight(module, edit)
        _name_outputs(module, traced.outputs)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        return Network(pruned(module), network.example, network.name, network.folder)


def refuse_quantized(network: Network) -> None:
    """Raise RefusedError for a network that is quantized already."""
    for node in network.traced.module.graph.nodes:
        if str(node.target).startswith("quantized_decomposed"):
            raise RefusedError(
                f"{network.name} is quantized already (at {node.name}); quantize the float network"
            )


def _insert_pair(node: fx.Node, edit: Quantize) -> None:
    """Who reads the node reads its rounded values."""
    readers = [user for user in node.users if not edit.readers or user.name in edit.readers]
    dtype = edit.integers.dtype
    numbers = (edit.scale[0], edit.zero_point[0], edit.low, edit.high, dtype)
    graph = node.graph
    with graph.inserting_after(node):
        integers = graph.call_function(pairs.quantize_per_tensor.default, (node, *numbers))
    with graph.inserting_after(integers):
        rounded = graph.call_function(pairs.dequantize_per_tensor.default, (integers, *numbers))
    rounded.meta = dict(node.meta)
    for reader in readers:
        reader.replace_input_with(node, rounded)


@dataclass(frozen=True)
class _Stored:
    """Names of integers, their scales and their zero points."""

    integers: str
    scale: str
    zero_point: str

    def write(
        self, module: fx.GraphModule, integers: Tensor, scale: Tensor, zero_point: Tensor
    ) -> None:
        write(module, self.integers, integers)
        write(module, self.scale, scale)
        write(module, self.zero_point, zero_point)

    def attach(self, node: fx.Node, reader: fx.Node, axis: int, integers: Integers) -> None:
        """``reader`` reads the dequantized integers in place of ``node``."""
        graph = node.graph
        with graph.inserting_before(reader):
            stored = [graph.get_attr(n) for n in (self.integers, self.scale, self.zero_point)]
            value = graph.call_function(
                pairs.dequantize_per_channel.default,
                (*stored, axis, integers.low, integers.high, integers.dtype),
            )
        value.meta = dict(node.meta)
        reader.replace_input_with(node, value)


def _store_weight(module: fx.GraphModule, edit: Quantize) -> None:
    """The weight becomes integers with scales, dequantized where its readers need it."""
    weight = read(module, edit.tensor)
    assert weight is not None and edit.axis is not None
    scale, zero_point = torch.tensor(edit.scale), torch.tensor(edit.zero_point)
    integers = quantize(weight.detach(), scale, zero_point, edit.integers, edit.axis)
    stored = _Stored(f"{edit.tensor}_integers", f"{edit.tensor}_scale", f"{edit.tensor}_zero_point")
    stored.write(module, integers, scale, zero_point)
    for node in list(module.graph.find_nodes(op="get_attr")):
        if node.target != edit.tensor:
            continue
        for reader in list(node.users):
            if not edit.readers or reader.name in edit.readers:
                stored.attach(node, reader, edit.axis, edit.integers)


def _store_biases(
    module: fx.GraphModule, activations: list[Quantize], weights: list[Quantize]
) -> None:
    """Biases become 32-bit integers in units of input scale · weight scale, as integer operators add them."""
    by_value = {edit.tensor: edit for edit in activations}
    by_weight = {edit.tensor: edit for edit in weights}
    for node in list(module.graph.nodes):
        role = ROLES.get(node.target) if node.op == "call_function" else None
        if role is None or role.kind is not Kind.WEIGHTED:
            continue
        source, weight = node.args[role.weight_input], parameter_of(node.args[role.weight])
        argument = node.args[role.bias] if len(node.args) > role.bias else None
        name = parameter_of(argument)
        if (
            not isinstance(argument, fx.Node)
            or name is None
            or weight not in by_weight
            or source.name not in by_value
        ):
            continue
        if node.target is torch.ops.aten.linear.default and source.meta["val"].ndim != 2:
            continue  # a matrix product of more dimensions: runtimes add its bias in float
        bias = read(module, name)
        assert bias is not None
        step = torch.tensor(by_weight[weight].scale) * by_value[source.name].scale[0]
        zeros = torch.zeros(len(step), dtype=torch.int64)
        integers = quantize(bias.detach().double(), step.double(), zeros, _BIAS, 0)
        stem = f"{name}_{node.name}" if len(argument.users) > 1 else name
        stored = _Stored(f"{stem}_integers", f"{stem}_scale", f"{stem}_zero_point")
        stored.write(module, integers, step, zeros)
        stored.attach(argument, node, 0, _BIAS)


def _name_outputs(module: fx.GraphModule, names: tuple[str, ...]) -> None:
    """A network that returns named outputs goes on returning them; others return a tensor or a tuple."""
    (output,) = module.graph.find_nodes(op="output")
    values = output.args[0]
    if names[0] in ("output", "output_0"):
        output.args = (values[0],) if len(names) == 1 else (values,)
    else:
        output.args = (dict(zip(names, values, strict=True)),)
