"""A network in stretches between values that all later ones depend on alone: residual blocks, and layers between them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from tinier.graph.placement import ROLES, Kind
from tinier.graph.rules.base import hint

Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class Segment:
    """Consecutive operators of a graph with quantizers.

    Attributes:
        nodes: the operators on data, in their order.
        outputs: the tensors that later operators or the network's user read.
        weights: the calls of quantizers of weights that they read.
    """

    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]


class Cuts:
    """What of a graph with quantizers depends on data, on rounding, and where it can be cut.

    Args:
        module: from ``edits.fake_quantize.trainable``.
        weights: calls of the quantizers of weights.
    """

    def __init__(self, module: fx.GraphModule, weights: Iterable[fx.Node]) -> None:
        self.weights = set(weights)
        self.data: list[fx.Node] = []
        on_data: set[fx.Node] = set()
        rounded: set[fx.Node] = set()
        self.last: dict[fx.Node, int] = {}
        for node in module.graph.nodes:
            if node.op == "output":
                self.output = node
                for source in node.all_input_nodes:
                    self.last[source] = len(self.data)
            elif node.op == "placeholder" or on_data & set(node.all_input_nodes):
                for source in node.all_input_nodes:
                    self.last[source] = len(self.data)
                on_data.add(node)
                own = set(node.all_input_nodes)
                if node.op == "call_module" or rounded & own or self._read(node):
                    rounded.add(node)
                self.data.append(node)
        self.order = {node: number for number, node in enumerate(self.data)}
        self.rounded = rounded

    def segments(self, most: int) -> list[Segment]:
        """The shortest stretches between cuts, neighbours joined as long as they have ``most`` weights at the most."""
        ends: list[int] = []
        live: set[fx.Node] = set()
        for number, node in enumerate(self.data):
            live = {value for value in live if self.last.get(value, -1) > number}
            if node in self.rounded and self.last.get(node, -1) > number:
                live.add(node)
            if len(live) == 1 and all(_plain(value) for value in live):
                ends.append(number + 1)
        if not ends or ends[-1] != len(self.data):
            ends.append(len(self.data))
        joined: list[tuple[int, int]] = []
        count, start = 0, 0
        for end in ends:
            own = len(self._weights(self.data[start:end]))
            if joined and count + own <= most:
                joined[-1] = (joined[-1][0], end)
                count += own
            else:
                joined.append((start, end))
                count = own
            start = end
        return [self._segment(self.data[a:b]) for a, b in joined]

    def layers(self, segment: Segment) -> list[Segment]:
        """Each layer of a segment alone, with the rounding of its input and the activation function that it fuses with."""
        result = []
        for node in segment.nodes:
            read = self._read(node)
            if not read or any(len(weight.users) > 1 for weight in read) or not _plain(node):
                continue
            nodes = [source for source in node.all_input_nodes if source.op == "call_module"]
            nodes = [source for source in nodes if source in self.order]
            nodes.append(node)
            users = list(node.users)
            role = ROLES.get(users[0].target) if len(users) == 1 else None
            if role is not None and role.kind is Kind.CLAMP and users[0] in segment.nodes:
                nodes.append(users[0])
            result.append(replace(self._segment(nodes), outputs=(nodes[-1],)))
        return result

    def reads(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """The values that operators read and do not make, of those on data."""
        inside = set(nodes)
        found = [s for node in nodes for s in node.all_input_nodes if s in self.order]
        return [s for s in dict.fromkeys(found) if s not in inside]

    def peak(self, segment: Segment) -> int:
        """Bytes of one example of all values that there are at once while a segment runs, by the shapes in the graph."""
        live: set[fx.Node] = set(self.reads(segment.nodes))
        most = 0
        for node in segment.nodes:
            live.add(node)
            most = max(most, bytes_of(live))
            live = {value for value in live if self.last.get(value, -1) > self.order[node]}
        return most

    @property
    def channels_last(self) -> bool:
        """Whether images are best kept with their channels together: there are convolutions, and nothing that counts in memory's order."""
        targets = {node.target for node in self.data}
        return (
            torch.ops.aten.conv2d.default in targets
            and torch.ops.aten.as_strided.default not in targets
        )

    def _read(self, node: fx.Node) -> list[fx.Node]:
        return [source for source in node.all_input_nodes if source in self.weights]

    def _weights(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        return list(dict.fromkeys(w for node in nodes for w in self._read(node)))

    def _segment(self, nodes: Sequence[fx.Node]) -> Segment:
        nodes = [node for node in nodes if node.op != "placeholder"]
        inside = set(nodes)
        outputs = [n for n in nodes if any(user not in inside for user in n.users)]
        outputs = [n for n in outputs if isinstance(n.meta.get("val"), Tensor)]  # sizes are none
        weights = [w for w in self._weights(nodes) if set(w.users) <= inside]
        return Segment(tuple(nodes), tuple(outputs), tuple(weights))


def _plain(node: fx.Node) -> bool:
    """Whether a value is a tensor that the float network has, too."""
    return node.op != "call_module" and isinstance(node.meta.get("val"), Tensor)


class Runner(fx.Interpreter):
    """Runs stretches of a graph; what does not depend on data is computed where it is read."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)

    def run_stretch(
        self,
        nodes: Iterable[fx.Node],
        values: Mapping[fx.Node, Any],
        keep: Iterable[fx.Node] | None = None,
    ) -> Values:
        """The values of operators, by node.

        Args:
            nodes: in the order of the graph.
            values: of what they read and do not make.
            keep: the values that are wanted; the others are let go when they were read last. None for all.
        """
        nodes = list(nodes)
        wanted = set(values if keep is None else keep)
        last = {
            source: n for n, node in enumerate(nodes) for source in (node, *node.all_input_nodes)
        }
        self.env = dict(values)
        for number, node in enumerate(nodes):
            self._with_constants(node)
            if keep is not None:
                for source in (node, *node.all_input_nodes):
                    if last[source] == number and source not in wanted:
                        self.env.pop(source, None)
        result, self.env = self.env, {}
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of an operator. Images whose channels lie together cannot always be viewed in another shape."""
        if target is torch.ops.aten.view.default:
            target = torch.ops.aten.reshape.default
        return super().call_function(target, args, kwargs)

    def _with_constants(self, node: fx.Node) -> None:
        if node in self.env:
            return
        for source in node.all_input_nodes:
            self._with_constants(source)
        self.env[node] = self.run_node(node)


def bytes_of(values: Iterable[fx.Node]) -> int:
    """Bytes of one example of the values, by the shapes in the graph."""
    total = 0
    for node in values:
        value = node.meta.get("val")
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if isinstance(tensor, Tensor):
                total += prod(hint(size) for size in tensor.shape[1:]) * tensor.element_size()
    return total
