"""Operators that regroup, reorder, join and split axes."""

from torch import fx

from tinier.graph.axes import (
    UNIT,
    Axis,
    Mismatch,
    concat,
    fresh,
    halves,
    mark,
    product,
    regroup,
    size,
)
from tinier.graph.rules.base import Flow, Result, argument, dimension, hint, rule

STEPS = "a step of a slice"


@rule("view", "reshape", "_unsafe_view", "view_copy", "_reshape_alias", "flatten", "unflatten")
def view(flow: Flow, node: fx.Node) -> Result:
    """Row-major regrouping: an axis that is taken apart becomes a product everywhere."""
    axes, shape = flow.of(node.args[0]), flow.shape(node)
    if "dtype" in str(node.target):
        flow.pin_all(node, "its bits are read as another type")
        return flow.opaque(node, "its bits are read as another type")
    try:
        result = regroup(axes, shape)
    except (Mismatch, IndexError) as error:
        reason = f"{[size(axis) for axis in axes]} seen as {shape} is no regrouping: {error}"
        for axis in axes:
            flow.pin(node, axis, reason)
        return flow.opaque(node, reason)
    return [
        flow.free(node, dim) if axis == UNIT and not flow.fixed(node, dim) else axis
        for dim, axis in enumerate(result)
    ]


@rule("reshape_as", "view_as")
def view_as(flow: Flow, node: fx.Node) -> Result:
    """A view to the shape of another tensor, whose axes it then has."""
    result, like = view(flow, node), flow.of(node.args[1])
    for axis, other in zip(result, like, strict=True):  # type: ignore[arg-type]
        flow.same(node, axis, other)  # type: ignore[arg-type]
    return result


@rule("permute")
def permute(flow: Flow, node: fx.Node) -> Result:
    """Reordered dimensions."""
    axes = flow.of(node.args[0])
    return [axes[dim] for dim in argument(node, 1, "dims")]


@rule("transpose", "swapaxes", "swapdims")
def transpose(flow: Flow, node: fx.Node) -> Result:
    """Two dimensions exchanged."""
    axes = list(flow.of(node.args[0]))
    first, second = (dimension(argument(node, place, "dim"), len(axes)) for place in (1, 2))
    axes[first], axes[second] = axes[second], axes[first]
    return axes


@rule("t", "numpy_T", "mT", "adjoint")
def turned(flow: Flow, node: fx.Node) -> Result:
    """The last two dimensions exchanged, or for ``numpy_T`` all reversed."""
    axes = list(flow.of(node.args[0]))
    if len(axes) < 2 or "numpy_T" in str(node.target):
        return axes[::-1]
    return [*axes[:-2], axes[-1], axes[-2]]


@rule("movedim", "moveaxis")
def movedim(flow: Flow, node: fx.Node) -> Result:
    """Some dimensions at new places, the others in order."""
    axes = flow.of(node.args[0])
    pairs = [item if isinstance(item, list) else [item] for item in node.args[1:3]]
    sources = [dimension(int(dim), len(axes)) for dim in pairs[0]]  # type: ignore[arg-type]
    targets = [dimension(int(dim), len(axes)) for dim in pairs[1]]  # type: ignore[arg-type]
    order: list[int] = [dim for dim in range(len(axes)) if dim not in sources]
    for target, source in sorted(zip(targets, sources, strict=True)):
        order.insert(target, source)
    return [axes[dim] for dim in order]


@rule("unsqueeze")
def unsqueeze(flow: Flow, node: fx.Node) -> Result:
    """One more dimension of size 1."""
    axes = list(flow.of(node.args[0]))
    axes.insert(dimension(argument(node, 1, "dim"), len(axes) + 1), UNIT)
    return axes


@rule("squeeze")
def squeeze(flow: Flow, node: fx.Node) -> Result:
    """Dimensions of size 1 leave."""
    axes, shape = flow.of(node.args[0]), flow.shape(node.args[0])  # type: ignore[arg-type]
    dims = argument(node, 1, "dim")
    if dims is None:
        return [axis for axis, length in zip(axes, shape, strict=True) if length != 1]
    named = {dimension(int(d), len(axes)) for d in (dims if isinstance(dims, list) else [dims])}
    return [axis for dim, axis in enumerate(axes) if dim not in named or shape[dim] != 1]


