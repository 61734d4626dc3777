"""Multiply-accumulates of each operator at batch 1, also as a function of what is kept, and the table of layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, fx

from tinier.graph.axes import Atom, Axis, atoms, kept_size
from tinier.graph.groups import Channels, channel_groups, named_tensors
from tinier.graph.rules import operator_name
from tinier.graph.trace import Traced


@dataclass(frozen=True)
class Term:
    """A count that is a product of axes: factor · Π size(axis).

    Attributes:
        name: node or parameter.
        factor: 1, or less to undo the batch of the example.
        axes: resolved.
    """

    name: str
    factor: float
    axes: tuple[Axis, ...]

    def at(self, sizes: Mapping[Atom, int]) -> float:
        """The count when atoms shrink to ``sizes``."""
        return self.factor * prod(kept_size(axis, sizes) for axis in self.axes)


class Cost:
    """A sum of terms that is cheap to evaluate again when few atoms change.

    Args:
        terms: what is summed.
    """

    def __init__(self, terms: list[Term]) -> None:
        self.terms = terms
        self.by_atom: dict[Atom, list[Term]] = {}
        for term in terms:
            for atom in dict.fromkeys(a for axis in term.axes for a in atoms(axis)):
                self.by_atom.setdefault(atom, []).append(term)

    def at(self, sizes: Mapping[Atom, int]) -> float:
        """The sum when atoms shrink to ``sizes``."""
        return sum(term.at(sizes) for term in self.terms)

    def change(self, sizes: Mapping[Atom, int], atom: Atom, new: int) -> float:
        """What the sum changes by when one atom goes from its size in ``sizes`` to ``new``."""
        touched = self.by_atom.get(atom, [])
        return sum(t.at({**sizes, atom: new}) for t in touched) - sum(t.at(sizes) for t in touched)


def mac_terms(traced: Traced, channels: Channels) -> list[Term]:
    """One term for each matrix product and convolution, two for attention; batch 1, other free sizes as in the example."""
    result = []
    for node in traced.module.graph.nodes:
        if node.op != "call_function":
            continue
        for axes in _contractions(channels, node):
            result.append(Term(node.name, _batch_factor(traced, node), tuple(axes)))
    return result


def _contractions(channels: Channels, node: fx.Node) -> list[list[Axis]]:
    name = operator_name(node)
    axes: Any = channels.axes
    if name == "linear":
        return [[*axes[node], axes[node.args[1]][-1]]]
    if name in ("matmul", "mm", "bmm", "mv", "dot"):
        return [[*axes[node], axes[node.args[0]][-1]]]
    if name in ("addmm", "baddbmm", "addmv"):
        return [[*axes[node], axes[node.args[1]][-1]]]
    if name.startswith("conv_transpose"):
        weight = axes[node.args[1]]
        return [[*axes[node.args[0]], *weight[1:]]]
    if name.startswith(("conv", "_conv")) and node in channels.outer:
        return [[*axes[node], *axes[node.args[1]][1:]]]
    if name == "scaled_dot_product_attention":
        query, key, value = (axes[source] for source in node.args[:3])
        return [[*query, key[-2]], [*query[:-1], key[-2], value[-1]]]
    return []


def _batch_factor(traced: Traced, node: fx.Node) -> float:
    """One over the example's batch size, for nodes whose result has the batch in it."""
    placeholder = next(iter(traced.module.graph.find_nodes(op="placeholder")), None)
    value = node.meta["val"]
    if placeholder is None or not isinstance(value, Tensor):
        return 1.0
    batch = placeholder.meta["val"].shape[0] if placeholder.meta["val"].ndim else 1
    if isinstance(batch, int):
        return 1.0
    symbols = batch.node.expr.free_symbols
    has_batch = any(
        not isinstance(dim, int) and symbols & dim.node.expr.free_symbols for dim in value.shape
    )
    return 1.0 / int(batch.node.hint) if has_batch else 1.0


def parameter_terms(traced: Traced, channels: Channels) -> list[Term]:
    """One term for each parameter that the graph uses; tied ones once."""
    trainable = dict(traced.module.named_parameters())
    return [
        Term(name, 1.0, tuple(axes))
        for name, axes in channels.parameters.items()
        if name in trainable
    ]


def macs(traced: Traced, channels: Channels | None = None) -> dict[str, int]:
    """Multiply-accumulates at batch 1.

    Args:
        traced: the network.
        channels: its axes, if they are known.

    Returns:
        Node name → count, for convolutions, linear layers, matrix products and attention.
    """
    result: dict[str, float] = {}
    for term in mac_terms(traced, channels or channel_groups(traced)):
        result[term.name] = result.get(term.name, 0) + term.at({})
    return {name: round(count) for name, count in result.items()}


@dataclass(frozen=True)
class Row:
    """One layer of ``describe``.

    Attributes:
        layer: module path in the user's model, or the node where there is none.
        kind: operator.
        shape: of the result; 0 stands for a free size.
        parameters: number, tied ones at their first use.
        macs: at batch 1.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int


def describe(traced: Traced, channels: Channels | None = None) -> list[Row]:
    """A row for each operator that has parameters or multiplies.

    Args:
        traced: the network.
        channels: its axes, if they are known.

    Returns:
        Rows in the order of the graph.
    """
    counts = macs(traced, channels)
    tensors, seen, rows = named_tensors(traced.module), set[int](), []
    trainable = {name for name, _ in traced.module.named_parameters(remove_duplicate=False)}
    for node in traced.module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        own = 0
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source.target in trainable:
                tensor = tensors[source.target]
                own += 0 if id(tensor) in seen else tensor.numel()
                seen.add(id(tensor))
        if own or counts.get(node.name):
            shape = tuple(d if isinstance(d, int) else 0 for d in node.meta["val"].shape)
            path = module_path(node) or node.name
            rows.append(Row(path, operator_name(node), shape, own, counts.get(node.name, 0)))
    return rows


def module_path(node: fx.Node) -> str:
    """The module of the user's model that a node comes from; empty for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""
