"""Run a graph once, then again from one node on: what a change there does to the outputs, without computing again what comes before."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tinier.graph.round_trip import call
from tinier.graph.rules.base import hint


class Rerun(fx.Interpreter):
    """The values of every node for one batch, and what the outputs become when a node reads others.

    Args:
        module: a traced or folded graph; not changed.
        inputs: in the order of its placeholders.

    Cost:
        One run of the graph and the memory of all its values.
    """

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.order = list(module.graph.nodes)
        with torch.no_grad():
            self.outputs = leaves(self.run(*(value.clone() for value in inputs)))
        self.values = dict(self.env)

    def run_node(self, node: fx.Node) -> Any:
        """What a node gives."""
        if node.op != "call_function":
            return super().run_node(node)
        return call(node, *self.fetch_args_kwargs_from_env(node))

    def with_arguments(self, reader: fx.Node, changed: Mapping[fx.Node, Any]) -> tuple[Tensor, ...]:
        """The outputs when ``reader`` reads other values of some of its inputs, and all else reads what it reads.

        Args:
            reader: a node of the graph.
            changed: input of ``reader`` → the value that it reads.

        Cost:
            A run of the nodes that depend on ``reader``.
        """
        self.env = dict(self.values)
        self.env.update(changed)
        with torch.no_grad():
            fresh = {reader: self.run_node(reader)}
        return self._rest(fresh)

    def with_value(self, node: fx.Node, value: Any) -> tuple[Tensor, ...]:
        """The outputs when a node has another value."""
        return self._rest({node: value})

    def with_reads(
        self, reads: Mapping[fx.Node, Mapping[fx.Node, Callable[[Any], Any]]]
    ) -> tuple[Tensor, ...]:
        """The outputs when several nodes read other values, each made of what the input has become by then.

        Args:
            reads: node → input of it → what it reads of the input's value.

        Cost:
            A run of the nodes that depend on one of them.
        """
        env, done = dict(self.values), set[fx.Node]()
        with torch.no_grad():
            for node in self.order:
                own = reads.get(node, {})
                if not own and not any(source in done for source in node.all_input_nodes):
                    continue
                self.env = {**env, **{source: by(env[source]) for source, by in own.items()}}
                if node.op == "output":
                    return leaves(self.run_node(node))
                env[node] = self.run_node(node)
                done.add(node)
        return self.outputs

    def _rest(self, fresh: dict[fx.Node, Any]) -> tuple[Tensor, ...]:
        self.env = {**self.values, **fresh}
        start = min(self.order.index(node) for node in fresh)
        done = set(fresh)
        with torch.no_grad():
            for node in self.order[start + 1 :]:
                if any(source in done for source in node.all_input_nodes):
                    if node.op == "output":
                        return leaves(self.run_node(node))
                    self.env[node] = self.run_node(node)
                    done.add(node)
        return self.outputs


def leaves(value: Any) -> tuple[Tensor, ...]:
    """The tensors of what a graph returns, in order."""
    if isinstance(value, Tensor):
        return (value,)
    items = value.values() if isinstance(value, Mapping) else value
    return tuple(leaf for item in items for leaf in leaves(item))


def value_bytes(module: fx.GraphModule) -> int:
    """Bytes of all values of a graph for the example that it was traced with."""
    total = 0
    for node in module.graph.nodes:
        found = node.meta.get("val")
        for value in found if isinstance(found, list | tuple) else [found]:
            if node.op != "get_attr" and isinstance(value, Tensor):
                size = value.element_size()
                for length in value.shape:
                    size *= hint(length)
                total += size
    return total
