"""Operators on the spatial dimensions of images and signals."""

from torch import fx

from tinier.graph.axes import fresh, product, size
from tinier.graph.rules.base import Axes, Flow, Result, argument, hint, rule

POOLS = """
max_pool avg_pool adaptive_avg_pool adaptive_max_pool upsample_nearest _upsample_nearest_exact lp_pool
"""
NAMED = """
upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa
reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d _adaptive_avg_pool2d
"""
SPATIAL = [f"{name}{n}d" for name in POOLS.split() for n in (1, 2, 3)] + NAMED.split()


@rule(*SPATIAL)
def spatial(flow: Flow, node: fx.Node) -> Result:
    """Channels pass, the spatial dimensions are new."""
    axes = flow.of(node.args[0])
    channels = 2 if len(axes) > 2 else 1
    for axis in axes[channels:]:
        flow.pin(node, axis, "spatial")
    return _after(flow, node, axes[:channels])


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(flow: Flow, node: fx.Node) -> Result:
    """Each image is sampled at the places of its own grid; heads may be folded into the batch of both."""
    axes, grid = flow.of(node.args[0]), flow.of(node.args[1])
    flow.same(node, axes[0], grid[0])
    for axis in (*axes[2:], *grid[1:]):
        flow.pin(node, axis, "spatial")
    return _after(flow, node, axes[:2])


@rule("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")
def pool_with_indices(flow: Flow, node: fx.Node) -> Result:
    """As pooling, with the positions as a second result."""
    axes = flow.of(node.args[0])
    for axis in axes[2:]:
        flow.pin(node, axis, "spatial")
    new = [fresh(hint(dim)) for dim in node.meta["val"][0].shape]
    for axis in new[2:]:
        flow.pin(node, axis, "spatial")
    return ([*axes[:2], *new[2:]], [*axes[:2], *new[2:]])


@rule("pixel_shuffle")
def pixel_shuffle(flow: Flow, node: fx.Node) -> Result:
    """Channels are c × r × r; the two r go to the spatial dimensions."""
    axes = flow.of(node.args[0])
    factor = argument(node, 1, "factor")
    shape = flow.shape(node)
    channels, grid = fresh(shape[-3]), fresh(factor * factor)
    flow.same(node, axes[-3], product(channels, grid))
    flow.pin(node, grid, "becomes spatial")
    for axis in axes[-2:]:
        flow.pin(node, axis, "spatial")
    return _after(flow, node, [*axes[:-3], channels])


@rule("pixel_unshuffle")
def pixel_unshuffle(flow: Flow, node: fx.Node) -> Result:
    """The reverse: channels become c × r × r."""
    axes = flow.of(node.args[0])
    factor = argument(node, 1, "factor")
    grid = fresh(factor * factor)
    flow.pin(node, grid, "was spatial")
    return _after(flow, node, [*axes[:-3], product(axes[-3], grid)])


@rule("im2col")
def im2col(flow: Flow, node: fx.Node) -> Result:
    """Patches: channels × positions of the kernel, and one column for each place."""
    axes = flow.of(node.args[0])
    batched, shape = len(axes) == 4, flow.shape(node)
    channels = axes[-3]
    inside = fresh(shape[-2] // size(channels))
    flow.pin(node, inside, "positions of a kernel")
    for axis in axes[-2:]:
        flow.pin(node, axis, "spatial")
    return _after(flow, node, [*(axes[:1] if batched else []), product(channels, inside)])


@rule("col2im")
def col2im(flow: Flow, node: fx.Node) -> Result:
    """The reverse: overlapping patches are summed."""
    axes = flow.of(node.args[0])
    channels = fresh(flow.shape(node)[-3])
    inside = fresh(size(axes[-2]) // size(channels))
    flow.pin(node, inside, "positions of a kernel")
    flow.same(node, axes[-2], product(channels, inside))
    flow.pin(node, axes[-1], "spatial")
    return _after(flow, node, [*axes[:-2], channels])


def _after(flow: Flow, node: fx.Node, axes: Axes) -> Axes:
    rank = node.meta["val"].ndim
    return [*axes, *(flow.pinned(node, dim, "spatial") for dim in range(len(axes), rank))]
