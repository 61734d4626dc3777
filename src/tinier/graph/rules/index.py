"""Operators that take positions out of axes by data or by number."""

from torch import fx

from tinier.graph.axes import UNIT
from tinier.graph.rules.base import Axes, Flow, Result, argument, dimension, rule

BY_DATA = "it is indexed by data"


@rule("embedding")
def embedding(flow: Flow, node: fx.Node) -> Result:
    """Rows are chosen by data, columns pass."""
    weight, indices = flow.of(node.args[0]), flow.of(node.args[1])
    flow.pin(node, weight[0], BY_DATA)
    return [*indices, weight[1]]


@rule("index", "_unsafe_index")
def index(flow: Flow, node: fx.Node) -> Result:
    """Indexed dimensions are chosen by data; the indices' own dimensions take their place."""
    axes = flow.of(node.args[0])
    indices = list(node.args[1])  # type: ignore[arg-type]
    if any(i is not None and i.meta["val"].dtype.is_floating_point is False and "bool" in str(i.meta["val"].dtype) for i in indices):  # type: ignore[union-attr]  # fmt: skip
        flow.pin_all(node, "a mask chooses the positions")
        return flow.opaque(node, "a mask chooses the positions")
    used = [dim for dim, item in enumerate(indices) if item is not None]
    for dim in used:
        flow.pin(node, axes[dim], BY_DATA)
    operands = [flow.of(indices[dim]) for dim in used]
    rank = max((len(operand) for operand in operands), default=0)
    new = flow.broadcast(node, operands, rank)
    together = used == list(range(used[0], used[-1] + 1))
    rest = [axis for dim, axis in enumerate(axes) if dim not in used]
    place = used[0] if together else 0
    return [*rest[:place], *new, *rest[place:]]


@rule("index_select")
def index_select(flow: Flow, node: fx.Node) -> Result:
    """One dimension is chosen by data."""
    axes = list(flow.of(node.args[0]))
    dim = dimension(argument(node, 1, "dim"), len(axes))
    flow.pin(node, axes[dim], BY_DATA)
    axes[dim] = (flow.of(node.args[2]) or [UNIT])[0]
    return axes


@rule("gather", "take_along_dim")
def gather(flow: Flow, node: fx.Node) -> Result:
    """One dimension is chosen by data; the indices must have the other dimensions in full."""
    flow.pin_all(node, BY_DATA)
    return flow.opaque(node, BY_DATA)


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


@rule("flip", "roll", "fft_rfft", "fft_irfft")
def moved(flow: Flow, node: fx.Node) -> Result:
    """Positions move along some dimensions; the others pass."""
    axes = list(flow.of(node.args[0]))
    if "fft" in str(node.target):
        flow.pin_all(node, "a transform mixes the positions")
        return flow.opaque(node, "a transform mixes the positions")
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
