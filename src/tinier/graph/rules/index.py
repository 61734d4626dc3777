"""Operators that take positions out of axes, or put them in, by data or by number."""

from typing import Any

import torch
from torch import fx

from tinier.graph.axes import UNIT, Axis, mark, size
from tinier.graph.rules.base import BY_DATA, Axes, Flow, Result, argument, dimension, rule

MASK = "a mask chooses the positions"


@rule("embedding")
def embedding(flow: Flow, node: fx.Node) -> Result:
    """Rows are chosen by data, columns pass."""
    weight, indices = flow.of(node.args[0]), flow.of(node.args[1])
    flow.chosen(node, weight[0], node.args[1])
    return [*indices, weight[1]]


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(flow: Flow, node: fx.Node) -> Result:
    """Sums or means of rows that are chosen by data; columns pass."""
    weight = flow.of(node.args[0])
    opaque: Any = flow.opaque(node, BY_DATA)
    flow.pin(node, weight[0], BY_DATA)
    for source in node.all_input_nodes[1:]:
        for axis in flow.of(source):
            flow.pin(node, axis, BY_DATA)
    if int(argument(node, 4, "mode", 0)) == 2:  # the maximum's positions are a result
        flow.pin(node, weight[1], "positions of a maximum")
    return ([opaque[0][0], weight[1]], *opaque[1:])


def _is_mask(index: fx.Node | None) -> bool:
    return index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8)


@rule("index", "_unsafe_index")
def index(flow: Flow, node: fx.Node) -> Result:
    """Indexed dimensions are chosen by data; the indices' own dimensions take their place."""
    axes = flow.of(node.args[0])
    indices: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    if any(_is_mask(item) for item in indices):
        return _by_mask(flow, node, axes, indices)
    used = _chosen(flow, node, axes, indices)
    operands = [flow.of(indices[dim]) for dim in used]
    rank = max((len(operand) for operand in operands), default=0)
    new = flow.broadcast(node, operands, rank)
    values = flow.pointed(node.args[0])
    if values is not None:
        flow.points[node, 0] = values
    together = used == list(range(used[0], used[-1] + 1))
    rest = [axis for dim, axis in enumerate(axes) if dim not in used]
    place = used[0] if together else 0
    return [*rest[:place], *new, *rest[place:]]


def _chosen(flow: Flow, node: fx.Node, axes: Axes, indices: list[Any]) -> list[int]:
    """The indexed dimensions; each is what its index points into, or pinned."""
    used = [dim for dim, item in enumerate(indices) if item is not None]
    for dim in used:
        flow.chosen(node, axes[dim], indices[dim])
        if flow.pointed(indices[dim]) is not None and len(axes) > 1:
            mark(axes[dim], "expert")
    return used


def _by_mask(flow: Flow, node: fx.Node, axes: Axes, indices: list[Any]) -> Result:
    """One mask over some dimensions: those are taken together and have as many positions as it is true; the others pass."""
    used = [dim for dim, item in enumerate(indices) if item is not None]
    value = node.meta["val"]
    if len(used) != 1:
        flow.pin_all(node, MASK)
        return flow.opaque(node, MASK)
    first, over = used[0], indices[used[0]].meta["val"].ndim
    for axis in (*axes[first : first + over], *flow.of(indices[first])):
        flow.pin(node, axis, MASK)
    if value.ndim != len(axes) - over + 1:
        flow.pin_all(node, MASK)
        return flow.opaque(node, MASK)
    return [*axes[:first], flow.pinned(node, first, MASK), *axes[first + over :]]


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(flow: Flow, node: fx.Node) -> Result:
    """Positions chosen by data get values, which broadcast against what would be taken there."""
    axes, values = flow.of(node.args[0]), flow.of(node.args[2])
    indices: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    into = [flow.pointed(node.args[place]) for place in (0, 2)]
    for pointed in into:
        if pointed is not None:
            flow.pin(node, pointed, "positions along it are put among numbers")
    used = [dim for dim, item in enumerate(indices) if item is not None]
    if any(_is_mask(item) for item in indices):
        first, over = used[0], indices[used[0]].meta["val"].ndim
        mask = flow.of(indices[first])
        if len(used) == 1 and not any(size(axis) != 1 for axis in values):
            for axis, own in zip(axes[first : first + over], mask, strict=True):
                flow.same(node, axis, own)
        else:
            flow.pin_all(node, MASK)
        return list(axes)
    used = _chosen(flow, node, axes, indices)
    operands = [flow.of(indices[dim]) for dim in used]
    new = flow.broadcast(node, operands, max((len(item) for item in operands), default=0))
    together = used == list(range(used[0], used[-1] + 1))
    rest = [axis for dim, axis in enumerate(axes) if dim not in used]
    place = used[0] if together else 0
    taken = [*rest[:place], *new, *rest[place:]]
    flow.broadcast(node, [taken, values], len(taken))
    return list(axes)


@rule("index_select")
def index_select(flow: Flow, node: fx.Node) -> Result:
    """One dimension is chosen by data."""
    axes = list(flow.of(node.args[0]))
    dim = dimension(argument(node, 1, "dim"), len(axes))
    flow.chosen(node, axes[dim], node.args[2])
    values = flow.pointed(node.args[0])
    if values is not None:
        flow.points[node, 0] = values
    axes[dim] = (flow.of(node.args[2]) or [UNIT])[0]
    return axes


