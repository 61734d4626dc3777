"""The masked reference: the original graph with what was cut set to zero after every operator.

It is the oracle of pruning. It knows nothing of how parameters are cut: it runs the graph as it was traced, writes zeros at the cut
positions of every tensor, and computes everything that normalises (means, variances, softmax, maxima) over the kept positions only.
"""

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from tinier.errors import RefusedError
from tinier.graph.axes import Atom, Axis, Concat, Product, atoms
from tinier.graph.groups import Channels
from tinier.graph.rules import argument, dimension, operator_name
from tinier.graph.trace import Traced

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
            value: Any = inputs[str(node.target)]
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
        self.masks = {}
        for atom, positions in kept.items():
            self.masks[atom] = torch.zeros(atom.size, dtype=torch.bool)
            self.masks[atom][positions] = True

    def run_node(self, node: fx.Node) -> Any:
        special = SPECIAL.get(operator_name(node)) if node.op == "call_function" else None
        if special is not None and self._normalises_over_cut(node):
            return self._mask(node, special(self, node))
        return self._mask(node, super().run_node(node))

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

    def input_mask(self, node: fx.Node, dims: list[int]) -> Tensor:
        """Which positions of a node's first input stay, along some dimensions; broadcasts against it. bool."""
        source: Any = node.args[0]
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
        source: Any = node.args[0]
        axes: Any = self.axes[source]
        return any(atom in self.masks for axis in axes for atom in atoms(axis))

    def _mask(self, node: fx.Node, value: Any) -> Any:
        axes: Any = self.axes.get(node)
        if isinstance(axes, tuple):
            return type(value)(self._masked(a, v) for a, v in zip(axes, value, strict=True))
        if not isinstance(value, Tensor) or axes is None:
            return value
        in_place = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        masked = self._masked(axes, value)
        return value.copy_(masked) if in_place and masked is not value else masked

    def _masked(self, axes: list[Axis], value: Tensor) -> Tensor:
        for dim, axis in enumerate(axes):
            mask = self.mask_of(axis, value.shape[dim])
            if mask is not None:
                shape = [1] * value.ndim
                shape[dim] = -1
                value = torch.where(mask.to(value.device).view(shape), value, value.new_zeros(()))
        return value


