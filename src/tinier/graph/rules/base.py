"""The table of propagation rules and what a rule works with.

A rule is a function of a ``Flow`` and a node that returns the axes of the node's result: a list with one axis for each dimension,
or a tuple of such lists for operators with several results. Rules register themselves by operator name; a name without the
overload stands for all of them, and in-place operators share the rule of the operator that they are named after.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tinier.graph.axes import UNIT, Atom, Axis, Mismatch, Pin, cut, fresh, mark, pin, size, unify

Axes = list[Axis]
Result = Axes | tuple[Axes, ...] | None
Rule = Callable[["Flow", fx.Node], Result]

RULES: dict[str, Rule] = {}
BY_DATA = "it is indexed by data"
UNKNOWN = 8191  # stands for a size that only data decides; such axes are pinned, and no view divides a prime


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators by name."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def operator_name(node: fx.Node) -> str:
    """The operator without namespace, overload and the underscore of in-place variants: conv2d, add, view."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
        return name if name.startswith("_") and name.endswith("_") else name.removesuffix("_")
    return getattr(target, "__name__", str(target))


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a node, by position or by keyword."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def hint(value: Any) -> int:
    """The size that a dimension had while tracing: symbolic sizes have one, too."""
    if isinstance(value, int):
        return value
    return int(value.node.hint) if value.node.has_hint() else UNKNOWN


class Flow:
    """The state of one propagation: the axes of every node so far.

    Attributes:
        axes: node → one axis for each dimension, or a tuple of such lists.
        heads: attention nodes → the axes of their query and key/value heads.
        outer: grouped operators → the axis of their groups.
        fed: the nodes that depend on the network's inputs; the others work on weights alone.
        points: (node, which of its results) → the axis into which its integers point: they are positions along it.
    """

    def __init__(self) -> None:
        self.axes: dict[fx.Node, Any] = {}
        self.heads: dict[fx.Node, tuple[Axis, Axis]] = {}
        self.outer: dict[fx.Node, Axis] = {}
        self.fed: set[fx.Node] = set()
        self.points: dict[tuple[fx.Node, int], Axis] = {}

    def normalised(self, node: fx.Node, axis: Axis) -> None:
        """Note that a node normalises over an axis: of activations, not of weights, as weight standardisation does."""
        if node in self.fed:
            mark(axis, "normalised")

    def of(self, value: Any) -> Axes:
        """The axes of an argument; numbers and absent arguments have none."""
        return self.axes.get(value) or [] if isinstance(value, fx.Node) else []

    def shape(self, node: fx.Node) -> list[int]:
        """Sizes of a node's result while tracing."""
        value = node.meta["val"]
        return [hint(dim) for dim in value.shape]

    def fixed(self, node: fx.Node, dim: int) -> bool:
        """Whether the size of a dimension is a plain number, not a symbol (free batch or sequence)."""
        return isinstance(node.meta["val"].shape[dim], int)

    def free(self, node: fx.Node, dim: int) -> Axis:
        """A new axis for one dimension of a node; pinned where its size is a symbol."""
        length = self.shape(node)[dim]
        if self.fixed(node, dim):
            return fresh(length)
        axis = Atom(length)
        pin(axis, Pin(operator_name(node), "its size is free (batch or sequence)"))
        return axis

    def pinned(self, node: fx.Node, dim: int, reason: str) -> Axis:
        """A new axis for one dimension of a node that must keep its size."""
        axis = self.free(node, dim)
        self.pin(node, axis, reason)
        return axis

    def pin(self, node: fx.Node, axis: Axis, reason: str) -> None:
        """Keep an axis at its size because of this node."""
        pin(axis, Pin(operator_name(node), reason))

    def same(self, node: fx.Node, left: Axis, right: Axis) -> Axis:
        """Unify two axes; where they have no common form, pin both."""
        try:
            unify(left, right)
        except Mismatch as error:
            for axis in (left, right):
                self.pin(node, axis, f"axes that do not line up: {error}")
        return left

    def pointed(self, value: Any) -> Axis | None:
        """The axis into which an argument's integers point, if they are known to be positions."""
        return self.points.get((value, 0)) if isinstance(value, fx.Node) else None

    def chosen(self, node: fx.Node, axis: Axis, by: Any) -> None:
        """Positions of an axis are chosen by the integers ``by``: positions along it, or numbers that hold it as it is."""
        into = self.pointed(by)
        if into is not None and size(into) == size(axis):
            self.same(node, axis, into)
            return
        self.pin(node, axis, BY_DATA)
        if into is not None:
            self.pin(node, into, "positions along it are used along an axis of another size")

    def parts(self, node: fx.Node, axis: Axis, sizes: tuple[int, ...]) -> tuple[Axis, ...]:
        """Take an axis apart end to end; where that is impossible, pin it and give pinned parts."""
        try:
            return cut(axis, sizes)
        except Mismatch as error:
            reason = f"taken apart where it cannot be: {error}"
            pieces = tuple(fresh(length) for length in sizes)
            for piece in (axis, *pieces):
                self.pin(node, piece, reason)
            return pieces

    def pin_all(self, node: fx.Node, reason: str) -> None:
        """Pin every axis of every tensor argument."""
        for source in node.all_input_nodes:
            found = self.axes.get(source)
            for axes in found if isinstance(found, tuple) else [found or []]:
                for axis in axes:
                    self.pin(node, axis, reason)
            into = self.pointed(source)
            if into is not None:
                self.pin(node, into, reason)

    def opaque(self, node: fx.Node, reason: str) -> Result:
        """New pinned axes for the result of a node."""
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return [self.pinned(node, dim, reason) for dim in range(value.ndim)]
        if isinstance(value, list | tuple):
            results = []
            for item in value:
                axes: Axes = [fresh(hint(dim)) for dim in getattr(item, "shape", ())]
                for axis in axes:
                    self.pin(node, axis, reason)
                results.append(axes)
            return tuple(results)
        return None

    def broadcast(self, node: fx.Node, operands: Sequence[Axes], rank: int) -> Axes:
        """Unify the axes of operands that broadcast against each other, aligned at the last dimension."""
        result: Axes = []
        for dim in range(-rank, 0):
            axis: Axis = UNIT
            for axes in operands:
                if len(axes) >= -dim and axes[dim] != UNIT:
                    axis = axes[dim] if axis == UNIT else self.same(node, axis, axes[dim])
            result.append(axis)
        return result


def dimension(value: int, rank: int) -> int:
    """A dimension counted from the front."""
    return value + rank if value < 0 else value