@rule("gather", "take_along_dim")
def gather(flow: Flow, node: fx.Node) -> Result:
    """One dimension is chosen by data; along the others the indices have each position or the first few."""
    axes = flow.of(node.args[0])
    place = 1 if "gather" in str(node.target) else 2
    by = node.args[2] if place == 1 else node.args[1]
    indices = flow.of(by)
    given = argument(node, place, "dim")
    if given is None or len(indices) != len(axes):
        flow.pin_all(node, BY_DATA)
        return flow.opaque(node, BY_DATA)
    dim = dimension(int(given), len(axes))
    flow.chosen(node, axes[dim], by)
    values = flow.pointed(node.args[0])
    if values is not None:
        flow.points[node, 0] = values
    result = list(indices)
    for other, (axis, own) in enumerate(zip(axes, indices, strict=True)):
        if other != dim:
            result[other] = _aligned(flow, node, axis, own)
    return result


def _aligned(flow: Flow, node: fx.Node, axis: Axis, own: Axis) -> Axis:
    """The axis of an index along a dimension that it does not choose from."""
    if size(axis) == size(own):
        return flow.same(node, own, axis)
    for held in (axis, own):
        flow.pin(node, held, "indices for the first few positions only")
    return own


@rule("scatter", "scatter_add", "scatter_reduce", "scatter_reduce_")
def scatter(flow: Flow, node: fx.Node) -> Result:
    """Values are put at positions of one dimension that are chosen by data; the other dimensions pass."""
    axes, indices = list(flow.of(node.args[0])), flow.of(node.args[2])
    values = flow.of(argument(node, 3, "src"))
    dim = dimension(int(argument(node, 1, "dim")), len(axes))
    for place in (0, 3):
        into = flow.pointed(node.args[place]) if place < len(node.args) else None
        if into is not None:
            flow.pin(node, into, "positions along it are put among numbers")
    flow.chosen(node, axes[dim], node.args[2])
    for other, own in enumerate(indices):
        if other != dim:
            _aligned(flow, node, axes[other], own)
        if len(values) == len(indices):
            _aligned(flow, node, values[other], own)
    return axes


@rule("index_add", "index_copy", "index_fill")
def put(flow: Flow, node: fx.Node) -> Result:
    """Slices are put at positions of one dimension that are chosen by data; the other dimensions pass."""
    axes, values = list(flow.of(node.args[0])), flow.of(argument(node, 3, "source"))
    for place in (0, 3):
        into = flow.pointed(node.args[place]) if place < len(node.args) else None
        if into is not None:
            flow.pin(node, into, "positions along it are put among numbers")
    dim = dimension(int(argument(node, 1, "dim")), len(axes))
    flow.chosen(node, axes[dim], node.args[2])
    for other, axis in enumerate(values) if len(values) == len(axes) else ():
        flow.same(node, axis, axes[other] if other != dim else flow.of(node.args[2])[0])
    return axes


@rule("masked_scatter")
def masked_scatter(flow: Flow, node: fx.Node) -> Result:
    """The source's elements in order where the mask is true; a mask that is repeated along a dimension moves whole rows of it."""
    axes, mask, source = (flow.of(argument) for argument in node.args[:3])
    rows = _repeated_last(node.args[1]) and bool(source) and size(source[-1]) == size(axes[-1])  # type: ignore[arg-type]
    if rows and len(mask) == len(axes):
        flow.same(node, axes[-1], mask[-1])
        flow.same(node, axes[-1], source[-1])
        for axis in (*axes[:-1], *mask[:-1], *source[:-1]):
            flow.pin(node, axis, MASK)
    else:
        flow.pin_all(node, MASK)
    return list(axes)


def _repeated_last(node: Any) -> bool:
    """Whether a tensor has the same values at each position of its last dimension, because it was expanded along it."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        name = str(node.target)
        source: Any = node.args[0]
        if not isinstance(source, fx.Node):
            return False
        value = source.meta["val"]
        if "expand" in name:
            return value.ndim > 0 and value.shape[-1] == 1
        if not any(kind in name for kind in (".to.", "clone", "contiguous", "_to_copy")):
            return False
        node = source
    return False


@rule("select")
def select(flow: Flow, node: fx.Node) -> Result:
    """One position of an axis, by its number."""
    axes = list(flow.of(node.args[0]))
    dim = dimension(argument(node, 1, "dim"), len(axes))
    flow.pin(node, axes[dim], "a position is chosen by its number")
    return axes[:dim] + axes[dim + 1 :]


@rule("unbind")
def unbind(flow: Flow, node: fx.Node) -> Result:
    """Every position of an axis, one by one."""
    axes = list(flow.of(node.args[0]))
    dim = dimension(int(argument(node, 1, "dim", 0)), len(axes))
    flow.pin(node, axes[dim], "its positions are used one by one")
    rest = axes[:dim] + axes[dim + 1 :]
    return tuple(list(rest) for _ in node.meta["val"])


@rule("flip", "roll")
def moved(flow: Flow, node: fx.Node) -> Result:
    """Positions move along some dimensions; the others pass."""
    axes = list(flow.of(node.args[0]))
    dims = argument(node, 1 if "flip" in str(node.target) else 2, "dims") or range(len(axes))
    for dim in dims:
        flow.pin(node, axes[dimension(int(dim), len(axes))], "positions move along it")
    return axes


@rule("stack")
def stack(flow: Flow, node: fx.Node) -> Result:
    """A new axis of the operands, which are alike."""
    operands = [flow.of(source) for source in node.args[0]]  # type: ignore[union-attr]
    axes: Axes = flow.broadcast(node, operands, len(operands[0]))
    dim = dimension(int(argument(node, 1, "dim", 0)), len(axes) + 1)
    return [*axes[:dim], flow.pinned(node, dim, "stacked operands"), *axes[dim:]]
