"""Operators of the masked reference that must leave cut positions out themselves: what normalises, ranks, or counts."""

from collections.abc import Callable
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from tinier.graph.rules import argument, dimension, operator_name
from tinier.graph.rules.losses import LOSSES, MEAN, NONE


class Run(Protocol):
    """A run of the masked reference."""

    env: dict[fx.Node, Any]

    def value(self, node: fx.Node, position: int, name: str, default: Any = None) -> Any:
        """The value of an argument."""

    def input_mask(self, node: fx.Node, dims: list[int], position: int = 0) -> Tensor:
        """Which positions of an input stay, along some dimensions."""

    def mask_of_all(self, source: fx.Node) -> Tensor:
        """Which entries of a tensor stay."""


def _moments(x: Tensor, mask: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, summed squared deviation and number of the kept positions along dims, dims kept with size 1."""
    number = mask.sum() * prod(x.shape[dim] for dim in dims if mask.shape[dim] == 1)
    zero = x.new_zeros(())
    mean = torch.where(mask, x, zero).sum(dims, keepdim=True) / number
    squares = torch.where(mask, (x - mean).square(), zero).sum(dims, keepdim=True)
    return mean, squares, number


def _layer_norm(run: Run, node: fx.Node) -> Tensor:
    x: Tensor = run.value(node, 0, "input")
    over = len(run.value(node, 1, "normalized_shape"))
    dims = list(range(x.ndim - over, x.ndim))
    mean, squares, number = _moments(x, run.input_mask(node, dims), dims)
    y = (x - mean) / (squares / number + run.value(node, 4, "eps", 1e-5)).sqrt()
    return _affine(y, run.value(node, 2, "weight"), run.value(node, 3, "bias"))


def _rms_norm(run: Run, node: fx.Node) -> Tensor:
    x: Tensor = run.value(node, 0, "input")
    over = len(run.value(node, 1, "normalized_shape"))
    dims = list(range(x.ndim - over, x.ndim))
    mean_square = _moments(x.square(), run.input_mask(node, dims), dims)[0]
    eps = run.value(node, 3, "eps")
    y = x / (mean_square + (torch.finfo(x.dtype).eps if eps is None else eps)).sqrt()
    return _affine(y, run.value(node, 2, "weight"), None)


def _batch_norm(run: Run, node: fx.Node) -> Tensor:
    """With statistics of its own input: over the batch, or for each example (``instance_norm``), and what follows the channels."""
    x: Tensor = run.value(node, 0, "input")
    if not run.value(node, 5, "training"):
        rest = [run.env[a] if isinstance(a, fx.Node) else a for a in node.args[1:]]
        assert callable(node.target)
        return node.target(x, *rest, **node.kwargs)
    dims = [*([] if operator_name(node) == "instance_norm" else [0]), *range(2, x.ndim)]
    mean, squares, number = _moments(x, run.input_mask(node, dims), dims)
    y = (x - mean) / (squares / number + run.value(node, 7, "eps")).sqrt()
    shape = [1, -1] + [1] * (x.ndim - 2)
    weight, bias = run.value(node, 1, "weight"), run.value(node, 2, "bias")
    return _affine(
        y,
        None if weight is None else weight.view(shape),
        None if bias is None else bias.view(shape),
    )


def _native_layer_norm(run: Run, node: fx.Node) -> tuple[Tensor, Tensor, Tensor]:
    x: Tensor = run.value(node, 0, "input")
    dims = list(range(x.ndim - len(run.value(node, 1, "normalized_shape")), x.ndim))
    mean, squares, number = _moments(x, run.input_mask(node, dims), dims)
    scale = (squares / number + run.value(node, 4, "eps")).rsqrt()
    y = _affine((x - mean) * scale, run.value(node, 2, "weight"), run.value(node, 3, "bias"))
    return y, mean, scale


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _group_norm(run: Run, node: fx.Node) -> Tensor:
    return _grouped(
        run,
        node,
        run.value(node, 1, "num_groups"),
        run.value(node, 2, "weight"),
        run.value(node, 3, "bias"),
        run.value(node, 4, "eps", 1e-5),
    )[0]


def _native_group_norm(run: Run, node: fx.Node) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = run.value(node, 1, "weight"), run.value(node, 2, "bias")
    groups, eps = run.value(node, 6, "group"), run.value(node, 7, "eps")
    return _grouped(run, node, groups, weight, bias, eps)


def _grouped(
    run: Run,
    node: fx.Node,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised values, and mean and scale of each group."""
    x: Tensor = run.value(node, 0, "input")
    batch, width = x.shape[:2]
    grouped = x.reshape(batch, groups, width // groups, -1)
    mask = run.input_mask(node, [1]).flatten().view(1, groups, -1, 1)
    number = mask.sum(2, keepdim=True) * grouped.shape[3]
    zero = x.new_zeros(())
    mean = torch.where(mask, grouped, zero).sum((2, 3), keepdim=True) / number
    centred = torch.where(mask, grouped - mean, zero)
    variance = centred.square().sum((2, 3), keepdim=True) / number
    scale = (variance + eps).rsqrt()
    shape = [1, -1] + [1] * (x.ndim - 2)
    y = _affine(
        (centred * scale).view(x.shape),
        None if weight is None else weight.view(shape),
        None if bias is None else bias.view(shape),
    )
    return y, mean.view(batch, groups), scale.view(batch, groups)


def _without(filler: float) -> Callable[[Run, fx.Node], Any]:
    """Run the operator with cut positions set to what it ignores."""

    def special(run: Run, node: fx.Node) -> Any:
        source: Any = node.args[0]
        x: Tensor = run.env[source]
        number: float | bool = filler
        if x.dtype == torch.bool:
            number = filler > 0
        elif not x.is_floating_point():
            limits = torch.iinfo(x.dtype)
            number = max(min(filler, limits.max), limits.min)
        filled = x.masked_fill(~run.input_mask(node, list(range(x.ndim))), number)
        rest = [run.env[a] if isinstance(a, fx.Node) else a for a in node.args[1:]]
        assert callable(node.target)
        return node.target(filled, *rest, **node.kwargs)

    return special


def _topk(run: Run, node: fx.Node) -> Any:
    largest = bool(argument(node, 3, "largest", True))
    return _without(-torch.inf if largest else torch.inf)(run, node)


def _extreme(filler: float) -> Callable[[Run, fx.Node], Any]:
    """As ``_without``, for max and min, which with two tensors work on each element."""

    def special(run: Run, node: fx.Node) -> Any:
        if len(node.args) > 1 and isinstance(node.args[1], fx.Node):
            source: Any = node.args[0]
            assert callable(node.target)
            return node.target(run.env[source], run.env[node.args[1]])
        return _without(filler)(run, node)

    return special


def _grouped_product(run: Run, node: fx.Node) -> Any:
    """Experts that were cut have no rows: theirs end where those before them end."""
    ends = run.value(node, 2, "offs")
    values = [run.env[a] if isinstance(a, fx.Node) else a for a in node.args]
    values[2] = ends.cummax(0).values.to(ends.dtype)
    assert callable(node.target)
    return node.target(*values, **node.kwargs)


def _index_put(run: Run, node: fx.Node) -> Tensor:
    """Positions that were cut put nothing: their numbers were masked, and would point at the first position."""
    x: Tensor = run.value(node, 0, "self")
    given: Any = node.args[1]
    shape = torch.broadcast_shapes(*(run.env[i].shape for i in given if i is not None))
    kept = torch.ones(shape, dtype=torch.bool, device=x.device)
    for item in given:
        if item is not None:
            kept = kept & run.mask_of_all(item).expand(shape)
    indices = [None if i is None else run.env[i] for i in given]
    rest: list[Any] = [run.env[a] if isinstance(a, fx.Node) else a for a in node.args[2:]]
    assert callable(node.target)
    if kept.all() or any(i is not None and i.dtype == torch.bool for i in indices):
        return node.target(x, indices, *rest, **node.kwargs)
    used = [dim for dim, i in enumerate(indices) if i is not None]
    place = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    full = tuple(slice(None) if i is None else i.expand(shape) for i in indices)
    values = rest[0].expand(x[full].shape).flatten(place, place + len(shape) - 1)
    few = [None if i is None else i.expand(shape)[kept] for i in indices]
    chosen = values.index_select(place, kept.flatten().nonzero().flatten())
    return node.target(x, few, chosen, *rest[1:], **node.kwargs)


def _masked_scatter(run: Run, node: fx.Node) -> Tensor:
    """Rows in order, of their kept columns; masks and sources have whole rows."""
    x, mask, source = (run.value(node, i, "") for i in range(3))
    kept = run.input_mask(node, [x.ndim - 1]).flatten().expand(x.shape[-1]).nonzero().flatten()
    result: Tensor = x.clone()
    moved = x[..., kept].masked_scatter(mask[..., kept], source[..., kept])
    result[..., kept] = moved
    return result


def _softmax(run: Run, node: fx.Node) -> Any:
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


def _reduce_dims(run: Run, node: fx.Node, rank: int) -> tuple[list[int], bool]:
    dims = run.value(node, 1, "dim")
    if dims is None or dims == []:
        dims = list(range(rank))
    dims = dims if isinstance(dims, list | tuple) else [dims]
    return [dimension(int(dim), rank) for dim in dims], bool(run.value(node, 2, "keepdim", False))


def _mean(run: Run, node: fx.Node) -> Tensor:
    x: Tensor = run.value(node, 0, "self")
    schema = [item.name for item in node.target._schema.arguments]  # type: ignore[union-attr]
    dims, keep = (
        _reduce_dims(run, node, x.ndim) if "dim" in schema else (list(range(x.ndim)), False)
    )
    mean = _moments(x, run.input_mask(node, dims), dims)[0]
    return mean if keep else mean.squeeze(dims)


def _variance(run: Run, node: fx.Node) -> Any:
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
    if operator_name(node).startswith("std"):
        variance = variance.sqrt()
    return (variance, mean) if operator_name(node).endswith("_mean") else variance


def _loss(run: Run, node: fx.Node) -> Tensor:
    """The elementwise loss of the kept positions, then their mean or sum."""
    assert callable(node.target)
    names = [item.name for item in node.target._schema.arguments]  # type: ignore[attr-defined]
    values = [run.value(node, place, name, ...) for place, name in enumerate(names)]
    given = {n: v for n, v in zip(names, values, strict=True) if v is not ...}
    how = given.get("reduction", MEAN)
    each: Tensor = node.target(**{**given, "reduction": NONE})
    if how == NONE:
        return each
    left, right = (run.mask_of_all(source) for source in node.all_input_nodes[:2])
    kept = (left & right).expand(each.shape)
    total = torch.where(kept, each, each.new_zeros(())).sum()
    return total / kept.sum() if how == MEAN else total


def _attention(run: Run, node: fx.Node) -> Any:
    """softmax(q kᵀ · scale + mask) v over the kept keys, where keys are channels."""
    query, key, value = (run.value(node, place, "") for place in range(3))
    kept = run.input_mask(node, [key.ndim - 2], 1)
    assert callable(node.target)
    if bool(kept.all()):
        rest = [run.env[a] if isinstance(a, fx.Node) else a for a in node.args[3:]]
        named = {k: run.env[v] if isinstance(v, fx.Node) else v for k, v in node.kwargs.items()}
        return node.target(query, key, value, *rest, **named)
    scale = run.value(node, 6, "scale")
    logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    mask = run.value(node, 3, "attn_mask")
    if mask is not None:
        logits = (
            logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        )
    if run.value(node, 5, "is_causal", False):
        logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), -torch.inf)
    logits = logits.masked_fill(~kept.transpose(-1, -2), -torch.inf)
    return (logits - logits.amax(-1, keepdim=True)).softmax(-1) @ value


SPECIAL: dict[str, Callable[[Run, fx.Node], Any]] = {
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(LOSSES.split(), _loss),
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "instance_norm": _batch_norm,
    "native_layer_norm": _native_layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "native_group_norm": _native_group_norm,
    "softmax": _softmax,
    "_softmax": _softmax,
    "log_softmax": _softmax,
    "_log_softmax": _softmax,
    "mean": _mean,
    "var": _variance,
    "var_mean": _variance,
    "std": _variance,
    "std_mean": _variance,
    "amax": _without(-torch.inf),
    "amin": _without(torch.inf),
    "logsumexp": _without(-torch.inf),
    "logcumsumexp": _without(-torch.inf),
    "prod": _without(1.0),
    "cumprod": _without(1.0),
    "all": _without(1.0),
    "topk": _topk,
    "argmax": _without(-torch.inf),
    "argmin": _without(torch.inf),
    "max": _extreme(-torch.inf),
    "min": _extreme(torch.inf),
    "grouped_mm_fallback": _grouped_product,
    "_grouped_mm": _grouped_product,
    "masked_scatter": _masked_scatter,
    "index_put": _index_put,
}
