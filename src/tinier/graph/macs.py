"""Multiply-accumulates of each operator at batch 1, also as a function of what is kept, and the table of layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, fx

from tinier.graph.axes import UNIT, Atom, Axis, atoms, kept_size
from tinier.graph.groups import Channels, channel_groups, named_tensors
from tinier.graph.rules import operator_name
from tinier.graph.rules.linear import ATTENTION, letters
from tinier.graph.rules.recurrent import GATES, layers
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
        settled: sizes of atoms that are decided; others may be given anew.
    """

    def __init__(self, terms: list[Term], settled: Mapping[Atom, int] | None = None) -> None:
        self.terms = terms
        self.settled = dict(settled or {})
        self.by_atom: dict[Atom, list[Term]] = {}
        for term in terms:
            for atom in dict.fromkeys(a for axis in term.axes for a in atoms(axis)):
                self.by_atom.setdefault(atom, []).append(term)

    def at(self, sizes: Mapping[Atom, int]) -> float:
        """The sum when atoms shrink to ``sizes``."""
        sizes = {**self.settled, **sizes}
        return sum(term.at(sizes) for term in self.terms)

    def change(self, sizes: Mapping[Atom, int], atom: Atom, new: int) -> float:
        """What the sum changes by when one atom goes from its size in ``sizes`` to ``new``."""
        touched = self.by_atom.get(atom, [])
        sizes = {**self.settled, **sizes}
        changed = {**sizes, atom: new}
        return sum(t.at(changed) - t.at(sizes) for t in touched)


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
    if name in ("grouped_mm_fallback", "_grouped_mm"):
        return [[*axes[node], axes[node.args[0]][-1]]]
    if name == "einsum":
        return _einsum(channels, node)
    if name in GATES:
        return _recurrent(channels, node)
    if name.removesuffix("_cell") in GATES:
        rows = axes[node.args[0]][:-1]
        return [[*rows, *axes[source]] for source in node.args[2:4]]
    if name == "bilinear":
        left, weight = axes[node.args[0]], axes[node.args[2]]
        return [[*left[:-1], *weight]]
    if name in ATTENTION:
        query, key, value = (axes[source] for source in node.args[:3])
        return [[*query, key[-2]], [*query[:-1], key[-2], value[-1]]]
    return []


def _einsum(channels: Channels, node: fx.Node) -> list[list[Axis]]:
    """All letters of two operands together; further operands are contracted one after the other, from the left."""
    axes: Any = channels.axes
    sources: Any = node.args[1]
    operands = [axes[source] for source in sources]
    inputs, output = letters(str(node.args[0]), [len(found) for found in operands])
    known: dict[str, Axis] = {}
    for names, found in zip(inputs, operands, strict=True):
        for name, axis in zip(names, found, strict=True):
            known[name] = axis if known.get(name, UNIT) == UNIT else known[name]
    result, have = [], inputs[0]
    for place in range(1, len(inputs)):
        used = dict.fromkeys(have + inputs[place])
        result.append([known[name] for name in used])
        have = "".join(
            name for name in used if name in output or name in "".join(inputs[place + 1 :])
        )
    return result


def _recurrent(channels: Channels, node: fx.Node) -> list[list[Axis]]:
    """For each step each matrix of each layer and direction."""
    axes: Any = channels.axes
    rows = axes[node.args[0]][:-1]
    params = [param for layer in layers(node) for direction in layer for param in direction]
    return [[*rows, *axes[param]] for param in params if len(axes[param]) == 2]


def _batch_factor(traced: Traced, node: fx.Node) -> float:
    """One over the example's batch size, for nodes whose result has the batch in it."""
    placeholder = next(iter(traced.module.graph.find_nodes(op="placeholder")), None)
    value = node.meta["val"]
    value = value[0] if isinstance(value, list | tuple) else value
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


def byte_terms(traced: Traced, channels: Channels) -> list[Term]:
    """As ``parameter_terms``, each in the bytes of its type."""
    width = {n: p.element_size() for n, p in traced.module.named_parameters()}
    return [
        Term(term.name, float(width[term.name]), term.axes)
        for term in parameter_terms(traced, channels)
    ]


COSTS: dict[str, Callable[[Traced, Channels], list[Term]]] = {
    "macs": mac_terms,
    "parameters": parameter_terms,
    "bytes": byte_terms,
}


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
        left: the share of its MACs that a plan would leave, of its parameters where it has no MACs.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    left: float = 1.0


def describe(
    traced: Traced, channels: Channels | None = None, sizes: Mapping[Atom, int] | None = None
) -> list[Row]:
    """A row for each operator that has parameters or multiplies.

    Args:
        traced: the network.
        channels: its axes, if they are known.
        sizes: what a plan would leave of atoms of these ``channels``.

    Returns:
        Rows in the order of the graph.
    """
    channels = channels or channel_groups(traced)
    counts, left = macs(traced, channels), _left(traced, channels, sizes or {})
    tensors, seen, rows = named_tensors(traced.module), set[int](), []
    trainable = {name for name, _ in traced.module.named_parameters(remove_duplicate=False)}
    for node in traced.module.graph.nodes:
        value = node.meta.get("val")
        value = value[0] if isinstance(value, list | tuple) and value else value
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        own = 0
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source.target in trainable:
                tensor = tensors[source.target]
                own += 0 if id(tensor) in seen else tensor.numel()
                seen.add(id(tensor))
        if own or counts.get(node.name):
            shape = tuple(d if isinstance(d, int) else 0 for d in value.shape)
            path = module_path(node) or node.name
            names = [
                node.name,
                *(str(s.target) for s in node.all_input_nodes if s.op == "get_attr"),
            ]
            share = next((left[name] for name in names if name in left), 1.0)
            count = counts.get(node.name, 0)
            rows.append(Row(path, operator_name(node), shape, own, count, share))
    return rows


def _left(traced: Traced, channels: Channels, sizes: Mapping[Atom, int]) -> dict[str, float]:
    """Node or parameter → the share of its count that is left."""
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    for term in (*mac_terms(traced, channels), *parameter_terms(traced, channels)):
        before[term.name] = before.get(term.name, 0.0) + term.at({})
        after[term.name] = after.get(term.name, 0.0) + term.at(sizes)
    return {name: after[name] / count for name, count in before.items() if count}


def module_path(node: fx.Node) -> str:
    """The module of the user's model that a node comes from; empty for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""
