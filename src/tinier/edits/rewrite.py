"""The traced graph with smaller parameters: tensors are cut, constants that hold sizes are written anew from the terms."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from tinier.errors import RefusedError
from tinier.graph.axes import Atom, Axis, atoms, kept_size, positions
from tinier.graph.groups import Channels
from tinier.graph.rules import argument, dimension, operator_name
from tinier.graph.trace import Traced

Kept = Mapping[Atom, Tensor]


def kept_along(channels: Channels, kept: Kept) -> dict[str, dict[int, Tensor]]:
    """Parameter or buffer name → dimension → (kept,) int64 positions that stay, where any leave."""
    result: dict[str, dict[int, Tensor]] = {}
    for name, axes in channels.parameters.items():
        for dim, axis in enumerate(axes):
            if any(atom in kept for atom in atoms(axis)):
                result.setdefault(name, {})[dim] = positions(
                    axis, lambda atom: kept[atom] if atom in kept else torch.arange(atom.size)
                )
    return result


def cut_tensors(module: nn.Module, along: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Cut the parameters and buffers of a module in place; tied names stay tied.

    Args:
        module: changed.
        along: name → dimension → positions that stay; names that the module does not have are passed over.
    """
    cut: dict[int, Tensor] = {}
    for store, owner, leaf, name in _tensors(module):
        if name in along:
            old = store(owner)[leaf]
            new = old.detach()
            for dim, indices in along[name].items():
                new = new.index_select(dim, indices.to(new.device))
            is_parameter = isinstance(old, nn.Parameter)
            cut[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
    for store, owner, leaf, _ in list(_tensors(module)):
        old = store(owner)[leaf]
        if id(old) in cut:
            store(owner)[leaf] = cut[id(old)]


def _tensors(module: nn.Module) -> list[tuple[Callable[[nn.Module], Any], nn.Module, str, str]]:
    found: list[tuple[Callable[[nn.Module], Any], nn.Module, str, str]] = []
    for path, owner in module.named_modules(remove_duplicate=False):
        for store in (lambda m: m._parameters, lambda m: m._buffers):
            for leaf, value in store(owner).items():
                if value is not None:
                    found.append((store, owner, leaf, f"{path}.{leaf}" if path else leaf))
    return found


def sliced_graph(traced: Traced, channels: Channels, kept: Kept) -> fx.GraphModule:
    """The smaller graph.

    Args:
        traced: the original; left as it is.
        channels: its axes.
        kept: atom → (kept,) int64 positions that stay.

    Returns:
        A module that takes and returns what the traced one does; its parameters have their own names; batch size as free as before.

    Raises:
        RefusedError: a constant of the graph cannot be written anew.
    """
    module = copy.deepcopy(traced.module)
    cut_tensors(module, kept_along(channels, kept))
    rewriter = Rewriter(channels, kept)
    for old, new in zip(traced.module.graph.nodes, list(module.graph.nodes), strict=True):
        rewrite = REWRITES.get(operator_name(old)) if old.op == "call_function" else None
        if rewrite is not None and rewriter.touches(old):
            rewrite(rewriter, old, new)
    module.graph.lint()
    module.recompile()
    return module


class Rewriter:
    """The axes of the original graph and what is kept of them."""

    def __init__(self, channels: Channels, kept: Kept) -> None:
        self.channels = channels
        self.kept = kept
        self.sizes = {atom: len(indices) for atom, indices in kept.items()}

    def of(self, node: Any) -> list[Axis]:
        """The axes of a node of the original graph."""
        found: Any = self.channels.axes.get(node)
        return found or []

    def changed(self, axis: Axis) -> bool:
        """Whether something of the axis leaves."""
        return any(atom in self.kept for atom in atoms(axis))

    def size(self, axis: Axis) -> int:
        """What is left of the axis."""
        return kept_size(axis, self.sizes)

    def before(self, axis: Axis, position: int) -> int:
        """How many of the first ``position`` positions are left."""
        left = positions(
            axis, lambda atom: self.kept[atom] if atom in self.kept else torch.arange(atom.size)
        )
        return int((left < position).sum())

    def touches(self, node: fx.Node) -> bool:
        """Whether anything leaves an input or a result of the node."""
        for item in (node, *node.all_input_nodes):
            found: Any = self.channels.axes.get(item)
            for axes in found if isinstance(found, tuple) else [found or []]:
                if any(self.changed(axis) for axis in axes):
                    return True
        return False

    def new_sizes(self, node: fx.Node, given: list[Any], axes: list[Axis]) -> list[Any]:
        """The size arguments of a view, one for each axis; a size that is free and smaller becomes −1."""
        shape = node.meta["val"].shape[len(node.meta["val"].shape) - len(axes) :]
        result = [
            value
            if not self.changed(axis) or (isinstance(value, int) and value == -1)
            else self.size(axis)
            if isinstance(length, int)
            else -1
            for value, axis, length in zip(given, axes, shape, strict=True)
        ]
        if sum(isinstance(value, int) and value == -1 for value in result) > 1:
            raise RefusedError(f"{node.name} ({operator_name(node)}): two sizes would be open")
        return result


def _view(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
    axes, given = run.of(old), list(new.args[1])  # type: ignore[arg-type]
    new.update_arg(1, run.new_sizes(old, given, axes[len(axes) - len(given) :]))


def _expand(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
    # Here −1 means "as it is", which may stand anywhere.
    axes, given = run.of(old), list(new.args[1])  # type: ignore[arg-type]
    sizes = [
        run.size(axis) if run.changed(axis) and isinstance(value, int) and value != -1 else value
        for axis, value in zip(axes, given, strict=True)
    ]
    new.update_arg(1, sizes)


def _unflatten(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
    given: list[Any] = list(new.args[2])  # type: ignore[arg-type]
    start = dimension(argument(old, 1, "dim"), len(run.of(old.args[0])))
    axes = run.of(old)[start : start + len(given)]
    sizes = [
        run.size(axis) if run.changed(axis) and value != -1 else value
        for axis, value in zip(axes, given, strict=True)
    ]
    new.update_arg(2, sizes)


def _split(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
    found: Any = run.channels.axes[old]
    dim = dimension(int(argument(old, 2, "dim", 0)), len(found[0]))
    if any(run.changed(axes[dim]) for axes in found):
        new.target = torch.ops.aten.split_with_sizes.default
        new.args = (new.args[0], [run.size(axes[dim]) for axes in found], dim)
        new.kwargs = {}


def _slice(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
    axes = run.of(old.args[0])
    dim = dimension(int(argument(old, 1, "dim", 0)), len(axes))
    if not run.changed(axes[dim]):
        return
    start, length = argument(old, 2, "start", 0) or 0, old.meta["val"].shape[dim]
    whole = old.args[0].meta["val"].shape[dim]  # type: ignore[union-attr]
    start = start + whole if start < 0 else start
    first, last = run.before(axes[dim], start), run.before(axes[dim], start + length)
    third = last - first if operator_name(old) == "narrow" else last
    new.args, new.kwargs = (new.args[0], dim, first, third), {}


def _repeat(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
    axes, source = run.of(old), run.of(old.args[0])
    given: list[Any] = list(new.args[1])  # type: ignore[arg-type]
    for index, axis in enumerate(axes):
        own = index - (len(axes) - len(source))
        inner = run.size(source[own]) if own >= 0 else 1
        if run.changed(axis) and isinstance(given[index], int):
            given[index] = run.size(axis) // inner
    new.update_arg(1, given)


def _repeat_interleave(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
    source = run.of(old.args[0])
    dim = dimension(int(argument(old, 2, "dim")), len(source))
    new.update_arg(1, run.size(run.of(old)[dim]) // run.size(source[dim]))


def _groups(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
    position = {"group_norm": 1, "convolution": 8, "_convolution": 8}.get(operator_name(old), 6)
    axis = run.channels.outer[old]
    if not run.changed(axis):
        return
    if "groups" in new.kwargs:
        new.update_kwarg("groups", run.size(axis))
    else:
        new.update_arg(position, run.size(axis))


def _layer_norm(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
    axes = run.of(old.args[0])
    over: Any = old.args[1]
    new.update_arg(1, [run.size(axis) for axis in axes[len(axes) - len(over) :]])


def _constant(position: int) -> Callable[[Rewriter, fx.Node, fx.Node], None]:
    def rewrite(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
        given: list[Any] = list(new.args[position])  # type: ignore[arg-type]
        sizes = [
            run.size(axis) if run.changed(axis) else value
            for axis, value in zip(run.of(old), given, strict=True)
        ]
        new.update_arg(position, sizes)

    return rewrite


def _attention(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
    # The scale is that of the head size which the network was trained with.
    axis = run.of(old.args[0])[-1]
    if run.changed(axis) and argument(old, 6, "scale") is None:
        new.update_kwarg("scale", float(old.args[0].meta["val"].shape[-1]) ** -0.5)  # type: ignore[union-attr]


def _pad(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
    axes, source = run.of(old), run.of(old.args[0])
    given: list[Any] = list(new.args[1])  # type: ignore[arg-type]
    for index in range(len(given) // 2):
        dim = len(axes) - 1 - index
        if run.changed(axes[dim]):
            before = run.before(axes[dim], given[2 * index])
            given[2 * index] = before
            given[2 * index + 1] = run.size(axes[dim]) - before - run.size(source[dim])
    new.update_arg(1, given)


REWRITES: dict[str, Callable[[Rewriter, fx.Node, fx.Node], None]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "view_copy", "_reshape_alias"), _view),
    **dict.fromkeys(("expand", "broadcast_to"), _expand),
    "unflatten": _unflatten,
    **dict.fromkeys(
        ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "hsplit"), _split
    ),
    **dict.fromkeys(("slice", "narrow"), _slice),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), _groups),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _groups),
    "group_norm": _groups,
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm"), _layer_norm),
    **dict.fromkeys(("full", "zeros", "ones", "empty"), _constant(0)),
    **dict.fromkeys(("new_full", "new_zeros", "new_ones", "new_empty"), _constant(1)),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
}
