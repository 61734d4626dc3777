"""The traced graph with smaller parameters: tensors are cut, constants that hold sizes are written anew from the terms."""

import copy
import operator
import sys
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from tinier.errors import RefusedError
from tinier.graph.axes import Atom, Axis, Product, atoms, kept_size, positions, size
from tinier.graph.groups import Channels
from tinier.graph.rules import argument, dimension, operator_name
from tinier.graph.rules.linear import ATTENTION
from tinier.graph.trace import Traced
from tinier.modules.masked import plain_name

Kept = Mapping[Atom, Tensor]
SPARE = 2**24  # entries that are set aside at first; what is not written to takes no memory
Module = TypeVar("Module", bound=nn.Module)


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


def cut_copy(
    module: Module,
    along: Mapping[str, Mapping[int, Tensor]],
    made: dict[str, Tensor] | None = None,
) -> Module:
    """A deep copy of a module with smaller parameters and buffers; tied names stay tied, and what shared memory no longer does.

    Args:
        module: left as it is.
        along: name → dimension → (kept,) int64 positions that stay; names that the module does not have are passed over.
        made: name → parameter that an earlier copy has; they are shared with it, and new ones added. Of all copies one may live on.

    Cost:
        Memory for what is kept: nothing is copied whole and cut afterwards.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for store, owner, leaf, name in _tensors(module):
        tensor = store(owner)[leaf]
        tensors[id(tensor)] = tensor
        # A held mask leaves with the weight that it is over, under the weight's own name.
        names.setdefault(id(tensor), []).extend((name, plain_name(name)))
    memo: dict[int, Any] = {}  # what copy.deepcopy takes for copied
    spare: dict[tuple[Any, ...], Tensor] = {}
    for key, old in tensors.items():
        # Buffers may be written to by whoever looks at them, as those of spectral norms are.
        shared = made if isinstance(old, nn.Parameter) else None
        known = next((shared[n] for n in names[key] if n in shared), None) if shared else None
        if known is None:
            new = old.detach()
            cuts = next((along[name] for name in names[key] if name in along), {})
            new = _selected(new, list(cuts.items()), spare) if cuts else new.clone()
            if shared is not None:
                shared |= dict.fromkeys(names[key], new)
        else:
            new = known.detach()
        memo[key] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    for owner in (
        module.modules()
    ):  # what a hook computed, as torch.nn.utils.weight_norm does, and what caches keep
        for held in vars(owner).values():
            for value in held.values() if type(held) is dict else [held]:
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def _selected(tensor: Tensor, cuts: list[tuple[int, Tensor]], spare: dict[Any, Tensor]) -> Tensor:
    """What is left of a tensor. The first of several cuts goes to memory that is used again: fresh pages cost more than the cut."""
    for number, (dim, given) in enumerate(cuts):
        stay = given.to(tensor.device)
        if number or len(cuts) == 1:
            tensor = tensor.index_select(dim, stay)
            continue
        shape = [*tensor.shape[:dim], len(stay), *tensor.shape[dim + 1 :]]
        kind = tensor.dtype, tensor.device
        if kind not in spare or spare[kind].numel() < prod(shape):
            spare[kind] = tensor.new_empty(max(prod(shape), SPARE))
        tensor = torch.index_select(tensor, dim, stay, out=spare[kind][: prod(shape)].view(shape))
    return tensor


def _tensors(module: nn.Module) -> list[tuple[Callable[[nn.Module], Any], nn.Module, str, str]]:
    found: list[tuple[Callable[[nn.Module], Any], nn.Module, str, str]] = []
    for path, owner in module.named_modules(remove_duplicate=False):
        for store in (lambda m: m._parameters, lambda m: m._buffers):
            for leaf, value in store(owner).items():
                if value is not None:
                    found.append((store, owner, leaf, f"{path}.{leaf}" if path else leaf))
    return found


def sliced_graph(
    traced: Traced, channels: Channels, kept: Kept, made: dict[str, Tensor] | None = None
) -> fx.GraphModule:
    """The smaller graph.

    Args:
        traced: the original; left as it is.
        channels: its axes.
        kept: atom → (kept,) int64 positions that stay.
        made: see ``cut_copy``.

    Returns:
        A module that takes and returns what the traced one does; its parameters have their own names; batch size as free as before.

    Raises:
        RefusedError: a constant of the graph cannot be written anew.
    """
    module = cut_copy(traced.module, kept_along(channels, kept), made)
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
        """The size arguments of a view, one for each axis; a size that is free and smaller becomes −1, or is computed anew."""
        shape = node.meta["val"].shape[len(node.meta["val"].shape) - len(axes) :]
        result: list[Any] = []
        for value, axis, length in zip(given, axes, shape, strict=True):
            if not self.changed(axis) or (isinstance(value, int) and value == -1):
                result.append(value)
            else:
                result.append(self.size(axis) if isinstance(length, int) else -1)
        places = [index for index, value in enumerate(result) if isinstance(value, int)]
        opened = [index for index in places if result[index] == -1]
        for index in opened if len(opened) > 1 else ():
            value = given[index]
            if isinstance(value, fx.Node):
                result[index] = self._scaled(node.args[1][index], value, axes[index])  # type: ignore[index]
        if sum(isinstance(value, int) and value == -1 for value in result) > 1:
            raise RefusedError(f"{node.name} ({operator_name(node)}): two sizes would be open")
        return result

    def _scaled(self, old: Any, new: fx.Node, axis: Axis) -> fx.Node:
        """A computed size, such as batch × heads, times what is left of it; ``old`` is its node in the original graph."""
        seen, rest = set[fx.Node](), [old]
        while rest:
            source = rest.pop()
            if source in seen or isinstance(source.meta.get("val"), Tensor):
                continue
            seen.add(source)
            if operator_name(source) == "sym_size":
                dim = dimension(int(source.args[1]), len(self.of(source.args[0])))
                if self.changed(self.of(source.args[0])[dim]):
                    return new  # read from a tensor that is already smaller
            rest += source.all_input_nodes
        factors = axis.factors if isinstance(axis, Product) else (axis,)
        changed = [factor for factor in factors if self.changed(factor)]
        whole, left = prod(size(f) for f in changed), prod(self.size(f) for f in changed)
        with new.graph.inserting_after(new):
            share = new.graph.call_function(operator.floordiv, (new, whole))
        with new.graph.inserting_after(share):
            return new.graph.call_function(operator.mul, (share, left))


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
    # Each of a product's outer positions: as many as there are.
    if argument(old, 4, "step", 1) != 1:
        new.args, new.kwargs = (new.args[0], dim, start, sys.maxsize, old.args[4]), {}
        return
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
    if argument(old, 3, "output_size") is not None and run.changed(run.of(old)[dim]):
        new.update_kwarg("output_size", run.size(run.of(old)[dim]))


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
    if run.changed(axis) and old.kwargs.get("scale") is None:
        new.update_kwarg("scale", float(old.args[0].meta["val"].shape[-1]) ** -0.5)  # type: ignore[union-attr]


def _pad(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
    axes, source = run.of(old), run.of(old.args[0])
    given: list[Any] = list(new.args[1])  # type: ignore[arg-type]
    for index in range(len(given) // 2):
        dim = len(axes) - 1 - index
        if not all(isinstance(amount, int) for amount in given[2 * index : 2 * index + 2]):
            continue  # computed from a free length, which nothing cuts
        if min(given[2 * index : 2 * index + 2]) < 0:
            if run.changed(source[dim]):
                _crop(run, source[dim], axes[dim], given, index)
        elif run.changed(axes[dim]):
            before = run.before(axes[dim], given[2 * index])
            given[2 * index] = before
            given[2 * index + 1] = run.size(axes[dim]) - before - run.size(source[dim])
    new.update_arg(1, given)


def _crop(run: Rewriter, source: Axis, axis: Axis, given: list[Any], index: int) -> None:
    """Negative padding takes away what is left of the first and the last positions."""
    first, last = -given[2 * index], size(source) + given[2 * index + 1]
    given[2 * index] = -run.before(source, first)
    given[2 * index + 1] = run.before(source, last) - run.size(source)


def _one_hot(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
    new.update_arg(1, run.size(run.of(old)[-1]))


def _histc(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
    bins = run.size(run.of(old)[0])
    if run.changed(run.of(old)[0]):
        new.args, new.kwargs = (new.args[0], bins, 0, bins - 1), {}


def _arange(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
    if run.changed(run.of(old)[0]):
        new.args = (run.size(run.of(old)[0]),)
        new.target = torch.ops.aten.arange.default


def _native_group_norm(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
    new.update_arg(4, run.size(run.of(old.args[0])[1]))
    new.update_arg(6, run.size(run.channels.outer[old]))


def _shuffle(run: Rewriter, old: fx.Node, new: fx.Node) -> None:
    new.update_arg(1, run.size(run.channels.outer[old]))


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
    "native_group_norm": _native_group_norm,
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), _shuffle),
    "one_hot": _one_hot,
    "histc": _histc,
    "arange": _arange,
    **dict.fromkeys(ATTENTION, _attention),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
}
