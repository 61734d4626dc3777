"""Quantize/dequantize pairs and integer weights in a graph: what `Quantize` and `QuantizeWeight` write there."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx

from tinier.graph.dynamic import ROUND, ROUND_TOKENS
from tinier.graph.fold import parameter_of, read, write
from tinier.graph.placement import ROLES, Kind
from tinier.graph.trace import Traced
from tinier.modules.fake_quantize import BIAS
from tinier.tensors.affine import Integers, quantize

pairs = torch.ops.quantized_decomposed


def insert_pair(
    node: fx.Node, scale: float, zero_point: int, integers: Integers, readers: Sequence[str]
) -> None:
    """Who reads the node reads its rounded values; all its readers where none are named."""
    users = [user for user in node.users if not readers or user.name in readers]
    numbers = (scale, zero_point, integers.low, integers.high, integers.dtype)
    graph = node.graph
    with graph.inserting_after(node):
        rounded = graph.call_function(pairs.quantize_per_tensor.default, (node, *numbers))
    with graph.inserting_after(rounded):
        value = graph.call_function(pairs.dequantize_per_tensor.default, (rounded, *numbers))
    value.meta = dict(node.meta)
    for user in users:
        user.replace_input_with(node, value)


def insert_rounding(node: fx.Node, readers: Sequence[str], per_token: bool = False) -> None:
    """Those readers, or all, read the node's values rounded to the range of each run, or of each row of the last axis."""
    users = [user for user in node.users if not readers or user.name in readers]
    graph = node.graph
    with graph.inserting_after(node):
        value = graph.call_function(ROUND_TOKENS if per_token else ROUND, (node,))
    value.meta = dict(node.meta)
    for user in users:
        user.replace_input_with(node, value)


@dataclass(frozen=True)
class Stored:
    """Names of integers, their scales and their zero points in a graph."""

    integers: str
    scale: str
    zero_point: str

    @classmethod
    def under(cls, stem: str) -> "Stored":
        """The names that belong to a parameter."""
        return cls(f"{stem}_integers", f"{stem}_scale", f"{stem}_zero_point")

    def write(
        self, module: fx.GraphModule, integers: Tensor, scale: Tensor, zero_point: Tensor
    ) -> None:
        """Put the three tensors there."""
        write(module, self.integers, integers)
        write(module, self.scale, scale)
        write(module, self.zero_point, zero_point)

    def attach(
        self, node: fx.Node, reader: fx.Node, axis: int, integers: Integers, group: int = 0
    ) -> None:
        """``reader`` reads the dequantized integers in place of ``node``; groups are of so many neighbours along dimension 1."""
        graph = node.graph
        bounds = (integers.low, integers.high, integers.dtype)
        with graph.inserting_before(reader):
            stored = [graph.get_attr(n) for n in (self.integers, self.scale, self.zero_point)]
            if group:
                value = graph.call_function(
                    pairs.dequantize_per_channel_group.default,
                    (*stored, *bounds, group, torch.float32),
                )
                if axis == 1:
                    value = graph.call_function(torch.ops.aten.t.default, (value,))
            else:
                value = graph.call_function(
                    pairs.dequantize_per_channel.default, (*stored, axis, *bounds)
                )
        value.meta = dict(node.meta)
        reader.replace_input_with(node, value)


def as_matrix(weight: Tensor, axis: int) -> Tensor:
    """(m, n): a row for each slice of a weight along ``axis``, the other dimensions in their order."""
    return weight.movedim(axis, 0).flatten(1)


def from_matrix(matrix: Tensor, like: Tensor, axis: int) -> Tensor:
    """The inverse of `as_matrix`, for a weight of the shape of ``like``."""
    return matrix.reshape(like.movedim(axis, 0).shape).movedim(0, axis)


