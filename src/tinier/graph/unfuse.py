"""Fused projections taken apart: what is viewed as (…, 3, heads, head size) and then used part by part becomes three slices.

In a tensor with a dimension for the parts all of them have one width; as slices each has a width of its own, so that the values of
an attention need not be as wide as its queries and keys. What the graph computes stays the same to the bit.
"""

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import fx

from tinier.graph.rules import argument, dimension, operator_name

aten = torch.ops.aten
MOST = 8  # a dimension of more positions than this is not one of parts


class Part(NamedTuple):
    """A node that is one part of a fused tensor, its number, its dimensions in those of the view, and whether it was copied."""

    node: fx.Node
    number: int
    dims: tuple[int | None, ...]
    contiguous: bool


def unfuse(module: fx.GraphModule) -> None:
    """Replace, in place, fused tensors that are only used part by part by slices of what they are views of.

    Args:
        module: a traced graph; nodes have their values in ``meta``.

    Cost:
        One pass over the nodes.
    """
    changed = False
    for node in list(module.graph.nodes):
        if node.op == "call_function" and operator_name(node) in ("view", "reshape", "unflatten"):
            for dim in _candidates(node):
                parts = list(_parts(node, dim))
                if parts and all(part is not None for part in parts):
                    _replace(module.graph, node, dim, parts)
                    changed = True
                    break
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()


def _candidates(node: fx.Node) -> list[int]:
    """Dimensions of a view that may be those of parts: short, and all after them of known size."""
    shape, source = node.meta["val"].shape, node.all_input_nodes[0].meta["val"]
    result = []
    for dim in range(1, len(shape) - 1):
        inner = shape[dim:]
        known = all(isinstance(size, int) for size in inner)
        # The last dimension of what is viewed is the parts, and perhaps dimensions before them.
        whole = source.shape[-1]
        inside = known and isinstance(whole, int) and whole % prod(inner) == 0
        if inside and 1 < shape[dim] <= MOST and prod(inner[1:]) > 1:
            result.append(dim)
    return result


def _parts(node: fx.Node, dim: int) -> Iterator[Part | None]:
    """The nodes that are one part each; None where something else is done with the whole."""
    yield from _follow(node, dim, tuple(range(node.meta["val"].ndim)), False)


def _follow(
    node: fx.Node, dim: int, dims: tuple[int | None, ...], contiguous: bool
) -> Iterator[Part | None]:
    for user in node.users:
        name, here = operator_name(user), list(dims)
        if user.op != "call_function" or user.args[0] is not node or len(user.all_input_nodes) != 1:
            yield None
        elif name == "permute":
            order: Any = argument(user, 1, "dims")
            yield from _follow(user, dim, tuple(here[d] for d in order), contiguous)
        elif name == "transpose":
            first, second = (dimension(int(user.args[i]), len(here)) for i in (1, 2))  # type: ignore[arg-type]
            here[first], here[second] = here[second], here[first]
            yield from _follow(user, dim, tuple(here), contiguous)
        elif name == "unsqueeze":
            here.insert(dimension(int(user.args[1]), len(here) + 1), None)  # type: ignore[arg-type]
            yield from _follow(user, dim, tuple(here), contiguous)
        elif name == "squeeze" and isinstance(user.args[1:], tuple) and type(user.args[-1]) is int:
            place = dimension(user.args[-1], len(here))
            if here[place] is not None:
                yield None
                continue
            yield from _follow(user, dim, tuple(here[:place] + here[place + 1 :]), contiguous)
        elif name in ("contiguous", "clone"):
            yield from _follow(user, dim, dims, True)
        elif name == "slice" and _same_shape(user, node):
            yield from _follow(user, dim, dims, contiguous)
        elif name in ("unbind", "select"):
            yield from _ends(user, name, dim, here, contiguous)
        else:
            yield None


def _ends(
    user: fx.Node, name: str, dim: int, here: list[int | None], contiguous: bool
) -> Iterator[Part | None]:
    place = dimension(int(argument(user, 1, "dim", 0)), len(here))
    rest = tuple(here[:place] + here[place + 1 :])
    if here[place] != dim or None in rest:
        yield None
    elif name == "select":
        index = argument(user, 2, "index")
        if not isinstance(index, int):
            yield None
        else:
            yield from _safe(user, index % _size(user, place), rest, contiguous)
    else:
        for item in user.users:
            yield from _safe(item, int(item.args[1]), rest, contiguous)  # type: ignore[arg-type]


def _size(node: fx.Node, place: int) -> int:
    return int(node.all_input_nodes[0].meta["val"].shape[place])


def _safe(
    node: fx.Node, index: int, rest: tuple[int | None, ...], contiguous: bool
) -> Iterator[Part | None]:
    """A part, unless something writes into it, which the fused tensor would see."""
    written = any(
        isinstance(user.target, torch._ops.OpOverload) and user.target._schema.is_mutable
        for user in node.users
    )
    yield None if written else Part(node, index, rest, contiguous)


def _same_shape(node: fx.Node, source: fx.Node) -> bool:
    return str(node.meta["val"].shape) == str(source.meta["val"].shape)


def _replace(graph: fx.Graph, view: fx.Node, dim: int, parts: list[Any]) -> None:
    source: Any = view.args[0]
    shape = view.meta["val"].shape
    rest = [int(size) for size in shape[dim + 1 :]]
    width, lead = prod(rest), _leading(view, dim)
    for part in parts:
        node, number, dims, contiguous = part
        with graph.inserting_before(node):
            whole = source
            direct = source.meta["val"].ndim == dim + 1
            if not direct:
                whole = _add(graph, view, aten.reshape.default, source, [*lead, shape[dim] * width])
            start = number * width
            new = _add(graph, view, aten.slice.Tensor, whole, dim, start, start + width)
            if len(rest) > 1:
                new = _add(graph, view, aten.unflatten.int, new, dim, rest)
            order = [d - (d > dim) for d in dims]
            if order != list(range(len(order))):
                new = _add(graph, node, aten.permute.default, new, order)
            if contiguous:
                new = _add(graph, node, aten.contiguous.default, new)
        node.replace_all_uses_with(new)


def _leading(view: fx.Node, dim: int) -> list[Any]:
    """The sizes before the parts, as a view was given them, or those of the source for ``unflatten``."""
    if operator_name(view) != "unflatten":
        return list(view.args[1])[:dim]  # type: ignore[arg-type]
    return [-1 if not isinstance(size, int) else size for size in view.meta["val"].shape[:dim]]


def _add(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A node with the origin of another, and its value."""
    node = graph.call_function(target, args)

    def value(item: Any) -> Any:
        if isinstance(item, list):
            return [value(each) for each in item]
        return item.meta["val"] if isinstance(item, fx.Node) else item

    first = value(args[0])
    with first.fake_mode:
        result = target(*(value(item) for item in args))
    node.meta = {**like.meta, "val": result}
    return node
