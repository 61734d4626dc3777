"""Channel groups: all slices of all parameters that must leave together, and what cannot leave and why."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import getitem

import torch
from torch import Tensor, fx

from tinier.graph.axes import (
    Atom,
    Axis,
    Path,
    Pin,
    atoms,
    coordinates,
    fresh,
    pin,
    places,
    resolve,
    size,
    text,
)
from tinier.graph.rules import RULES, Flow, operator_name
from tinier.graph.rules.base import hint
from tinier.graph.rules.linear import KERNEL
from tinier.graph.rules.pointers import follow
from tinier.graph.rules.shape import STEPS
from tinier.graph.trace import Traced


@dataclass(frozen=True)
class Slot:
    """One place where a channel group occurs.

    Attributes:
        parameter: name of the parameter or buffer.
        dim: its dimension.
        path: position in the term of this dimension, from the outside in.
        axis: the term.
    """

    parameter: str
    dim: int
    path: Path
    axis: Axis

    def index(self) -> Tensor:
        """For each position along the dimension, the channel it belongs to; −1 for those of other groups. (n,) int64."""
        return coordinates(self.axis, self.path)


@dataclass(frozen=True, eq=False)
class Group:
    """One free atom with every place where it occurs.

    Attributes:
        name: the module whose parameter has it first, and the kind where that is not a plain channel.
        size: number of channels.
        kind: "channel" (of a convolution), "neuron" (of a linear layer), "hidden" (unit of a recurrent layer), "expert", "head"
            (with the key and value heads that it shares), "head_dim" or "normalised" (a layer norm, RMS norm, group norm, softmax
            or mean runs over it, as over the residual width of a transformer).
        slots: where it occurs in parameters and buffers.
        atom: the axis.
        minimum: how many channels must stay: as many experts as each token is sent to.
    """

    name: str
    size: int
    kind: str
    slots: tuple[Slot, ...]
    atom: Atom
    minimum: int = 1

    def __str__(self) -> str:
        where = ", ".join(f"{s.parameter}[{s.dim}]" for s in self.slots)
        return f"{self.name}: {self.size} {self.kind}s in {where}"


@dataclass(frozen=True)
class PinnedAxis:
    """A dimension of a parameter that keeps its size.

    Attributes:
        parameter: its name.
        dim: its dimension.
        size: of the pinned part.
        pins: the operators and their reasons.
    """

    parameter: str
    dim: int
    size: int
    pins: tuple[Pin, ...]

    def __str__(self) -> str:
        reasons = "; ".join(f"{why.operator}: {why.reason}" for why in self.pins)
        return f"{self.parameter}[{self.dim}], {self.size}: {reasons}"


@dataclass(frozen=True, eq=False)
class Channels:
    """What can leave a network, and what cannot.

    Attributes:
        groups: the channel groups, in the order of the graph.
        pins: every pinned dimension of a parameter.
        axes: node → resolved axis of each dimension (a tuple of such lists for several results).
        parameters: name of each parameter and buffer that the graph uses → resolved axis of each dimension; tied names share axes.
        heads: attention node → resolved axes of its query heads and its key and value heads.
        outer: grouped convolution or group norm → resolved axis of its groups.
    """

    groups: tuple[Group, ...]
    pins: tuple[PinnedAxis, ...]
    axes: Mapping[fx.Node, list[Axis] | tuple[list[Axis], ...] | None]
    parameters: Mapping[str, list[Axis]]
    heads: Mapping[fx.Node, tuple[Axis, Axis]]
    outer: Mapping[fx.Node, Axis]

    def group(self, name: str) -> Group | None:
        """The group of that name."""
        return next((group for group in self.groups if group.name == name), None)

    def __str__(self) -> str:
        lines = [str(group) for group in self.groups]
        return "\n".join([*lines, *(f"pinned {pinned}" for pinned in self.pins)])


def channel_groups(traced: Traced) -> Channels:
    """Give every dimension of every tensor an axis, and collect the free ones.

    Args:
        traced: the network.

    Returns:
        Groups and pins.

    Cost:
        One pass over the operators; milliseconds, whatever their widths. No data, no second copy of the parameters.
    """
    flow, tensors = Flow(), named_tensors(traced.module)
    own: dict[int, list[Axis]] = {}
    for node in traced.module.graph.nodes:
        if node.op == "placeholder" or not flow.fed.isdisjoint(node.all_input_nodes):
            flow.fed.add(node)
        flow.axes[node] = _propagate(flow, node, tensors, own)
    axes = {node: _resolved(found) for node, found in flow.axes.items()}
    parameters = {
        name: [resolve(axis) for axis in own[id(tensor)]]
        for name, tensor in tensors.items()
        if id(tensor) in own
    }
    heads = {node: (resolve(q), resolve(k)) for node, (q, k) in flow.heads.items()}
    outer = {node: resolve(axis) for node, axis in flow.outer.items()}
    trainable = {name for name, _ in traced.module.named_parameters(remove_duplicate=False)}
    slots, pinned = _collect(parameters, tensors)
    kernels = {
        name
        for name, axes in parameters.items()
        if len(axes) > 2 and (_spatial(axes[2:]) or _spatial(axes[:-2]))
    }
    groups = _groups(slots, trainable, kernels)
    return Channels(groups, tuple(pinned), axes, parameters, heads, outer)


def _spatial(axes: list[Axis]) -> bool:
    """Whether dimensions of a parameter (after the second; in Keras before the last two) are a kernel's extent."""
    return all(
        why.reason == KERNEL for axis in axes for atom in atoms(axis) for why in atom.pins[:1]
    ) and all(atom.pins for axis in axes for atom in atoms(axis))


