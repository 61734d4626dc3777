"""The masked reference: the original graph with what was cut set to zero after every operator.

It is the oracle of pruning. It knows nothing of how parameters are cut: it runs the graph as it was traced, writes zeros at the cut
positions of every tensor, and computes everything that normalises (means, variances, softmax, maxima) over the kept positions only.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tinier.errors import RefusedError
from tinier.graph.axes import Atom, Axis, Concat, Product, atoms
from tinier.graph.groups import Channels
from tinier.graph.masked_rules import SPECIAL
from tinier.graph.rules import argument, operator_name
from tinier.graph.trace import Traced, written

Kept = Mapping[Atom, Tensor]


def masked_values(
    traced: Traced, channels: Channels, kept: Kept, inputs: Mapping[str, Tensor]
) -> Iterator[tuple[fx.Node, Any]]:
    """Run the masked reference.

    Args:
        traced: the original network.
        channels: its axes.
        kept: atom → (kept,) int64 positions that stay.
        inputs: input name → tensor.

    Returns:
        Each node with its masked value, in order; the node of op "output" comes last, with the tuple of outputs.

    Cost:
        One run of the original network.
    """
    reference = _Masked(traced.module, channels, kept)
    reference.env = {}
    for node in traced.module.graph.nodes:
        if node.op == "placeholder":
            value: Any = inputs[str(node.target)].clone()  # the graph may write to it
        else:
            with (
                torch.no_grad()
            ):  # not around the yield: who stops half-way would be left without gradients
                value = reference.run_node(node)
        reference.env[node] = value
        yield node, value
        for user in reference.user_to_last_uses.get(node, []):
            del reference.env[user]


def masked_outputs(
    traced: Traced, channels: Channels, kept: Kept, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    """The outputs of the masked reference; arguments as of ``masked_values``."""
    result: Any = ()
    for _, value in masked_values(traced, channels, kept, inputs):
        result = value
    return tuple(result)


class _Masked(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, channels: Channels, kept: Kept) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.axes = channels.axes
        self.written = written(module.graph)
        self.masks = {}
        for atom, positions in kept.items():
            self.masks[atom] = torch.zeros(atom.size, dtype=torch.bool)
            self.masks[atom][positions] = True

    def run_node(self, node: fx.Node) -> Any:
        special = SPECIAL.get(operator_name(node)) if node.op == "call_function" else None
        if special is not None and self._normalises_over_cut(node):
            return self._mask(node, special(self, node))
        return self._mask(node, super().run_node(node))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A buffer that the graph writes to is read as it was before."""
        found = super().get_attr(target, args, kwargs)
        return found.clone() if target in self.written else found

    def value(self, node: fx.Node, position: int, name: str, default: Any = None) -> Any:
        """The value of an argument."""
        found = argument(node, position, name, default)
        return self.env[found] if isinstance(found, fx.Node) else found

    def mask_of(self, axis: Axis, length: int) -> Tensor | None:
        """(length,) bool: which positions stay; None if all do."""
        if not any(atom in self.masks for atom in atoms(axis)):
            return None
        mask = self._mask_of(axis)
        if len(mask) != length and isinstance(axis, Product):
            # Its outer factor is the batch or the sequence, which had another size while tracing.
            factors = list(axis.factors)
            while factors and not any(atom in self.masks for atom in atoms(factors[0])):
                factors.pop(0)
            mask = self._mask_of(Product(tuple(factors)))
            mask = mask.repeat(length // len(mask))
        if len(mask) != length:
            raise RefusedError(f"an axis of {length} positions has {len(mask)} in its term")
        return mask

    def _mask_of(self, axis: Axis) -> Tensor:
        if isinstance(axis, Atom):
            known = self.masks.get(axis)
            return torch.ones(axis.size, dtype=torch.bool) if known is None else known
        if isinstance(axis, Concat):
            return torch.cat([self._mask_of(part) for part in axis.parts])
        mask = torch.ones(1, dtype=torch.bool)
        for factor in axis.factors:
            mask = (mask[:, None] & self._mask_of(factor)[None, :]).flatten()
        return mask

    def input_mask(self, node: fx.Node, dims: list[int], position: int = 0) -> Tensor:
        """Which positions of one of a node's inputs stay, along some dimensions; broadcasts against it. bool."""
        return self._mask_along(node.args[position], dims)

    def mask_of_all(self, source: fx.Node) -> Tensor:
        """Which entries of a tensor stay; of its rank, broadcasts against it. bool."""
        return self._mask_along(source, list(range(self.env[source].ndim)))

    def _mask_along(self, source: Any, dims: list[int]) -> Tensor:
        value: Tensor = self.env[source]
        result = torch.ones([1] * value.ndim, dtype=torch.bool, device=value.device)
        for dim in dims:
            mask = self.mask_of(self.axes[source][dim], value.shape[dim])  # type: ignore[index, arg-type]
            if mask is None:
                mask = torch.ones(value.shape[dim], dtype=torch.bool)
            shape = [1] * value.ndim
            shape[dim] = -1
            result = result & mask.to(value.device).view(shape)
        return result

    def _normalises_over_cut(self, node: fx.Node) -> bool:
        for source in node.all_input_nodes:
            axes: Any = self.axes.get(source)
            for axis in axes if isinstance(axes, list) else ():
                if any(atom in self.masks for atom in atoms(axis)):
                    return True
        return False

    def _mask(self, node: fx.Node, value: Any) -> Any:
        axes: Any = self.axes.get(node)
        if isinstance(axes, tuple):
            return type(value)(self._masked(a, v) for a, v in zip(axes, value, strict=True))
        if not isinstance(value, Tensor) or axes is None:
            return value
        in_place = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        if not in_place and self._is_new(node, value):
            return self._zeroed(axes, value)
        masked = self._masked(axes, value)
        return value.copy_(masked) if in_place and masked is not value else masked

    def _is_new(self, node: fx.Node, value: Tensor) -> bool:
        """Whether an operator has just made a tensor of its own, that nothing else looks into."""
        if node.op != "call_function" or value.is_inference():
            return False
        if value._base is not None or any(
            step == 0 and length > 1
            for step, length in zip(value.stride(), value.shape, strict=True)
        ):
            return False
        place = value.untyped_storage().data_ptr()
        return all(
            source.untyped_storage().data_ptr() != place
            if isinstance(source, Tensor)
            else isinstance(source, int)  # a list may hold the tensor itself
            for source in map(self.env.get, node.all_input_nodes)
        )

    def _zeroed(self, axes: list[Axis], value: Tensor) -> Tensor:
        """Zeros at the cut positions, in place."""
        for dim, axis in enumerate(axes):
            mask = self.mask_of(axis, value.shape[dim])
            if mask is not None:
                value.index_fill_(dim, (~mask).nonzero().flatten().to(value.device), 0)
        return value

    def _masked(self, axes: list[Axis], value: Tensor) -> Tensor:
        for dim, axis in enumerate(axes):
            mask = self.mask_of(axis, value.shape[dim])
            if mask is None:
                continue
            mask = mask.to(value.device)
            # What is zero already stays itself: it may be a view, and its base be written through it.
            if value.index_select(dim, (~mask).nonzero().flatten()).any():
                shape = [1] * value.ndim
                shape[dim] = -1
                value = torch.where(mask.view(shape), value, value.new_zeros(()))
        return value
