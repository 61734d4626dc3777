"""Rounding that is learned: AdaRound's soft rounding up or down, and quantizers whose step is trained (LSQ).

AdaRound: ŵ = s · (clamp(⌊w / s⌋ + h(V) + z, low, high) − z), where h(V) in [0, 1] is how far each weight is rounded up. V is trained
on the layer's outputs plus λ · `rounding_penalty`, which ends with every h at 0 or 1.
"""

from math import cos, pi
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinier.errors import InputError
from tinier.tensors.grid import Grid

# The sigmoid is stretched to (γ, ζ) and clipped, so that it reaches 0 and 1 for finite V.
ZETA, GAMMA = 1.1, -0.1


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) = clip(σ(V) (ζ − γ) + γ, 0, 1) with ζ = 1.1, γ = −0.1.

    Args:
        v: any shape.

    Returns:
        Like ``v``, in [0, 1]; differentiable, with gradient 0 where it is clipped.

    Source:
        Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization", equation 23.
    """
    return (v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """V = −log((ζ − γ) / (h − γ) − 1), so that h(V) = h.

    Args:
        h: any shape, in [0, 1].

    Returns:
        Like ``h``, finite: from −2.4 to 2.4.
    """
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1)


def start_rounding(w: Tensor, grid: Grid) -> Tensor:
    """V₀ with which soft rounding gives back the weights: h(V₀) = w / s − ⌊w / s⌋.

    Args:
        w: (m, n) float.
        grid: of the weights.

    Returns:
        (m, n) float32.

    Raises:
        InputError: the matrix does not fit the grid.
    """
    steps, floor, _ = _steps(w, grid)
    return inverse_rectified_sigmoid(steps - floor)


def soft_rounded(w: Tensor, v: Tensor, grid: Grid) -> Tensor:
    """ŵ = s · (clamp(⌊w / s⌋ + h(V) + z, low, high) − z), differentiable in V.

    Args:
        w: (m, n) float.
        v: (m, n) float32, V.
        grid: of the weights.

    Returns:
        (m, n) float32.

    Raises:
        InputError: the matrix does not fit the grid.

    Source:
        Nagel et al. 2020, equation 22.
    """
    _, floor, (scale, zero_point) = _steps(w, grid)
    q = (floor + rectified_sigmoid(v) + zero_point).clamp(grid.integers.low, grid.integers.high)
    return (q - zero_point) * scale


def hard_rounded(w: Tensor, v: Tensor, grid: Grid) -> Tensor:
    """The integers q = clamp(⌊w / s⌋ + [h(V) ≥ ½] + z, low, high) that soft rounding ends at.

    Args:
        w: (m, n) float.
        v: (m, n) float32, V.
        grid: of the weights.

    Returns:
        (m, n) in the grid's dtype.

    Raises:
        InputError: the matrix does not fit the grid.

    Differs:
        From `Grid.quantize` at V₀ only in halves, which go up.
    """
    _, floor, (_, zero_point) = _steps(w, grid)
    q = floor + (v >= 0) + zero_point
    return q.clamp(grid.integers.low, grid.integers.high).to(grid.integers.dtype)


def rounding_penalty(v: Tensor, beta: float) -> Tensor:
    """Σ 1 − |2 h(V) − 1|^β, which is 0 where every h is 0 or 1.

    Args:
        v: any shape, V.
        beta: β, above 0. Large: only h near 0 and 1 feel it. Small: all are pushed to the nearer end. See `annealed_beta`.

    Returns:
        Scalar, in [0, entries].

    Source:
        Nagel et al. 2020, equation 24.
    """
    return (1 - (2 * rectified_sigmoid(v) - 1).abs().pow(beta)).sum()


def annealed_beta(
    step: int, steps: int, *, start: float = 20.0, end: float = 2.0, warmup: float = 0.2
) -> float | None:
    """β of a training step: none during the warm-up, then from start to end along half a cosine.

    Args:
        step: 0 … steps − 1.
        steps: of the training, 1 or more.
        start: β after the warm-up.
        end: β of the last step.
        warmup: share of the steps that go without the penalty, in [0, 1).

    Returns:
        β, or None during the warm-up.

    Raises:
        InputError: an argument is out of its range.

    Differs:
        The paper says that β is annealed, not how; the cosine is the schedule of its authors' library, AIMET.
    """
    if not 0 <= step < steps or not 0 <= warmup < 1:
        raise InputError(
            f"step {step} of {steps} with a warm-up of {warmup:g}: steps from 0 on, and a share below 1, are needed"
        )
    first = warmup * steps
    if step < first:
        return None
    done = (step - first) / max(steps - 1 - first, 1)
    return end + (start - end) * (1 + cos(min(done, 1.0) * pi)) / 2


def learned_step(x: Tensor, step: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """x̂ = s · (clamp(round(x / s) + z, low, high) − z) with gradients for x, s and z: a quantizer whose step is trained.

    With v = x / s + z, and z rounded to an integer:

        ∂x̂/∂x = 1 for low < v < high, else 0
        ∂x̂/∂s = round(x / s) − x / s for low < v < high, low − z below, high − z above
        ∂x̂/∂z = 0 for low < v < high, else −s

    The gradients of s and z are multiplied by g = 1 / √(N · high), N being how many values share a step.

    Args:
        x: floating point, any shape.
        step: s, positive; broadcasts against ``x``: (m, 1) for rows, (m, G, 1) for groups of (m, G, n/G).
        zero_point: z, like ``step``, of integers or floating point; only the latter can have a gradient.
        low: smallest integer.
        high: largest integer, 1 or more.

    Returns:
        Like ``x``.

    Raises:
        InputError: ``high`` is below 1 or not above ``low``, or step or zero point do not broadcast to the shape of ``x``.

    Cost:
        Keeps ``x`` for the backward pass, which makes a few arrays like it.

    Source:
        Esser et al. 2020, "Learned step size quantization" (LSQ), equations 1 to 3 and section 2.2; Bhalgat et al. 2020, "LSQ+", its
        asymmetric quantizer.

    Differs:
        LSQ+ trains an offset β in the unit of x, x̂ = s · clamp(round((x − β) / s), low, high) + β. Here it is −s · z with an integer z,
        as runtimes have it: the gradient of z is that of β times −s, and the gradient of s is that of LSQ with z steps taken off the ends.
    """
    if high < 1 or low >= high:
        raise InputError(f"integers {low} … {high}: high of at least 1 and above low is needed")
    for name, each in (("step", step), ("zero point", zero_point)):
        if not _fits(each, x):
            raise InputError(
                f"{name} of shape {tuple(each.shape)} does not broadcast to values of shape {tuple(x.shape)}"
            )
    result: Tensor = _LearnedStep.apply(x, step, zero_point, low, high)
    return result


class _LearnedStep(torch.autograd.Function):
    """See `learned_step`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, zero_point: Tensor, low: int, high: int
    ) -> Tensor:
        ctx.save_for_backward(x, step, zero_point)
        ctx.ends = low, high
        z = zero_point.round() if zero_point.is_floating_point() else zero_point
        return (((x / step).round() + z).clamp(low, high) - z) * step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, step, zero_point = ctx.saved_tensors
        low, high = ctx.ends
        z = zero_point.round() if zero_point.is_floating_point() else zero_point
        v = x / step
        below, above = v + z <= low, v + z >= high
        inside = ~(below | above)
        of_x = of_step = of_zero = None
        if ctx.needs_input_grad[0]:
            of_x = gradient * inside
        if ctx.needs_input_grad[1]:
            slope = torch.where(below, low - z, torch.where(above, high - z, v.round() - v))
            of_step = (gradient * slope).sum_to_size(step.shape)
            of_step = of_step / (x.numel() / max(step.numel(), 1) * high) ** 0.5
        if ctx.needs_input_grad[2]:
            of_zero = -(gradient * ~inside * step).sum_to_size(zero_point.shape)
            of_zero = of_zero / (x.numel() / max(zero_point.numel(), 1) * high) ** 0.5
        return of_x, of_step, of_zero, None, None


def _fits(each: Tensor, x: Tensor) -> bool:
    sizes = [1] * (x.ndim - each.ndim) + list(each.shape)
    pairs = zip(sizes, x.shape, strict=False)
    return len(sizes) == x.ndim and all(size in (1, wanted) for size, wanted in pairs)


def _steps(w: Tensor, grid: Grid) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """w / s and its floor, (m, n) float32 each, and scale and zero point of the columns, (m or 1, n) each."""
    grid.check(w)
    scale, zero_point = grid.columns(w.shape[1])
    steps = w.detach().float() / scale
    return steps, steps.floor(), (scale, zero_point)
