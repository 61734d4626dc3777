"""Whether two graphs are one: the same operators, in the same order, with the same arguments and the same constants."""

from typing import Any

from torch import Tensor, fx


def same_graph(first: fx.GraphModule, second: fx.GraphModule) -> bool:
    """Whether two modules compute the same because they are the same, node by node; no operator is run.

    Args:
        first: its parameters and buffers are compared with those of the same name in the other, by place in memory, else by value.
        second: the other.

    Returns:
        True if nothing differs; False says nothing about what they compute.

    Cost:
        Milliseconds for a hundred operators, and one pass over tensors that they do not share.
    """
    numbers: dict[fx.Node, int] = {}
    theirs: dict[fx.Node, int] = {}
    nodes, others = list(first.graph.nodes), list(second.graph.nodes)
    if len(nodes) != len(others):
        return False
    for index, (node, other) in enumerate(zip(nodes, others, strict=True)):
        numbers[node], theirs[other] = index, index
        if node.op != other.op:
            return False
        if node.op != "output" and node.target != other.target:
            return False
        if node.op == "get_attr":
            a, b = _tensor(first, node.target), _tensor(second, node.target)
            if a is None or b is None or not _same_tensor(a, b):
                return False
        if _plain(node.args, numbers) != _plain(other.args, theirs):
            return False
        if _plain(node.kwargs, numbers) != _plain(other.kwargs, theirs):
            return False
    return True


def _plain(value: Any, numbers: dict[fx.Node, int]) -> Any:
    """An argument with the place of a node for the node, and the type of everything, for 1 == 1.0 == True."""
    if isinstance(value, fx.Node):
        return fx.Node, numbers[value]
    if isinstance(value, list | tuple):
        return [_plain(item, numbers) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, numbers) for key, item in value.items()}
    if isinstance(value, slice):
        return slice, [_plain(item, numbers) for item in (value.start, value.stop, value.step)]
    return type(value), repr(value) if isinstance(value, float) else value


def _tensor(module: fx.GraphModule, name: str) -> Tensor | None:
    found: Any = module
    for step in name.split("."):
        found = getattr(found, step, None)
    return found if isinstance(found, Tensor) else None


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.is_meta:
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    same = a == b
    return bool((same | (a.isnan() & b.isnan())).all())