def store_weight(
    module: fx.GraphModule,
    name: str,
    matrix: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    integers: Integers,
    axis: int,
    readers: Sequence[str],
) -> None:
    """A weight becomes integers, dequantized where its readers need it.

    Args:
        module: the graph, changed in place.
        name: of the parameter.
        matrix: (m, n) integers, a row for each slice along ``axis``.
        scale: (m or 1, groups) float32; groups above 1 only for weights of two dimensions.
        zero_point: like ``scale``.
        integers: which ones they are.
        axis: dimension of the channels.
        readers: nodes that read them; all where none are named.
    """
    weight = read(module, name)
    assert weight is not None
    rows, groups = len(matrix), scale.shape[1]
    scale, zero_point = (part.expand(rows, -1).contiguous() for part in (scale, zero_point))
    stored = Stored.under(name)
    if groups == 1:
        whole = from_matrix(matrix, weight, axis).contiguous()
        stored.write(module, whole, scale[:, 0].clone(), zero_point[:, 0].clone())
    else:
        stored.write(module, matrix, scale, zero_point)
    group = 0 if groups == 1 else matrix.shape[1] // groups
    for node in list(module.graph.find_nodes(op="get_attr")):
        if node.target != name:
            continue
        for reader in list(node.users):
            if not readers or reader.name in readers:
                stored.attach(node, reader, axis, integers, group)


def store_biases(
    module: fx.GraphModule, inputs: Mapping[str, float], weights: Mapping[str, Tensor]
) -> None:
    """Biases become 32-bit integers in units of input scale · weight scale, as integer operators add them.

    Args:
        module: the graph, changed in place, before its pairs are inserted.
        inputs: node → scale of its values.
        weights: parameter → (m,) its scales, of those with one for each channel.
    """
    for found in integer_biases(module, inputs, weights):
        bias = read(module, found.name)
        assert bias is not None
        step = weights[found.weight] * inputs[found.source]
        zeros = torch.zeros(len(step), dtype=torch.int64)
        integers = quantize(bias.detach().double(), step.double(), zeros, BIAS, 0)
        shared = len(found.argument.users) > 1
        stored = Stored.under(f"{found.name}_{found.reader.name}" if shared else found.name)
        stored.write(module, integers, step, zeros)
        stored.attach(found.argument, found.reader, 0, BIAS)


@dataclass(frozen=True)
class IntegerBias:
    """A bias that an integer operator adds.

    Attributes:
        name: of the parameter.
        argument: the node that gives it to ``reader``.
        reader: the operator.
        source: name of the node that the weight multiplies.
        weight: name of the weight.
    """

    name: str
    argument: fx.Node
    reader: fx.Node
    source: str
    weight: str


def integer_biases(
    module: fx.GraphModule, inputs: Container[str], weights: Container[str]
) -> list[IntegerBias]:
    """The biases of operators with quantized ``inputs`` (nodes) and ``weights`` (parameters), in a graph without pairs."""
    result = []
    for node in module.graph.nodes:
        role = ROLES.get(node.target) if node.op == "call_function" else None
        if role is None or role.kind is not Kind.WEIGHTED:
            continue
        source, weight = node.args[role.weight_input], parameter_of(node.args[role.weight])
        argument = node.args[role.bias] if len(node.args) > role.bias else None
        name = parameter_of(argument)
        if (
            not isinstance(argument, fx.Node)
            or name is None
            or weight is None
            or weight not in weights
            or source.name not in inputs
        ):
            continue
        if node.target is torch.ops.aten.linear.default and source.meta["val"].ndim != 2:
            continue  # a matrix product of more dimensions: runtimes add its bias in float
        result.append(IntegerBias(name, argument, node, source.name, weight))
    return result


def name_outputs(module: fx.GraphModule, traced: Traced) -> None:
    """A network that returns named outputs goes on returning them; others return a tensor or a tuple."""
    (output,) = module.graph.find_nodes(op="output")
    values = output.args[0]
    if not traced.named:
        output.args = (values[0],) if len(traced.outputs) == 1 else (values,)
    else:
        output.args = (dict(zip(traced.outputs, values, strict=True)),)