@rule("expand", "expand_as", "broadcast_to")
def expand(flow: Flow, node: fx.Node) -> Result:
    """Dimensions of size 1 are repeated: a new axis that others decide on."""
    axes, rank = flow.of(node.args[0]), node.meta["val"].ndim
    axes = [*[UNIT] * (rank - len(axes)), *axes]
    return [
        _repeated(flow.free(node, dim)) if axis == UNIT and flow.shape(node)[dim] != 1 else axis
        for dim, axis in enumerate(axes)
    ]


@rule("broadcast_tensors")
def broadcast_tensors(flow: Flow, node: fx.Node) -> Result:
    """Every operand with the axes that all of them have together."""
    operands = [flow.of(source) for source in node.args[0]]  # type: ignore[union-attr]
    axes = flow.broadcast(node, operands, max(len(operand) for operand in operands))
    return tuple(list(axes) for _ in operands)


@rule("repeat", "tile")
def repeat(flow: Flow, node: fx.Node) -> Result:
    """Whole axes again and again: repeats × axis."""
    axes, shape = flow.of(node.args[0]), flow.shape(node)
    axes = [*[UNIT] * (len(shape) - len(axes)), *axes]
    return [_times(flow, node, dim, axis, True) for dim, axis in enumerate(axes)]


@rule("repeat_interleave")
def repeat_interleave(flow: Flow, node: fx.Node) -> Result:
    """Each position again and again: axis × repeats."""
    axes, dim = list(flow.of(node.args[0])), argument(node, 2, "dim")
    if dim is None or not isinstance(node.args[1], int):
        flow.pin_all(node, "repeated by data")
        return flow.opaque(node, "repeated by data")
    dim = dimension(int(dim), len(axes))
    axes[dim] = _times(flow, node, dim, axes[dim], False)
    return axes


def _times(flow: Flow, node: fx.Node, dim: int, axis: Axis, outer: bool) -> Axis:
    times = flow.shape(node)[dim] // max(size(axis), 1)
    if times == 1:
        return axis
    if axis == UNIT:
        return _repeated(flow.free(node, dim))
    again = _repeated(fresh(times))
    if not flow.fixed(node, dim):
        flow.pin(node, again, "its size is free (batch or sequence)")
    return product(again, axis) if outer else product(axis, again)


def _repeated(axis: Axis) -> Axis:
    mark(axis, "repeated")
    return axis


@rule("cat", "concat", "concatenate")
def cat(flow: Flow, node: fx.Node) -> Result:
    """Axes end to end; the other dimensions are the same."""
    operands = [flow.of(source) for source in node.args[0]]  # type: ignore[union-attr]
    rank = node.meta["val"].ndim
    operands = [axes for axes in operands if len(axes) == rank]
    dim = dimension(int(argument(node, 1, "dim", 0)), rank)
    result = list(operands[0])
    for other in range(rank):
        if other != dim:
            result[other] = flow.broadcast(node, [[axes[other]] for axes in operands], 1)[0]
    joined = concat(*(axes[dim] for axes in operands))
    if not flow.fixed(node, dim):
        flow.pin(node, joined, "its size is free (batch or sequence)")
    result[dim] = joined
    return result


@rule("split", "split_with_sizes", "chunk", "tensor_split", "split_copy", "unsafe_split", "hsplit")
def split(flow: Flow, node: fx.Node) -> Result:
    """An axis taken apart end to end."""
    axes = flow.of(node.args[0])
    dim = dimension(int(argument(node, 2, "dim", 0)), len(axes))
    sizes = tuple(hint(item.shape[dim]) for item in node.meta["val"])
    parts = flow.parts(node, axes[dim], sizes)
    return tuple([*axes[:dim], part, *axes[dim + 1 :]] for part in parts)


