"""Where operators read a channel group and sum over it: the places that tell what a channel is worth."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tinier.graph.axes import Atom, Axis, atoms, coordinates, places
from tinier.graph.groups import Channels, Group
from tinier.graph.layers import Layer, linear_layer
from tinier.graph.rules import argument, operator_name
from tinier.graph.trace import Traced
from tinier.statistics.base import Use

_MOST_NUMBERS = 2**24  # in the rows that are taken at once


@dataclass(frozen=True, eq=False)
class Place:
    """An operator and the axis of its input that it sums over.

    Attributes:
        node: the operator.
        source: what it reads; it depends on the network's inputs.
        dim: the dimension, from 0.
        axis: its resolved term.
        layer: the operator as a linear layer or convolution, if it is one with a parameter as weight.
    """

    node: fx.Node
    source: fx.Node
    dim: int
    axis: Axis
    layer: Layer | None

    @property
    def read(self) -> str:
        """What is read: one name for all operators that read the same."""
        return f"{self.source.name}[{self.dim}]"


def reading_places(traced: Traced, channels: Channels) -> list[Place]:
    """Every place of a network where an activation is summed over along an axis of fixed length.

    Args:
        traced: the network.
        channels: its axes.

    Returns:
        Linear layers, convolutions, matrix products, attention and recurrent layers, in the order of the graph. Where a group has none of
        these, the operators at which its axis ends (a sum, a mean).
    """
    moving = _moving(traced)
    result = []
    for node in traced.module.graph.nodes:
        if node.op == "call_function":
            for source, dim in _summed(node):
                found = _place(channels, node, source, dim) if source in moving else None
                if found is not None:
                    result.append(found)
    for group in channels.groups:
        if not any(_reads(channels, place, group.atom) for place in result):
            result += _ends(channels, moving, group)
    return result


def group_uses(
    channels: Channels, groups: Sequence[Group], found: Sequence[Place]
) -> dict[str, tuple[Use, ...]]:
    """Group name → where it is read; empty for hidden units inside an operator, as of recurrent layers."""
    result = {}
    for group in groups:
        uses = []
        for place in found:
            if not _reads(channels, place, group.atom):
                continue
            index = _index(place.axis, group.atom)
            uses.append(Use(place.node.name, place.read, index, place.layer is not None))
        result[group.name] = tuple(uses)
    return result


def layers_by_node(traced: Traced) -> dict[str, Layer]:
    """Name of each node that is a linear layer or convolution with a parameter as weight → the layer."""
    found = {node.name: linear_layer(node) for node in traced.module.graph.nodes}
    return {name: layer for name, layer in found.items() if layer is not None}


def by_column(layer: Layer, values: Tensor, columns: int) -> Tensor:
    """What belongs to a position of a layer's input, for each column of its weight matrix.

    Args:
        layer: a linear layer or convolution.
        values: (length,) of the axis that it sums over.
        columns: n of ``layer.matrix``.

    Returns:
        (g, n): the columns of a convolution are inputs × kernel positions.
    """
    if layer.kind == "matmul":
        return values.expand(layer.groups, -1)
    grouped = values.view(layer.groups, -1)
    return grouped.repeat_interleave(columns // grouped.shape[1], 1)


def layer_rows(layer: Layer, value: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """What a layer multiplies its weight matrix with, (g, rows, n), in parts of at most 2^24 numbers.

    Args:
        layer: a linear layer or convolution.
        value: its input.
        weight: its weight.
    """
    spatial = layer.kind in ("convolution", "transposed")
    if spatial or (layer.kind == "matmul" and layer.groups > 1):
        dim = 0 if spatial else 1
        size = layer.inputs(value.narrow(dim, 0, 1), weight).numel()
    else:
        value, dim, size = value.reshape(-1, value.shape[-1]), 0, value.shape[-1]
    for part in value.split(max(_MOST_NUMBERS // max(size, 1), 1), dim):
        yield layer.inputs(part, weight)


def axis_index(axes: Sequence[Axis], atom: Atom) -> list[tuple[int, Tensor]]:
    """Dimensions in whose terms an atom occurs, with the channel of each position there."""
    return [(d, _index(axis, atom)) for d, axis in enumerate(axes) if atom in set(atoms(axis))]


def _index(axis: Axis, atom: Atom) -> Tensor:
    # An atom may occur twice, as in the two halves of a rotary embedding.
    found = [coordinates(axis, path) for own, path in places(axis) if own is atom]
    return torch.stack(found).amax(0)


def _reads(channels: Channels, place: Place, atom: Atom) -> bool:
    if atom not in set(atoms(place.axis)):
        return False
    # The groups of a grouped convolution pass through it: they are not summed over.
    outer = channels.outer.get(place.node)
    return outer is None or atom not in set(atoms(outer))


def _moving(traced: Traced) -> set[fx.Node]:
    """Nodes that depend on the network's inputs."""
    result: set[fx.Node] = set()
    for node in traced.module.graph.nodes:
        if node.op == "placeholder" or any(s in result for s in node.all_input_nodes):
            result.add(node)
    return result


