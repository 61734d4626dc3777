"""Blocks that can leave whole: what is left then is the path that goes around them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tinier.graph.groups import Channels
from tinier.graph.macs import mac_terms, parameter_terms
from tinier.graph.rules import operator_name
from tinier.graph.trace import Traced

# Through these an input is still itself, but for its scale: sums with other branches, activations, norms, layer scale.
AROUND = """
add mul relu gelu silu hardswish hardtanh dropout feature_dropout clone contiguous layer_norm rms_norm batch_norm group_norm
native_layer_norm to _to_copy view reshape permute transpose flatten unflatten unsqueeze squeeze
"""


@dataclass(frozen=True, eq=False)
class Block:
    """A module of the user's model that gives back what it takes, changed by its branches.

    Attributes:
        path: of the module.
        entry: the node whose value goes in.
        exit: the node whose value comes out; it has the shape of ``entry``.
        nodes: what the module computes.
        macs: of one example.
        parameters: number, those shared with others left out.
    """

    path: str
    entry: fx.Node
    exit: fx.Node
    nodes: frozenset[fx.Node]
    macs: float
    parameters: float


def blocks(traced: Traced, channels: Channels) -> tuple[Block, ...]:
    """The residual blocks of a network, in the order of the graph.

    A block is a module with one tensor out, of the shape and type of one that goes in, between which there is a path of sums, norms and
    activations alone. Modules inside of blocks are blocks, too, where this holds for them.

    Args:
        traced: the network.
        channels: its axes, for the costs.

    Cost:
        One pass over the operators for each depth of nesting.
    """
    members: dict[str, list[fx.Node]] = {}
    for node in traced.module.graph.nodes:
        if node.op == "call_function":
            for path in _paths(node):
                members.setdefault(path, []).append(node)
    macs, parameters = (
        _counts(mac_terms(traced, channels)),
        _counts(parameter_terms(traced, channels)),
    )
    users = _users(traced)
    result = []
    for path, nodes in members.items():
        inside = frozenset(nodes)
        found = _through(inside)
        if found is None:
            continue
        own = {str(s.target) for node in nodes for s in node.all_input_nodes if s.op == "get_attr"}
        own = {name for name in own if users[name] <= inside}
        count = sum(macs.get(node.name, 0.0) for node in nodes)
        if own and count:  # a norm by itself is no block
            result.append(
                Block(
                    path,
                    *found,
                    inside,
                    count,
                    sum(parameters.get(name, 0.0) for name in own),
                )
            )
    order = {node: number for number, node in enumerate(traced.module.graph.nodes)}
    return tuple(sorted(result, key=lambda block: (order[block.exit], -len(block.nodes))))


def _paths(node: fx.Node) -> Iterator[str]:
    for entry in (node.meta.get("nn_module_stack") or {}).values():
        path = str(entry[0]).removeprefix("L['self'].")
        if path and path != "L['self']":
            yield path


def _counts(terms: Iterable[Any]) -> dict[str, float]:
    result: dict[str, float] = {}
    for term in terms:
        result[term.name] = result.get(term.name, 0.0) + term.at({})
    return result


def _users(traced: Traced) -> dict[str, set[fx.Node]]:
    """Parameter → the operators that use it."""
    result: dict[str, set[fx.Node]] = {}
    for node in traced.module.graph.find_nodes(op="get_attr"):
        result.setdefault(str(node.target), set()).update(node.users)
    return result


def _through(inside: frozenset[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """The way in and the way out, where what comes out has gone around the block's weights."""
    exits = [node for node in inside if any(user not in inside for user in node.users)]
    if len(exits) != 1 or not isinstance(exits[0].meta.get("val"), Tensor):
        return None
    exit, entries = exits[0], []
    waiting, seen = [exit], {exit}
    while waiting:
        node = waiting.pop()
        for source in node.all_input_nodes:
            if source in seen or source.op == "get_attr":
                continue
            seen.add(source)
            if source not in inside:
                entries.append(source)
            elif operator_name(source) in AROUND.split():
                waiting.append(source)
    if operator_name(exit) not in AROUND.split():
        return None
    alike = [source for source in entries if _alike(source, exit)]
    return (alike[0], exit) if len(alike) == 1 else None


def _alike(left: fx.Node, right: fx.Node) -> bool:
    a, b = left.meta.get("val"), right.meta.get("val")
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.dtype == b.dtype
        and [str(n) for n in a.shape] == [str(n) for n in b.shape]
    )


def without(
    traced: Traced, dropped: Iterable[Block], inputs: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    """The reference of dropping: the original graph, in which what comes out of each dropped block is what went in.

    Args:
        traced: the original network.
        dropped: its blocks.
        inputs: input name → tensor.

    Returns:
        The outputs.

    Cost:
        One run of the original network.
    """
    interpreter = _Without(traced.module, {block.exit: block.entry for block in dropped})
    with torch.no_grad():
        return tuple(interpreter.run(*(inputs[name] for name in traced.inputs)))


class _Without(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, instead: dict[fx.Node, fx.Node]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.instead = instead

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        return self.env[self.instead[node]] if node in self.instead else value
