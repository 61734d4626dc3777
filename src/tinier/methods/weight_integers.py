"""The integers of weights: which grid each has, and how it is rounded to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tinier.edits.base import Values
from tinier.edits.pairs import as_matrix
from tinier.edits.quantize import QuantizeWeight
from tinier.errors import DataError, InputError, RefusedError
from tinier.graph.fold import parameter_of, read
from tinier.graph.layers import linear_layer
from tinier.graph.placement import ROLES
from tinier.graph.stored import Store
from tinier.statistics import Statistics
from tinier.statistics.recurrent import column
from tinier.tensors.affine import Integers
from tinier.tensors.error_feedback import error_feedback
from tinier.tensors.grid import Grid, choose, group_count
from tinier.tensors.hqq import hqq
from tinier.tensors.saturation import lowered, without_saturation

ROUNDINGS = ("nearest", "error_feedback", "hqq")
# A bias is a 32-bit integer in units of input scale · weight scale; this leaves the sum of products a bit.
_LARGEST_BIAS = 2**30
PASSES, REFITS = (
    3,
    2,
)  # sweeps over the integers after error feedback, and fits of the scales to them
GROUPED = ("linear", "embedding")  # what runtimes dequantize in groups

# A weight with its scheme and what else its integers depend on → its integers, and what there is to say of them.
Known = dict[tuple[Any, ...], tuple[QuantizeWeight, tuple[str, ...]]]


@dataclass(frozen=True)
class Scheme:
    """How the weights of one layer become integers.

    Attributes:
        bits: 2 to 8, or up to 16 for static quantization.
        ranges: a rule of `tinier.tensors.grid.choose`.
        group: inputs that share a scale; None for all of a channel.
        per_tensor: one scale for all channels.
        symmetric: the zero point is 0.
        rounding: one of ``ROUNDINGS``.
        saturation_free: 16-bit sums of u8 × s8 products cannot saturate.
    """

    bits: int
    ranges: str = "mse"
    group: int | None = None
    per_tensor: bool = False
    symmetric: bool = True
    rounding: str = "nearest"
    saturation_free: bool = False

    @property
    def integers(self) -> Integers:
        """Of the grid. From 5 bits on symmetric integers leave out the one that has no opposite; below it is worth having."""
        if not self.symmetric:
            return Integers.unsigned(self.bits)
        if self.bits > 4:
            return Integers.signed(self.bits)
        return Integers(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)


def integers_of(
    module: fx.GraphModule,
    store: Store,
    scheme: Scheme,
    statistics: Statistics | None,
    steps: Mapping[str, float],
) -> tuple[QuantizeWeight, tuple[str, ...]]:
    """The edit for one weight, and what there is to say of it.

    Args:
        module: the folded graph.
        store: the weight.
        scheme: how.
        statistics: with Gram matrices of the inputs for error feedback; ranges weighted by importance take their diagonals, or the moments
            of the columns where there are none.
        steps: node → scale of its values, of those that are quantized.

    Raises:
        RefusedError: the weight is not finite.
        DataError: what it is multiplied with is not finite.
        InputError: the group size does not divide the inputs.
    """
    weight = read(module, store.name)
    assert weight is not None
    if not bool(torch.isfinite(weight).all()):
        raise RefusedError(f"{store.name} has NaN or infinity; the network cannot be quantized")
    matrix = as_matrix(weight.detach(), store.axis)
    order = _order(store, weight)
    grams = _grams(store, statistics, order)
    importance = None
    notes: list[str] = []
    if scheme.ranges == "importance":
        squares = _squares(store, statistics, order)
        if grams is not None:
            squares = grams.diagonal(dim1=-2, dim2=-1)  # (g, n)
        importance = _importance(store, squares, len(matrix))
        if importance is None:
            notes.append(f"{_unknown(store)}: every weight counts the same for its range")
    if scheme.rounding == "error_feedback" and grams is None:
        notes.append(f"{_unknown(store)}: rounded to nearest, without error feedback")
    rule = "mse" if scheme.ranges == "importance" else scheme.ranges
    try:
        groups = _groups(store, scheme, matrix.shape[1], weight.ndim)
        grid = choose(
            matrix,
            scheme.integers,
            rule=rule,
            groups=groups,
            per_tensor=scheme.per_tensor,
            symmetric=scheme.symmetric,
            importance=importance,
        )
    except InputError as error:
        raise InputError(f"{store.name}: {error}") from error
    if scheme.rounding == "hqq":
        grid = hqq(matrix, grid)
    # After whatever chooses scales: biases and saturation bound them from below.
    grid = _wide_enough(module, store, grid, steps)
    saturates = scheme.saturation_free and scheme.bits <= 8 and scheme.symmetric and groups == 1
    saturates = saturates and not _depthwise(module, store, weight)
    if saturates:
        grid, count = _repaired(weight, store.axis, grid)
        if count:
            notes.append(f"{count} channels scaled down, so that no sum saturates")
    chosen = None
    if scheme.rounding == "error_feedback" and grams is not None:
        chosen, grid, said = _fed_back(matrix, grams, grid, 0 if steps else REFITS)
        if saturates:
            first = weight.movedim(store.axis, 0)
            chosen = lowered(chosen.reshape(first.shape)).reshape(chosen.shape)
        notes += said
    edit = QuantizeWeight(
        store.name,
        Values(grid.scale),
        Values(grid.zero_point),
        grid.integers.low,
        grid.integers.high,
        store.axis,
        store.readers,
        None if chosen is None else Values(chosen),
    )
    return edit, tuple(notes)


def _unknown(store: Store) -> str:
    """Why nothing is known of what a weight is multiplied with."""
    if store.kind == "embedding":
        return "an embedding is looked up, not multiplied"
    return f"no moments of what this {store.kind} weight is multiplied with"


def known_integers(
    known: Known,
    module: fx.GraphModule,
    store: Store,
    scheme: Scheme,
    statistics: Statistics | None,
    steps: Mapping[str, float],
) -> tuple[QuantizeWeight, tuple[str, ...]]:
    """As ``integers_of``, worked out once for each scheme and scales of what the readers read.

    Args:
        known: what was found before of one graph with one set of statistics; what is found now is added.
        module, store, scheme, statistics, steps: as for ``integers_of``.
    """
    readers = [node for node in module.graph.nodes if node.name in store.readers]
    read_scales = [steps.get(source.name) for node in readers for source in node.all_input_nodes]
    key = (store, scheme, tuple(read_scales), bool(steps))
    if key not in known:
        known[key] = integers_of(module, store, scheme, statistics, steps)
    return known[key]


def _groups(store: Store, scheme: Scheme, columns: int, dimensions: int) -> int:
    if scheme.group is None or store.kind not in GROUPED or dimensions != 2:
        return 1
    return group_count(columns, scheme.group)


def _order(store: Store, weight: Tensor) -> Tensor:
    """(n,) int64: for each column of a weight's matrix, where statistics have what it is multiplied with.

    A transposed convolution is computed as a plain one with its kernel turned round, whose windows the statistics are of.
    """
    shape = weight.movedim(store.axis, 0).shape[1:]
    order = torch.arange(shape.numel()).reshape(shape)
    return (
        order.flip(list(range(1, len(shape)))) if store.kind == "transposed" else order
    ).flatten()


def _grams(store: Store, statistics: Statistics | None, order: Tensor) -> Tensor | None:
    """(g, n, n) mean of x xᵀ over all that the readers of a weight see; None where it is not known."""
    total: Tensor | None = None
    rows = 0
    for reader in store.readers if statistics is not None else ():
        gram = statistics.grams.get(reader)  # type: ignore[union-attr]
        if gram is None or gram.products.shape[-1] != len(order):
            return None
        total = gram.products if total is None else total + gram.products
        rows += gram.rows
    return None if total is None else total[:, order][:, :, order] / max(rows, 1)


def _squares(store: Store, statistics: Statistics | None, order: Tensor) -> Tensor | None:
    """(g, n) mean of x² over all that the readers of a weight see; None where it is not known."""
    total: Tensor | None = None
    rows = 0
    for reader in store.readers if statistics is not None else ():
        key = column(reader, store.name) if store.kind == "recurrent" else reader
        moments = statistics.columns.get(key)  # type: ignore[union-attr]
        if moments is None or len(moments.squares) % len(order):
            return None
        total = moments.squares if total is None else total + moments.squares
        rows += moments.count
    return None if total is None else total.view(-1, len(order))[:, order] / max(rows, 1)


def _importance(store: Store, squares: Tensor | None, rows: int) -> Tensor | None:
    """(m, n) mean square of what each weight is multiplied with, from that of each group, (g, n)."""
    if squares is None or rows % len(squares):
        return None
    if not bool(torch.isfinite(squares).all()):
        raise DataError(
            f"{store.name}: NaN or infinity in what it is multiplied with; remove such examples, or exclude the layer"
        )
    return squares.repeat_interleave(rows // len(squares), 0).float()


def _wide_enough(
    module: fx.GraphModule, store: Store, grid: Grid, steps: Mapping[str, float]
) -> Grid:
    """Scales with which the bias fits 32 bits; folded channels that are nearly dead have tiny ones."""
    if grid.scale.shape[1] > 1:
        return grid
    scale = grid.scale
    for reader in module.graph.nodes:
        role = ROLES.get(reader.target)
        if reader.name not in store.readers or role is None:
            continue
        source = reader.args[role.weight_input]
        name = parameter_of(reader.args[role.bias]) if len(reader.args) > role.bias else None
        bias = None if name is None else read(module, name)
        if bias is not None and isinstance(source, fx.Node) and source.name in steps:
            least = bias.detach().abs() / (steps[source.name] * _LARGEST_BIAS)
            scale = torch.maximum(scale, least[:, None] if len(scale) > 1 else least.max())
    return Grid(scale, grid.zero_point, grid.integers)


def _repaired(weight: Tensor, axis: int, grid: Grid) -> tuple[Grid, int]:
    first = weight.detach().movedim(axis, 0)
    scale, channels = without_saturation(
        first, grid.scale[:, 0].expand(len(first)).contiguous(), grid.integers
    )
    if len(grid.scale) == 1:
        scale = scale.max()[None]  # one for all channels
    return Grid(scale[:, None], grid.zero_point, grid.integers), len(channels)


def _depthwise(module: fx.GraphModule, store: Store, weight: Tensor) -> bool:
    """Whether all that read a weight are depthwise convolutions with one output for each input: their kernels do not saturate."""
    if store.kind != "convolution" or weight.shape[1] != 1:
        return False
    layers = [linear_layer(node) for node in module.graph.nodes if node.name in store.readers]
    return all(layer is not None and layer.groups == len(weight) > 1 for layer in layers)


def _fed_back(
    matrix: Tensor, grams: Tensor, grid: Grid, refits: int
) -> tuple[Tensor, Grid, list[str]]:
    """(m, n) integers and their grid, each group of a convolution by itself."""
    parts: list[Tensor] = []
    grids: list[Grid] = []
    said: list[str] = []
    each = len(matrix) // len(grams)
    shared = len(grid.scale) == 1
    for number, gram in enumerate(grams):
        rows = slice(number * each, (number + 1) * each)
        own = grid
        if not shared:
            own = Grid(grid.scale[rows], grid.zero_point[rows], grid.integers)
        more = 0 if shared and len(grams) > 1 else refits
        found = error_feedback(matrix[rows], gram, own, passes=PASSES, refits=more)
        parts.append(found.integers)
        grids.append(found.grid)
        if found.fell_back and found.fell_back not in said:
            said.append(found.fell_back)
    if not shared:
        scale = torch.cat([one.scale for one in grids])
        grid = Grid(scale, torch.cat([one.zero_point for one in grids]), grid.integers)
    return torch.cat(parts), grid if len(grids) > 1 else grids[0], said
