"""Run a graph operator by operator over all examples at once, so that what one operator gives can be changed before the next reads it."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from tinier.graph.fold import read, write
from tinier.graph.round_trip import call
from tinier.graph.rules.base import hint


class Walk:
    """One graph, the values of its nodes for each batch, and the place where it is.

    Values are kept until the last operator that reads them has run; those that do not depend on the inputs are worked out once.

    Attributes:
        module: the graph; what is changed on the way is changed in it.
        nodes: in order.
        values: one dict of node → value for each batch.
        outputs: what the graph returned for each batch, at its end.

    Cost:
        One run of the graph; memory of all values that are alive between two operators for all examples together.
    """

    def __init__(self, module: fx.GraphModule, batches: Sequence[Sequence[Tensor]]) -> None:
        self.module, self.nodes = module, list(module.graph.nodes)
        self.values: list[dict[fx.Node, Any]] = [{} for _ in batches]
        self.outputs: list[tuple[Tensor, ...]] = []
        self._batches, self._at = list(batches), 0
        self._inputs = {n: i for i, n in enumerate(module.graph.find_nodes(op="placeholder"))}
        self._last = fx.Interpreter(module).user_to_last_uses
        self._fixed = _fixed(self.nodes)
        self._changes: dict[fx.Node, Callable[[Tensor], Tensor]] = {}

    def next(self) -> fx.Node | None:
        """The operator that runs next; None at the end."""
        return self.nodes[self._at] if self._at < len(self.nodes) else None

    def step(self) -> fx.Node:
        """Run the next operator for all batches, each of which forgets what no operator reads after it."""
        node = self.nodes[self._at]
        fixed = self._run(node, 0, self.values[0]) if node in self._fixed and self.values else None
        for index in range(len(self.values)):
            self._step(node, index, fixed)
        self._at += 1
        return node

    def add(self, batches: Sequence[Sequence[Tensor]]) -> None:
        """Let further batches catch up, one after the other; values that were changed are changed for them, too."""
        for batch in batches:
            self.values.append({})
            self._batches.append(batch)
            for node in self.nodes[: self._at]:
                index = len(self.values) - 1
                self._step(node, index, None)
                if node in self._changes:
                    self.values[index][node] = self._changes[node](self.values[index][node])

    def to(self, name: str) -> fx.Node | None:
        """Run until the operator of this name is next; None where there is none ahead."""
        while (node := self.next()) is not None and node.name != name:
            self.step()
        return node

    def set(self, name: str, value: Tensor) -> None:
        """Give a parameter or buffer of the module another value; operators that have run keep theirs."""
        write(self.module, name, value)
        for node in self.nodes:
            if node.op == "get_attr" and node.target == name:
                for values in self.values:
                    if node in values:
                        values[node] = value

    def change(self, node: fx.Node, by: Callable[[Tensor], Tensor]) -> None:
        """Put other values where the last operator has run."""
        self._changes[node] = by
        for values in self.values:
            values[node] = by(values[node])

    def _step(self, node: fx.Node, index: int, fixed: Any) -> None:
        values = self.values[index]
        values[node] = self._run(node, index, values) if fixed is None else fixed
        for old in self._last.get(node, ()):
            values.pop(old, None)

    def _run(self, node: fx.Node, index: int, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            return self._batches[index][self._inputs[node]]
        if node.op == "get_attr":
            return read(self.module, str(node.target))
        args: Any = fx.map_arg(node.args, values.__getitem__)
        kwargs: Any = fx.map_arg(node.kwargs, values.__getitem__)
        if node.op == "output":
            found = args[0].values() if isinstance(args[0], dict) else args[0]
            self.outputs.append((found,) if isinstance(found, Tensor) else tuple(found))
            return None
        with torch.no_grad():
            return call(node, args, kwargs)


def _fixed(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Operators that give the same for all batches: weights that are dequantized. What draws at random has no inputs, and is none."""
    result: set[fx.Node] = set()
    for node in nodes:
        sources = node.all_input_nodes if node.op == "call_function" else []
        if sources and all(source.op == "get_attr" or source in result for source in sources):
            result.add(node)
    return result


def alive(module: fx.GraphModule, examples: int) -> dict[str, int]:
    """For each operator the most bytes that one example takes before it and from there on, between two operators.

    Args:
        module: a traced or folded graph.
        examples: how many it was traced with.
    """
    nodes, last = list(module.graph.nodes), fx.Interpreter(module).user_to_last_uses
    fixed, kept = _fixed(nodes), 0
    sizes: dict[fx.Node, int] = {}
    after: list[int] = []
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and node.op != "get_attr" and node not in fixed:
            sizes[node] = prod(hint(n) for n in value.shape) * value.element_size()
        kept += sizes.get(node, 0) - sum(sizes.get(old, 0) for old in last.get(node, ()))
        after.append(kept)
    result, most = {}, 1
    for node, *sizes_of in zip(nodes[::-1], after[::-1], [*after[-2::-1], 0], strict=True):
        most = max(most, *(-(-size // examples) for size in sizes_of))
        result[node.name] = most
    return dict(reversed(result.items()))


def outputs_of(
    module: fx.GraphModule, batches: Sequence[Sequence[Tensor]]
) -> list[tuple[Tensor, ...]]:
    """What a graph returns for each batch, one batch after the other.

    Args:
        module: the graph.
        batches: its inputs, in the order of its placeholders.

    Returns:
        For each batch its outputs.
    """
    result = []
    for batch in batches:
        walk = Walk(module, [batch])
        while walk.next() is not None:
            walk.step()
        result += walk.outputs
    return result