@rule("slice", "narrow")
def take(flow: Flow, node: fx.Node) -> Result:
    """A stretch of an axis; the axis becomes what is before, in and after it."""
    axes = list(flow.of(node.args[0]))
    dim = dimension(int(argument(node, 1, "dim", 0)), len(axes))
    whole, length = size(axes[dim]), flow.shape(node)[dim]
    if whole == length:
        return axes
    start, step = argument(node, 2, "start", 0), argument(node, 4, "step", 1)
    if start is None:
        start = 0
    source = node.args[0]
    if (
        step != 1
        and flow.fixed(source, dim)  # type: ignore[arg-type]
        and _every(start, argument(node, 3, "end"), step, whole)
    ):
        try:
            axes[dim], inner = halves(axes[dim], whole // step)
        except Mismatch as error:
            flow.pin(node, axes[dim], f"taken at steps where it cannot be: {error}")
            axes[dim] = flow.pinned(node, dim, "taken at steps")
        else:
            flow.pin(node, inner, STEPS)
        return axes
    if not isinstance(start, int) or step != 1 or not flow.fixed(source, dim):  # type: ignore[arg-type]
        reason = "taken at steps" if step != 1 else "taken at places that depend on free sizes"
        flow.pin(node, axes[dim], reason)
        axes[dim] = flow.pinned(node, dim, reason)
        return axes
    start = min(start + whole if start < 0 else start, whole)
    before = (start,) if start else ()
    after = (whole - start - length,) if whole - start - length else ()
    axes[dim] = flow.parts(node, axes[dim], (*before, length, *after))[len(before)]
    return axes


def _every(start: object, end: object, step: int, whole: int) -> bool:
    """Whether a slice takes one of each ``step`` positions, from the first to the last."""
    starts = isinstance(start, int) and 0 <= start < step
    return starts and whole % step == 0 and (end is None or (isinstance(end, int) and end >= whole))


@rule("slice_scatter")
def slice_scatter(flow: Flow, node: fx.Node) -> Result:
    """A stretch of an axis gets other values: the axis becomes what is before, in and after it."""
    axes, source = list(flow.of(node.args[0])), flow.of(node.args[1])
    dim = dimension(int(argument(node, 2, "dim", 0)), len(axes))
    for other, axis in enumerate(source):
        if other != dim:
            flow.same(node, axes[other], axis)
    whole, length = size(axes[dim]), size(source[dim])
    if whole == length:
        flow.same(node, axes[dim], source[dim])
    else:  # where it starts is a constant of the graph
        for axis in (axes[dim], source[dim]):
            flow.pin(node, axis, "a stretch of it gets other values")
    return axes


@rule("select_scatter")
def select_scatter(flow: Flow, node: fx.Node) -> Result:
    """One position of an axis gets other values."""
    axes, source = list(flow.of(node.args[0])), flow.of(node.args[1])
    dim = dimension(int(argument(node, 2, "dim")), len(axes))
    flow.pin(node, axes[dim], "a position is chosen by its number")
    for axis, own in zip(axes[:dim] + axes[dim + 1 :], source, strict=True):
        flow.same(node, axis, own)
    return axes


@rule("unfold")
def unfold(flow: Flow, node: fx.Node) -> Result:
    """Windows along one dimension, their positions as a last dimension; the others pass."""
    axes = list(flow.of(node.args[0]))
    dim = dimension(int(argument(node, 1, "dimension")), len(axes))
    flow.pin(node, axes[dim], "windows along it")
    axes[dim] = flow.pinned(node, dim, "windows along it")
    return [*axes, flow.pinned(node, len(axes), "windows along it")]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(flow: Flow, node: fx.Node) -> Result:
    """Channels are groups × members, and become members × groups."""
    axes = list(flow.of(node.args[0]))
    groups = int(argument(node, 1, "groups"))
    outer, members = fresh(groups), fresh(size(axes[1]) // groups)
    flow.outer[node] = outer
    flow.same(node, axes[1], product(outer, members))
    axes[1] = product(members, outer)
    return axes


@rule("pad", "constant_pad_nd")
def pad(flow: Flow, node: fx.Node) -> Result:
    """A constant before and after an axis: three parts of which the middle is the axis."""
    axes = list(flow.of(node.args[0]))
    constant = "pad_nd" in str(node.target) or argument(node, 2, "mode", "constant") == "constant"
    amounts = list(node.args[1])  # type: ignore[arg-type]
    for index in range(len(amounts) // 2):
        dim = len(axes) - 1 - index
        before, after = amounts[2 * index : 2 * index + 2]
        if before == 0 and after == 0:
            continue
        ints = isinstance(before, int) and isinstance(after, int)
        plain = ints and min(before, after) >= 0
        if constant and plain and flow.fixed(node, dim):
            axes[dim] = concat(fresh(before), axes[dim], fresh(after))
        elif constant and ints and flow.fixed(node, dim) and max(before, after) <= 0:
            sizes = (-before, size(axes[dim]) + before + after, -after)
            pieces = flow.parts(node, axes[dim], tuple(length for length in sizes if length))
            axes[dim] = pieces[1 if before else 0]
        else:
            flow.pin(node, axes[dim], "padded or cropped")
            axes[dim] = flow.pinned(node, dim, "padded or cropped")
    return axes
