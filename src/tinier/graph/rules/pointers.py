"""Integers that are positions along an axis: who makes them, who hands them on, who chooses by them.

Top-k over the router's logits gives positions along the experts; indexing the stacked weights of the experts by them makes both axes
the same, so that experts can leave: positions are then counted among those that stay, which keeps their order. An operator that
computes with such positions as numbers pins the axis.
"""

from torch import fx

from tinier.graph.axes import UNIT, Axis, atoms, concat, fresh, mark, size
from tinier.graph.rules.base import Axes, Flow, Result, argument, dimension, operator_name, rule

# They hand on the values of their first argument (or of each operand).
CARRIERS = """
view reshape _unsafe_view view_copy _reshape_alias flatten unflatten permute transpose swapaxes swapdims t numpy_T mT movedim
moveaxis unsqueeze squeeze expand expand_as broadcast_to repeat tile repeat_interleave slice narrow select unbind split
split_with_sizes chunk tensor_split unsafe_split to _to_copy to_copy clone contiguous detach alias lift_fresh_copy type_as flip roll
cat concat concatenate stack sort unique_dim diagonal
"""
# Their rules know what to do with positions, or look at shapes only.
READERS = """
index _unsafe_index index_put _index_put_impl _unsafe_index_put gather take_along_dim scatter scatter_add scatter_reduce embedding
index_select index_add index_copy index_fill one_hot histc argmax argmin argsort sym_size sym_numel sym_stride zeros_like ones_like
full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty _assert_tensor_metadata
"""
COMPARISONS = "eq ne lt le gt ge not_equal less greater less_equal greater_equal"
_CARRIERS, _READERS, _COMPARISONS = (
    frozenset(names.split()) for names in (CARRIERS, READERS, COMPARISONS)
)
AS_NUMBERS = "positions along it are used as numbers"


def follow(flow: Flow, node: fx.Node) -> None:
    """Note into which axis the integers of a node point; pin an axis whose positions are computed with."""
    name = operator_name(node)
    if not flow.points or name in _READERS:
        return
    sources = [s for s in node.all_input_nodes if flow.pointed(s) is not None]
    if not sources:
        return
    into = flow.pointed(sources[0])
    assert into is not None
    operands = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
    if name in _CARRIERS and all(operand in sources for operand in operands):
        for other in sources[1:]:
            _alike(flow, node, into, other)
        results = node.meta["val"] if isinstance(node.meta["val"], list | tuple) else [None]
        for index in range(1 if name in ("sort", "unique_dim") else len(results)):
            flow.points[node, index] = into
    elif name in _COMPARISONS and len(sources) == len(node.args) == 2:
        _alike(flow, node, into, sources[1])
    else:
        for source in sources:
            flow.pin(node, flow.points[source, 0], AS_NUMBERS)


def _alike(flow: Flow, node: fx.Node, into: Axis, other: fx.Node) -> None:
    second = flow.points[other, 0]
    if size(into) == size(second):
        flow.same(node, into, second)
    else:
        flow.pin(node, into, AS_NUMBERS)
        flow.pin(node, second, AS_NUMBERS)


def _dim(node: fx.Node, position: int, default: int | None) -> int | None:
    value = argument(node, position, "dim", default)
    rank = node.args[0].meta["val"].ndim  # type: ignore[union-attr]
    return None if value is None else dimension(int(value), rank)


@rule("topk")
def topk(flow: Flow, node: fx.Node) -> Result:
    """The largest of the positions that are there, at least k of them, and where they are."""
    axes: Axes = list(flow.of(node.args[0]))
    dim, number = _dim(node, 2, -1), argument(node, 1, "k")
    assert dim is not None
    if not isinstance(number, int):
        flow.pin_all(node, "how many are chosen depends on a free size")
        return flow.opaque(node, "how many are chosen depends on a free size")
    into = axes[dim]
    for atom in atoms(into):
        atom.minimum = max(atom.minimum, min(number, atom.size))
    flow.points[node, 1] = into
    axes[dim] = fresh(number)
    flow.pin(node, axes[dim], "as many as are chosen")
    return axes, list(axes)


