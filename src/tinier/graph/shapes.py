"""Shapes of what the commonest operators compute, known without torch's own computation of them: that is in Python, at length."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

META = torch.device("meta")
aten = torch.ops.aten


def _like(source: Any, *_: Any, **__: Any) -> Tensor | None:
    if not source.is_meta:
        return None
    return torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device=META)


def _contiguous(source: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return source.new_empty(source.shape) if source.is_meta else None


def _linear(source: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if not source.is_meta or source.ndim < 2 or weight.ndim != 2 or source.dtype != weight.dtype:
        return None
    if source.shape[-1] != weight.shape[1]:
        return None
    return source.new_empty((*source.shape[:-1], weight.shape[0]))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor | None:
    same = query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and query.is_meta
    fits = query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]
    if not same or not fits or not query.dtype == key.dtype == value.dtype:
        return None
    if mask is not None:
        wanted = (*query.shape[:-1], key.shape[-2])
        if mask.ndim > len(wanted) or any(
            m not in (1, n) for m, n in zip(mask.shape[::-1], wanted[::-1], strict=False)
        ):
            return None
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _pointwise(source: Any, other: Any, *rest: Any, **__: Any) -> Tensor | None:
    """Of operands of one shape and type, or with a number that leaves the type."""
    if isinstance(other, Tensor):
        if source.shape != other.shape or source.dtype != other.dtype or not other.is_meta:
            return None
    elif not source.is_floating_point() or not isinstance(other, int | float):
        return None
    return _like(source) if source.is_floating_point() else None


# Operators that torch works out the shapes of in Python, at length.
QUICK: dict[Any, Callable[..., Tensor | None]] = {
    aten.batch_norm.default: _like,
    aten.linear.default: _linear,
    aten.layer_norm.default: _contiguous,
    aten.scaled_dot_product_attention.default: _attention,
    aten.dropout.default: _like,
    aten.gelu.default: _like,
    aten.silu.default: _like,
    aten.relu.default: _like,
    aten.add.Tensor: _pointwise,
    aten.mul.Tensor: _pointwise,
}
