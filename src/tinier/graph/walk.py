"""Run a graph operator by operator over all examples at once, so that what one operator gives can be changed before the next reads it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tinier.graph.fold import read, write


class Walk:
    """One graph, the values of its nodes for each batch, and the place where it is.

    Values are kept until the last operator that reads them has run.

    Attributes:
        module: the graph; what is changed on the way is changed in it.
        nodes: in order.
        values: one dict of node → value for each batch.
        outputs: what the graph returned for each batch, at its end.

    Cost:
        One run of the graph; memory of all values that are alive for all examples together.
    """

    def __init__(self, module: fx.GraphModule, batches: Sequence[Sequence[Tensor]]) -> None:
        self.module, self.nodes = module, list(module.graph.nodes)
        self.values: list[dict[fx.Node, Any]] = [{} for _ in batches]
        self.outputs: list[tuple[Tensor, ...]] = []
        self._batches, self._at = batches, 0
        self._inputs = {n: i for i, n in enumerate(module.graph.find_nodes(op="placeholder"))}
        self._last = fx.Interpreter(module).user_to_last_uses

    def next(self) -> fx.Node | None:
        """The operator that runs next; None at the end."""
        return self.nodes[self._at] if self._at < len(self.nodes) else None

    def step(self) -> fx.Node:
        """Run the next operator for all batches. What only it read is forgotten with the step after it."""
        node = self.nodes[self._at]
        if self._at:
            for old in self._last.get(self.nodes[self._at - 1], ()):
                for values in self.values:
                    values.pop(old, None)
        with torch.no_grad():
            for index, values in enumerate(self.values):
                values[node] = self._run(node, index, values)
        self._at += 1
        return node

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
        """Put other values where an operator has run."""
        for values in self.values:
            values[node] = by(values[node])

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
        assert callable(node.target)
        return node.target(*args, **kwargs)


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