@rule("argmax", "argmin", "max", "min")
def largest(flow: Flow, node: fx.Node) -> Result:
    """The largest of the positions that are there, and where it is."""
    axes: Axes = list(flow.of(node.args[0]))
    value = node.meta["val"]
    if len(node.args) > 1 and isinstance(node.args[1], fx.Node):  # max(a, b), element by element
        return flow.broadcast(node, [axes, flow.of(node.args[1])], value.ndim)
    name, dim = operator_name(node), _dim(node, 1, None)
    if dim is None:
        if name.startswith("arg"):
            flow.pin_all(node, "a position among all")
        return []
    keep = (value[0] if isinstance(value, list | tuple) else value).ndim == len(axes)
    into = axes[dim]
    rest = [*axes[:dim], *([UNIT] if keep else []), *axes[dim + 1 :]]
    flow.points[node, 0 if name.startswith("arg") else 1] = into
    return rest if name.startswith("arg") else (rest, list(rest))


@rule("sort", "argsort", "kthvalue", "median", "nanmedian", "mode", "cummax", "cummin")
def ordered(flow: Flow, node: fx.Node) -> Result:
    """The result depends on which positions there are: the axis stays whole."""
    axes: Axes = list(flow.of(node.args[0]))
    schema = [item.name for item in node.target._schema.arguments]  # type: ignore[union-attr]
    dim = _dim(node, schema.index("dim"), -1) if "dim" in schema else None
    for axis in axes if dim is None else [axes[dim]]:
        flow.pin(node, axis, "the result depends on the positions that there are")
    value = node.meta["val"]
    if dim is None:
        return []
    many = isinstance(value, list | tuple)
    flow.points[node, 1 if many else 0] = axes[dim]
    if (value[0] if many else value).ndim < len(axes):
        axes = axes[:dim] + axes[dim + 1 :]
    elif (value[0] if many else value).shape[dim] == 1:
        axes[dim] = UNIT
    return (axes, list(axes)) if many else axes


@rule("one_hot")
def one_hot(flow: Flow, node: fx.Node) -> Result:
    """The axis that the positions point into, and perhaps more after it."""
    into, count = flow.pointed(node.args[0]), flow.shape(node)[-1]
    if into is None or count < size(into) or not flow.fixed(node, -1):
        if into is not None:
            flow.pin(node, into, AS_NUMBERS)
        return [*flow.of(node.args[0]), flow.pinned(node, -1, "numbers become positions")]
    more = [fresh(1) for _ in range(count - size(into))]
    return [*flow.of(node.args[0]), concat(into, *more)]


@rule("histc")
def histc(flow: Flow, node: fx.Node) -> Result:
    """How often each position occurs, if there is one bin for each; else numbers."""
    into = flow.pointed(node.args[0])
    bins = argument(node, 1, "bins", 100)
    span = (argument(node, 2, "min", 0), argument(node, 3, "max", 0))
    if into is not None and size(into) == bins and span == (0, bins - 1):
        return [into]
    if into is not None:
        flow.pin(node, into, AS_NUMBERS)
    return flow.opaque(node, "a histogram of numbers")


@rule("arange")
def arange(flow: Flow, node: fx.Node) -> Result:
    """0, 1, 2, … of a known number: positions along the axis itself."""
    plain = all(not isinstance(value, float) for value in node.args)
    start = node.args[0] if len(node.args) > 1 else 0
    step = node.args[2] if len(node.args) > 2 else 1
    if not plain or start != 0 or step != 1 or not flow.fixed(node, 0):
        return flow.opaque(node, "its values depend on the position")
    axis = flow.free(node, 0)
    flow.points[node, 0] = axis
    return [axis]


@rule("grouped_mm_fallback", "_grouped_mm")
def grouped_matmul(flow: Flow, node: fx.Node) -> Result:
    """y[s, n] = Σₖ x[s, k] w[e(s), k, n]: rows sorted by expert, ``offs`` where each expert's rows end."""
    x, weight = flow.of(node.args[0]), flow.of(node.args[1])
    ends = flow.of(argument(node, 2, "offs"))
    if len(x) != 2 or len(weight) != 3 or len(ends) != 1:
        flow.pin_all(node, "a grouped product of this form")
        return flow.opaque(node, "a grouped product of this form")
    flow.same(node, x[1], weight[1])
    flow.same(node, ends[0], weight[0])
    mark(weight[0], "expert")
    bias = flow.of(argument(node, 3, "bias"))
    if bias:
        flow.same(node, bias[-1], weight[2])
    return [x[0], weight[2]]