def named_tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones under each of their names."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(
        module.named_buffers(remove_duplicate=False)
    )


def _propagate(
    flow: Flow, node: fx.Node, tensors: Mapping[str, Tensor], own: dict[int, list[Axis]]
) -> list[Axis] | tuple[list[Axis], ...] | None:
    value = node.meta.get("val")
    if node.op == "placeholder":
        return [_pinned_input(flow, node, dim) for dim in range(value.ndim)]  # type: ignore[union-attr]
    if node.op == "get_attr":
        tensor = tensors[str(node.target)]
        if id(tensor) not in own:
            own[id(tensor)] = [fresh(length) for length in tensor.shape]
        return own[id(tensor)]
    if node.op == "output":
        for source in node.all_input_nodes:
            into = flow.pointed(source)
            for axis in (*flow.of(source), *([] if into is None else [into])):
                pin(axis, Pin("output", "the network returns it"))
        return None
    if node.target is getitem:
        found = flow.axes[node.args[0]]  # type: ignore[index]
        if node.args in flow.points:  # (whose result, which of them)
            flow.points[node, 0] = flow.points[node.args]  # type: ignore[index]
        return found[node.args[1]] if isinstance(found, tuple) else flow.opaque(node, "a list")  # type: ignore[index, return-value]
    if not isinstance(value, Tensor | list | tuple):
        return None  # sizes and checks
    rule = RULES.get(operator_name(node))
    if rule is None:
        reason = "no propagation rule for this operator"
        flow.pin_all(node, reason)
        return flow.opaque(node, reason)
    result = rule(flow, node)
    follow(flow, node)
    if not _fits(result, value):
        reason = "the propagation rule does not cover this form of the operator"
        flow.pin_all(node, reason)
        return flow.opaque(node, reason)
    return result


def _fits(result: object, value: object) -> bool:
    """Whether the axes have the sizes of the tensors, which guards every rule."""
    if isinstance(value, Tensor):
        sizes = [hint(length) for length in value.shape]
        return isinstance(result, list) and [size(axis) for axis in result] == sizes
    assert isinstance(value, list | tuple)
    return isinstance(result, tuple) and all(
        not axes or _fits(axes, item) for axes, item in zip(result, value, strict=True)
    )


def _pinned_input(flow: Flow, node: fx.Node, dim: int) -> Axis:
    axis = flow.free(node, dim)
    pin(axis, Pin("input", f"it is given by the network's input {node.target}"))
    return axis


def _resolved(found: object) -> list[Axis] | tuple[list[Axis], ...] | None:
    if isinstance(found, tuple):
        return tuple([resolve(axis) for axis in axes] for axes in found)
    return [resolve(axis) for axis in found] if isinstance(found, list) else None


def _collect(
    parameters: Mapping[str, list[Axis]], tensors: Mapping[str, Tensor]
) -> tuple[dict[Atom, list[Slot]], list[PinnedAxis]]:
    slots: dict[Atom, list[Slot]] = {}
    pinned: list[PinnedAxis] = []
    seen: set[int] = set()
    for name, axes in parameters.items():
        if id(tensors[name]) in seen:
            continue  # a tied name: the same tensor, the same slots
        seen.add(id(tensors[name]))
        for dim, axis in enumerate(axes):
            for atom, path in places(axis):
                if not atom.pins:
                    slots.setdefault(atom, []).append(Slot(name, dim, path, axis))
                elif not any(why.reason in (KERNEL, STEPS) for why in atom.pins):
                    pinned.append(PinnedAxis(name, dim, atom.size, tuple(atom.pins)))
    return slots, pinned


def _groups(
    slots: Mapping[Atom, list[Slot]], trainable: set[str], kernels: set[str]
) -> tuple[Group, ...]:
    groups: list[Group] = []
    taken: set[str] = set()
    for atom, places_of in slots.items():
        if not any(slot.parameter in trainable for slot in places_of):
            continue
        kind = _kind(atom, places_of, kernels)
        first = next(
            (s for s in places_of if s.dim == 0 and s.parameter.endswith("weight")), places_of[0]
        )
        base = first.parameter.rpartition(".")[0] or first.parameter
        if kind == "head" and "repeated" in atom.roles:
            base += ":queries"  # the query heads that share one key head
        elif kind not in ("channel", "neuron"):
            base += f":{kind}"
        name, number = base, 2
        while name in taken:
            name, number = f"{base}#{number}", number + 1
        taken.add(name)
        groups.append(Group(name, atom.size, kind, tuple(places_of), atom, atom.minimum))
    return tuple(groups)


def _kind(atom: Atom, slots: list[Slot], kernels: set[str]) -> str:
    for role in ("expert", "hidden", "head", "normalised", "head_dim"):
        if role in atom.roles:
            return role
    return "channel" if any(slot.parameter in kernels for slot in slots) else "neuron"


def axes_text(channels: Channels, name: str) -> str:
    """The terms of a parameter's dimensions, as a person reads them."""
    return ", ".join(text(axis) for axis in channels.parameters[name])
