"""Operators that normalise over axes or reduce them."""

from torch import fx

from tinier.graph.axes import UNIT, fresh, mark, product, size
from tinier.graph.rules.base import Axes, Flow, Result, argument, dimension, operator_name, rule

AGGREGATE = """
mean sum amax amin logsumexp norm linalg_vector_norm linalg_norm linalg_matrix_norm var std prod all any count_nonzero
"""
RUNNING = "cumsum cumprod logcumsumexp"


@rule("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "instance_norm")
def batch_norm(flow: Flow, node: fx.Node) -> Result:
    """Each channel (dimension 1) by itself; over the other dimensions where it takes the statistics of what it gets."""
    axes = flow.of(node.args[0])
    for source in node.args[1:5]:
        for axis in flow.of(source)[:1]:
            flow.same(node, axes[1], axis)
    if len(node.args) > 5 and node.args[5] is True:
        for axis in axes[2:]:
            flow.normalised(node, axis)
    if "native" in str(node.target):
        return (list(axes), [], [])
    return list(axes)


@rule("layer_norm", "rms_norm")
def layer_norm(flow: Flow, node: fx.Node) -> Result:
    """Normalised over the last dimensions, each position with a weight of its own."""
    axes = flow.of(node.args[0])
    shape = node.args[1]
    over = axes[len(axes) - len(shape) :]  # type: ignore[arg-type]
    for source in (argument(node, 2, "weight"), argument(node, 3, "bias")):
        for axis, own in zip(over, flow.of(source), strict=False):
            flow.same(node, axis, own)
    for axis in over:
        mark(axis, "normalised")
    return list(axes)


@rule("native_layer_norm")
def native_layer_norm(flow: Flow, node: fx.Node) -> Result:
    """As ``layer_norm``, with the statistics as further results."""
    axes = layer_norm(flow, node)
    assert isinstance(axes, list)
    kept = len(axes) - len(node.args[1])  # type: ignore[arg-type]
    statistics: Axes = [*axes[:kept], *[UNIT] * (len(axes) - kept)]
    return (axes, statistics, list(statistics))


@rule("group_norm")
def group_norm(flow: Flow, node: fx.Node) -> Result:
    """Channels are groups × members, normalised over the members and the spatial dimensions."""
    axes = flow.of(node.args[0])
    groups = argument(node, 1, "num_groups")  # type: ignore[arg-type]
    outer, members = fresh(groups), fresh(size(axes[1]) // groups)
    flow.outer[node] = outer
    flow.same(node, axes[1], product(outer, members))
    for source in (argument(node, 2, "weight"), argument(node, 3, "bias")):
        for own in flow.of(source):
            flow.same(node, axes[1], own)
    mark(members, "normalised")
    return list(axes)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "normalize")
def softmax(flow: Flow, node: fx.Node) -> Result:
    """Normalised over one dimension."""
    axes = flow.of(node.args[0])
    mark(axes[dimension(argument(node, 1, "dim"), len(axes))], "normalised")  # type: ignore[arg-type]
    return list(axes)


@rule("glu")
def glu(flow: Flow, node: fx.Node) -> Result:
    """The two halves of an axis meet position by position."""
    axes = list(flow.of(node.args[0]))
    dim = dimension(int(argument(node, 1, "dim", -1)), len(axes))
    half = size(axes[dim]) // 2
    first, second = flow.parts(node, axes[dim], (half, half))
    axes[dim] = flow.same(node, first, second)
    return axes


@rule(*AGGREGATE.split())
def aggregate(flow: Flow, node: fx.Node) -> Result:
    """Reductions that mean the same over fewer positions."""
    order = argument(node, 1, "p" if operator_name(node) == "norm" else "ord")
    if "norm" in operator_name(node) and isinstance(order, int | float) and order < 0:
        flow.pin_all(node, "a norm of negative order sees zeros")
        return flow.opaque(node, "a norm of negative order sees zeros")
    return _reduced(flow, node, _dims(node))


@rule("var_mean")
def var_mean(flow: Flow, node: fx.Node) -> Result:
    """Two reductions at once."""
    axes = flow.of(node.args[0])
    dims = {dimension(int(dim), len(axes)) for dim in argument(node, 1, "dim") or range(len(axes))}
    keep = bool(node.kwargs.get("keepdim", False))
    for dim in dims:
        flow.normalised(node, axes[dim])
    result: Axes = []
    for dim, axis in enumerate(axes):
        result += [UNIT] if dim in dims and keep else [] if dim in dims else [axis]
    return (result, list(result))


@rule(*RUNNING.split())
def running(flow: Flow, node: fx.Node) -> Result:
    """Running sums and products: what left counted nothing."""
    return list(flow.of(node.args[0]))


def _dims(node: fx.Node) -> list[int] | None:
    """The reduced dimensions; None for all."""
    source = node.args[0]
    rank = source.meta["val"].ndim  # type: ignore[union-attr]
    names = [item.name for item in node.target._schema.arguments]  # type: ignore[union-attr]
    if "dim" not in names:
        return None
    value = argument(node, names.index("dim"), "dim")
    if value is None or value == []:
        return None
    return [dimension(int(dim), rank) for dim in (value if isinstance(value, list) else [value])]


def _reduced(flow: Flow, node: fx.Node, dims: list[int] | None) -> Axes:
    axes = flow.of(node.args[0])
    over = range(len(axes)) if dims is None else dims
    keep = node.meta["val"].ndim == len(axes)
    name = str(node.target)
    if any(f".{kind}." in name for kind in ("mean", "var", "std")):
        for dim in over:
            flow.normalised(node, axes[dim])
    result: Axes = []
    for dim, axis in enumerate(axes):
        if dim not in over:
            result.append(axis)
        elif keep:
            result.append(UNIT)
    return result