def _moments(x: Tensor, mask: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, summed squared deviation and number of the kept positions along dims, dims kept with size 1."""
    number = mask.sum() * prod(x.shape[dim] for dim in dims if mask.shape[dim] == 1)
    zero = x.new_zeros(())
    mean = torch.where(mask, x, zero).sum(dims, keepdim=True) / number
    squares = torch.where(mask, (x - mean).square(), zero).sum(dims, keepdim=True)
    return mean, squares, number


def _layer_norm(run: _Masked, node: fx.Node) -> Tensor:
    x: Tensor = run.value(node, 0, "input")
    over = len(run.value(node, 1, "normalized_shape"))
    dims = list(range(x.ndim - over, x.ndim))
    mean, squares, number = _moments(x, run.input_mask(node, dims), dims)
    y = (x - mean) / (squares / number + run.value(node, 4, "eps", 1e-5)).sqrt()
    return _affine(y, run.value(node, 2, "weight"), run.value(node, 3, "bias"))


def _rms_norm(run: _Masked, node: fx.Node) -> Tensor:
    x: Tensor = run.value(node, 0, "input")
    over = len(run.value(node, 1, "normalized_shape"))
    dims = list(range(x.ndim - over, x.ndim))
    mean_square = _moments(x.square(), run.input_mask(node, dims), dims)[0]
    eps = run.value(node, 3, "eps")
    y = x / (mean_square + (torch.finfo(x.dtype).eps if eps is None else eps)).sqrt()
    return _affine(y, run.value(node, 2, "weight"), None)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _group_norm(run: _Masked, node: fx.Node) -> Tensor:
    x: Tensor = run.value(node, 0, "input")
    groups = run.value(node, 1, "num_groups")
    batch, width = x.shape[:2]
    grouped = x.reshape(batch, groups, width // groups, -1)
    mask = run.input_mask(node, [1]).flatten().view(1, groups, -1, 1)
    number = mask.sum(2, keepdim=True) * grouped.shape[3]
    zero = x.new_zeros(())
    mean = torch.where(mask, grouped, zero).sum((2, 3), keepdim=True) / number
    centred = torch.where(mask, grouped - mean, zero)
    variance = centred.square().sum((2, 3), keepdim=True) / number
    y = (centred / (variance + run.value(node, 4, "eps", 1e-5)).sqrt()).view(x.shape)
    shape = [1, -1] + [1] * (x.ndim - 2)
    weight, bias = run.value(node, 2, "weight"), run.value(node, 3, "bias")
    return _affine(
        y,
        None if weight is None else weight.view(shape),
        None if bias is None else bias.view(shape),
    )


def _without(run: _Masked, node: fx.Node, filler: float) -> Any:
    """Run the operator with cut positions set to what it ignores."""
    x: Tensor = run.value(node, 0, "self")
    filled = x.masked_fill(~run.input_mask(node, list(range(x.ndim))), filler)
    rest = [run.env[a] if isinstance(a, fx.Node) else a for a in node.args[1:]]
    assert callable(node.target)
    return node.target(filled, *rest, **node.kwargs)


def _softmax(run: _Masked, node: fx.Node) -> Any:
    x: Tensor = run.value(node, 0, "self")
    dim = dimension(run.value(node, 1, "dim"), x.ndim)
    kept = run.input_mask(node, [dim])
    exponent = (x - x.masked_fill(~kept, -torch.inf).amax(dim, keepdim=True)).masked_fill(
        ~kept, -torch.inf
    )
    total = exponent.exp().sum(dim, keepdim=True)
    if "log" in operator_name(node):
        return exponent - total.log()
    return exponent.exp() / total


def _reduce_dims(run: _Masked, node: fx.Node, rank: int) -> tuple[list[int], bool]:
    dims = run.value(node, 1, "dim")
    if dims is None or dims == []:
        dims = list(range(rank))
    dims = dims if isinstance(dims, list | tuple) else [dims]
    return [dimension(int(dim), rank) for dim in dims], bool(run.value(node, 2, "keepdim", False))


def _mean(run: _Masked, node: fx.Node) -> Tensor:
    x: Tensor = run.value(node, 0, "self")
    schema = [item.name for item in node.target._schema.arguments]  # type: ignore[union-attr]
    dims, keep = (
        _reduce_dims(run, node, x.ndim) if "dim" in schema else (list(range(x.ndim)), False)
    )
    mean = _moments(x, run.input_mask(node, dims), dims)[0]
    return mean if keep else mean.squeeze(dims)


def _variance(run: _Masked, node: fx.Node) -> Any:
    x: Tensor = run.value(node, 0, "self")
    dims: Any = argument(node, 1, "dim")
    if isinstance(dims, bool) or dims is None or dims == []:
        dims = list(range(x.ndim))
    dims = [dimension(int(d), x.ndim) for d in (dims if isinstance(dims, list) else [dims])]
    keep = bool(node.kwargs.get("keepdim", argument(node, 3, "keepdim", False)))
    correction: Any = node.kwargs.get("correction", 1)
    if "correction" not in str(node.target):
        correction = int(bool(argument(node, 2, "unbiased", True)))
    mean, squares, number = _moments(x, run.input_mask(node, dims), dims)
    variance = squares / (number - correction)
    if not keep:
        mean, variance = mean.squeeze(dims), variance.squeeze(dims)
    return (variance, mean) if operator_name(node) == "var_mean" else variance


SPECIAL: dict[str, Callable[[_Masked, fx.Node], Any]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "softmax": _softmax,
    "_softmax": _softmax,
    "log_softmax": _softmax,
    "_log_softmax": _softmax,
    "mean": _mean,
    "var": _variance,
    "var_mean": _variance,
    "amax": lambda run, node: _without(run, node, -torch.inf),
    "amin": lambda run, node: _without(run, node, torch.inf),
    "logsumexp": lambda run, node: _without(run, node, -torch.inf),
}