def _place(channels: Channels, node: fx.Node, source: fx.Node, dim: int) -> Place | None:
    axes, value = channels.axes.get(source), source.meta.get("val")
    if not isinstance(axes, list) or not isinstance(value, Tensor):
        return None
    dim = dim + value.ndim if dim < 0 else dim
    if not 0 <= dim < value.ndim or not isinstance(value.shape[dim], int):
        return None
    if not value.is_floating_point():
        return None
    layer = linear_layer(node)
    return Place(node, source, dim, axes[dim], layer if layer and layer.source is source else None)


def _summed(node: fx.Node) -> list[tuple[Any, int]]:
    """Inputs of an operator with the dimension that it contracts."""
    name, args = operator_name(node), node.args
    if name == "linear":
        return [(args[0], -1)]
    if name in ("matmul", "mm", "bmm", "mv", "dot"):
        return _product(args[0], args[1])
    if name in ("addmm", "baddbmm", "addmv"):
        return _product(args[1], args[2])
    if name.startswith(("conv", "_conv")) and _rank(args[0]) and len(args) > 1:
        return [(args[0], _rank(args[0]) - _rank(args[1]) + 1)]
    if name == "scaled_dot_product_attention":
        return [(args[0], -1), (args[1], -1)]
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return [(args[0], -1)]
    if name == "einsum":
        return _einsum(str(argument(node, 0, "equation")).replace(" ", ""), args[1])
    return []


def _product(left: Any, right: Any) -> list[tuple[Any, int]]:
    return [(left, -1), (right, -2 if _rank(right) > 1 else -1)]


def _einsum(equation: str, operands: Any) -> list[tuple[Any, int]]:
    if "." in equation or "->" not in equation:
        return []
    inputs, output = equation.split("->")
    return [
        (source, dim)
        for names, source in zip(inputs.split(","), operands, strict=True)
        for dim, letter in enumerate(names)
        if letter not in output
    ]


def _rank(value: Any) -> int:
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return found.ndim if isinstance(found, Tensor) else 0


def _ends(channels: Channels, moving: set[fx.Node], group: Group) -> list[Place]:
    """Where an axis goes into an operator and does not come out again."""
    result = []
    for node, axes in channels.axes.items():
        if node not in moving or not isinstance(axes, list):
            continue
        for dim, _ in axis_index(axes, group.atom):
            for user in node.users:
                after: Any = channels.axes.get(user)
                lists = after if isinstance(after, tuple) else (after or [],)
                if any(group.atom in set(atoms(a)) for part in lists for a in part):
                    continue
                found = _place(channels, user, node, dim)
                if found is not None and user.op == "call_function":
                    result.append(found)
    return result
