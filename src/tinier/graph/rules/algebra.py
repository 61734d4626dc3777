"""Operators of linear algebra and signal processing: norms of weights, distances, products, transforms, complex numbers."""

from torch import fx

from tinier.graph.axes import fresh, mark, product, size
from tinier.graph.rules.base import (
    Axes,
    Flow,
    Result,
    argument,
    dimension,
    hint,
    operator_name,
    rule,
)

SPECTRA = """
fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn
fft_fftshift fft_ifftshift _fft_r2c _fft_c2r _fft_c2c
"""


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(flow: Flow, node: fx.Node) -> Result:
    """w = g · v / ‖v‖, the norm over all dimensions but one, of what is left of them."""
    direction, magnitude = flow.of(node.args[0]), flow.of(node.args[1])
    dim = int(argument(node, 2, "dim", 0))
    if dim >= 0:
        held = magnitude[dim] if len(magnitude) == len(direction) else magnitude[0]
        flow.same(node, direction[dim], held)
    if "interface" in str(node.target):
        return (list(direction), list(magnitude))
    return list(direction)


@rule("outer", "ger")
def outer(flow: Flow, node: fx.Node) -> Result:
    """y[n, m] = a[n] b[m]."""
    return [*flow.of(node.args[0]), *flow.of(node.args[1])]


@rule("cdist", "_cdist_forward", "_euclidean_dist")
def distances(flow: Flow, node: fx.Node) -> Result:
    """Distances between rows: the columns are summed over."""
    left, right = flow.of(node.args[0]), flow.of(node.args[1])
    flow.same(node, left[-1], right[-1])
    leading = flow.broadcast(node, [left[:-2], right[:-2]], max(len(left), len(right)) - 2)
    return [*leading, left[-2], right[-2]]


@rule("cosine_similarity")
def cosine_similarity(flow: Flow, node: fx.Node) -> Result:
    """x · y / (‖x‖ ‖y‖) along one dimension."""
    operands = [flow.of(source) for source in node.args[:2]]
    rank = max(len(axes) for axes in operands)
    axes = flow.broadcast(node, operands, rank)
    dim = dimension(int(argument(node, 2, "dim", 1)), rank)
    return axes[:dim] + axes[dim + 1 :]


@rule("cross", "linalg_cross")
def cross(flow: Flow, node: fx.Node) -> Result:
    """A vector product along a dimension of three."""
    operands = [flow.of(source) for source in node.args[:2]]
    axes = flow.broadcast(node, operands, max(len(axes) for axes in operands))
    dim = argument(node, 2, "dim", node.kwargs.get("dim", -1))
    if dim is None:
        dim = next((d for d, axis in enumerate(axes) if size(axis) == 3), 0)
    flow.pin(node, axes[dimension(int(dim), len(axes))], "a vector product")
    return axes


@rule("bilinear")
def bilinear(flow: Flow, node: fx.Node) -> Result:
    """y[…, o] = Σᵢⱼ a[…, i] w[o, i, j] b[…, j] + c[o]."""
    left, right, weight = (flow.of(source) for source in node.args[:3])
    flow.same(node, left[-1], weight[1])
    flow.same(node, right[-1], weight[2])
    for own in flow.of(argument(node, 3, "bias")):
        flow.same(node, own, weight[0])
    return [*flow.broadcast(node, [left[:-1], right[:-1]], len(left) - 1), weight[0]]


@rule("tensordot")
def tensordot(flow: Flow, node: fx.Node) -> Result:
    """Some dimensions are summed over, the others stay."""
    left, right = flow.of(node.args[0]), flow.of(node.args[1])
    pairs = [
        [dimension(int(dim), len(axes)) for dim in argument(node, place, name)]
        for place, name, axes in ((2, "dims_self", left), (3, "dims_other", right))
    ]
    for first, second in zip(*pairs, strict=True):
        flow.same(node, left[first], right[second])
    return [
        axis
        for axes, dims in zip((left, right), pairs, strict=True)
        for dim, axis in enumerate(axes)
        if dim not in dims
    ]


@rule(*SPECTRA.split())
def transform(flow: Flow, node: fx.Node) -> Result:
    """A transform mixes the positions of some dimensions; the others pass."""
    axes = list(flow.of(node.args[0]))
    schema = [item.name for item in node.target._schema.arguments]  # type: ignore[union-attr]
    dims = argument(node, schema.index("dim"), "dim") if "dim" in schema else None
    name = operator_name(node)
    if dims is None and not name.endswith(("n", "shift")):
        dims = [-2, -1] if name.endswith("2") else [-1]
    over = range(len(axes)) if dims is None else dims if isinstance(dims, list | tuple) else [dims]
    for dim in over:
        place = dimension(int(dim), len(axes))
        flow.pin(node, axes[place], "a transform mixes the positions")
        axes[place] = flow.pinned(node, place, "a transform mixes the positions")
    return axes


@rule("view_as_complex")
def view_as_complex(flow: Flow, node: fx.Node) -> Result:
    """Pairs of the last dimension become one complex number each."""
    axes = flow.of(node.args[0])
    flow.pin(node, axes[-1], "real and imaginary parts")
    return axes[:-1]


@rule("view_as_real")
def view_as_real(flow: Flow, node: fx.Node) -> Result:
    """Real and imaginary parts become a last dimension."""
    axes = flow.of(node.args[0])
    return [*axes, flow.pinned(node, len(axes), "real and imaginary parts")]


@rule("diagonal", "linalg_diagonal")
def diagonal(flow: Flow, node: fx.Node) -> Result:
    """Two dimensions that are the same, at equal positions."""
    axes = list(flow.of(node.args[0]))
    linear = "linalg" in str(node.target)
    first, second = (
        dimension(int(argument(node, place, name, start)), len(axes))
        for place, name, start in (
            (2, "dim1", -2 if linear else 0),
            (3, "dim2", -1 if linear else 1),
        )
    )
    offset = argument(node, 1, "offset", 0)
    rest = [axis for dim, axis in enumerate(axes) if dim not in (first, second)]
    if offset == 0 and size(axes[first]) == size(axes[second]):
        return [*rest, flow.same(node, axes[first], axes[second])]
    for dim in (first, second):
        flow.pin(node, axes[dim], "a diagonal beside the main one")
    return [*rest, flow.pinned(node, len(rest), "a diagonal beside the main one")]


@rule("diff")
def diff(flow: Flow, node: fx.Node) -> Result:
    """Differences of neighbours along one dimension."""
    axes = list(flow.of(node.args[0]))
    dim = dimension(int(argument(node, 2, "dim", -1)), len(axes))
    for source in node.all_input_nodes:
        for other, axis in enumerate(flow.of(source)):
            if other == dim:
                flow.pin(node, axis, "differences of neighbours")
            else:
                flow.same(node, axes[other], axis)
    axes[dim] = flow.pinned(node, dim, "differences of neighbours")
    return axes


@rule("native_group_norm")
def native_group_norm(flow: Flow, node: fx.Node) -> Result:
    """As ``group_norm``, with the statistics of each group as further results."""
    axes = list(flow.of(node.args[0]))
    groups = int(argument(node, 6, "group"))
    from_size = hint(node.args[0].meta["val"].shape[1])  # type: ignore[union-attr]
    group_axis, members = fresh(groups), fresh(from_size // groups)
    flow.outer[node] = group_axis
    flow.same(node, axes[1], product(group_axis, members))
    for source in node.args[1:3]:
        for own in flow.of(source):
            flow.same(node, axes[1], own)
    mark(members, "normalised")
    statistics: Axes = [axes[0], group_axis]
    return (axes, statistics, list(statistics))
