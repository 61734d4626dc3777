"""Rounding that is dropped here and there (QDrop): some values of a tensor are rounded, the others stay as they are.

It is most of the time that learned rounding takes, and is written for few passes over few arrays: ``torch.where`` and Boolean masks
take several times as long on a CPU as arithmetic with zeros and ones.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinier.errors import InputError


def partly_rounded(
    x: Tensor, step: Tensor, zero_point: int, low: int, high: int, rounded: Tensor
) -> Tensor:
    """x + r (x̂ − x), x̂ = s · (clamp(round(x / s) + z, low, high) − z), differentiable in x and s.

    Where r is 1 gradients are those of `tinier.tensors.rounding.learned_step`, where it is 0 that of x passes and s has none.

    Args:
        x: float32, any shape.
        step: s, positive, a scalar.
        zero_point: z.
        low: smallest integer.
        high: largest integer, 1 or more.
        rounded: r, of zeros and ones, float32, of the shape of ``x``.

    Returns:
        Like ``x``.

    Raises:
        InputError: ``high`` is below 1 or not above ``low``, or shapes do not fit.

    Cost:
        About seven passes forward and eight backward; keeps ``x`` and one array like it.

    Source:
        Wei et al. 2022, "QDrop: randomly dropping quantization for extremely low-bit post-training quantization", equation 7.

    Differs:
        x / s is x · (1 / s): values that lie within float rounding of half a step may go the other way than in ``learned_step``;
        values up to half a step beyond the ends of the grid are not yet clipped.
    """
    if high < 1 or low >= high:
        raise InputError(f"integers {low} … {high}: high of at least 1 and above low is needed")
    if step.numel() != 1 or rounded.shape != x.shape:
        raise InputError(
            f"a step of shape {tuple(step.shape)} and a mask of shape {tuple(rounded.shape)} for values of shape {tuple(x.shape)}: "
            "a single step, and a mask of the shape of the values, are needed"
        )
    result: Tensor = _PartlyRounded.apply(x, step, zero_point, low, high, rounded)
    return result


class _PartlyRounded(torch.autograd.Function):
    """See `partly_rounded`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, zero_point: int, low: int, high: int, rounded: Tensor
    ) -> Tensor:
        size = float(step)
        v = x * (1 / size)
        # r (x̂ − x) / s. At most ½ where x is rounded and not clipped.
        moved = v.round().clamp_(low - zero_point, high - zero_point).sub_(v).mul_(rounded)
        ctx.save_for_backward(x, moved, step)
        ctx.high = high
        return torch.add(x, moved, alpha=size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, moved, step = ctx.saved_tensors
        of_x = moved.abs().le_(0.5).mul_(gradient)  # zeros and ones, then the gradient
        of_step = None
        if ctx.needs_input_grad[1]:
            # Where x is clipped the slope is an end of the grid, which is moved + x / s.
            slope = _inner(gradient, moved) + _inner(gradient - of_x, x) / step
            of_step = (slope / (x.numel() * ctx.high) ** 0.5).view_as(step)
        return of_x, of_step, None, None, None, None


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Σ a b without an array of products; both are read in the order in which ``a`` lies in memory."""
    order = sorted(range(a.ndim), key=a.stride, reverse=True)
    return torch.dot(a.permute(order).reshape(-1), b.permute(order).reshape(-1))
