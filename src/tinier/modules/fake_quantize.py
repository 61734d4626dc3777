"""Quantizers that can be trained: float values on the grid of integers, whose steps are parameters."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinier.errors import InputError
from tinier.tensors.affine import Integers
from tinier.tensors.rounding import learned_step

BIAS = Integers(-(2**31), 2**31 - 1)
DEAD = 256  # channels smaller than the largest by this factor are nearly dead


class Step(nn.Module):
    """A quantization step that is learned: s = s₀ · exp(θ), at most a limit.

    Training moves θ, so that a learning rate means the same part of every step, large or small, and no step can become negative.

    Args:
        start: s₀, positive, float32, any shape.
        most: the limit.

    Attributes:
        learning: whether θ has a gradient; while it is False the step stays as it is.
    """

    start: Tensor

    def __init__(self, start: Tensor, most: float = math.inf) -> None:
        super().__init__()
        self.register_buffer("start", start.clone())
        self.theta = nn.Parameter(torch.zeros_like(start))  # like start
        self.most = most
        self.learning = True

    def forward(self) -> Tensor:
        """s, of the shape of ``start``."""
        theta = self.theta if self.learning else self.theta.detach()
        step = self.start * theta.exp()
        if self.most == math.inf:
            return step
        # The gradient goes through the limit, else a step that reached it could not come back.
        return torch.where(step > self.most, self.most + (step - step.detach()), step)

    def restart(self, start: Tensor) -> None:
        """Take another step; training goes on from there."""
        with torch.no_grad():
            self.start.copy_(start)
            self.theta.zero_()


class ActivationQuantizer(nn.Module):
    """x̂ = s · (clamp(round(x / s) + z, low, high) − z) with a learned s and a fixed z.

    Args:
        step: s, a scalar; quantizers of values that share a scale share it.
        zero_point: z.
        integers: low … high.

    Source:
        Esser et al. 2020, "Learned step size quantization".
    """

    zero_point: Tensor

    def __init__(self, step: Step, zero_point: int, integers: Integers) -> None:
        super().__init__()
        self.step = step
        self.register_buffer("zero_point", torch.tensor(zero_point))  # () int64
        self.integers = integers

    def forward(self, x: Tensor) -> Tensor:
        """The nearest values that the integers stand for, like ``x``."""
        ends = self.integers.low, self.integers.high
        return learned_step(x, self.step(), self.zero_point, *ends)

    def extra_repr(self) -> str:
        """For printing."""
        return (
            f"{self.integers.low} … {self.integers.high}, zero_point={int(self.zero_point.item())}"
        )


class WeightQuantizer(nn.Module):
    """ŵ = s · (clamp(round(w / s) + z, low, high) − z) with a learned s for each channel, or each group of its inputs.

    What is trained is w / u: the unit u of a channel is the power of two next to the root mean square of its weights, so that a learning
    rate means the same part of every channel. Folded batch norms make channels whose sizes differ by far, and Adam's steps do not.

    Args:
        step: s, (m or 1, groups); groups above 1 only for weights of two dimensions.
        zero_point: z, like the step, int64.
        integers: low … high.
        axis: dimension of the channels.
        weight: w at the start, for the units.

    Source:
        Esser et al. 2020, "Learned step size quantization".
    """

    zero_point: Tensor
    unit: Tensor

    def __init__(
        self, step: Step, zero_point: Tensor, integers: Integers, axis: int, weight: Tensor
    ) -> None:
        super().__init__()
        self.step = step
        self.register_buffer("zero_point", zero_point.clone())  # (m or 1, groups) int64
        self.register_buffer(
            "unit", _unit(weight.detach(), axis)
        )  # (1, …, m, …, 1) like the weight
        self.integers = integers
        self.axis = axis

    def forward(self, trained: Tensor) -> Tensor:
        """The nearest values that the integers stand for, of the shape of the weight; ``trained`` is w / u."""
        weight = trained * self.unit
        step, zero_point = self.step(), self.zero_point
        ends = self.integers.low, self.integers.high
        if step.shape[1] == 1:
            shape = [1] * weight.ndim
            shape[self.axis] = len(step)
            return learned_step(weight, step.view(shape), zero_point.view(shape), *ends)
        rows = weight.movedim(self.axis, 0)  # (m, n)
        parts = rows.unflatten(1, (step.shape[1], -1))  # (m, groups, n / groups)
        rounded = learned_step(parts, step[..., None], zero_point[..., None], *ends)
        return rounded.flatten(1).movedim(0, self.axis)

    def extra_repr(self) -> str:
        """For printing."""
        return f"{self.integers.low} … {self.integers.high}, axis={self.axis}"


def _unit(weight: Tensor, axis: int) -> Tensor:
    others = [dim for dim in range(weight.ndim) if dim != axis]
    size = weight.square().mean(others, keepdim=True).sqrt()  # (1, …, m, …, 1)
    most = size.max()
    if not most > 0:
        return torch.ones_like(size)
    # Channels that are nearly dead move with the smallest of those that are not. Powers of two divide without rounding.
    return torch.exp2(size.clamp_min(most / DEAD).log2().round())


class BiasQuantizer(nn.Module):
    """A bias in units of input step · weight step, as 32-bit integers have it; the gradient goes through as if it were not rounded.

    Args:
        source: the quantizer of what the weight multiplies.
        weight: the quantizer of the weight, with one step a channel.
    """

    def __init__(self, source: ActivationQuantizer, weight: WeightQuantizer) -> None:
        super().__init__()
        self.source = source
        self.weight = weight

    def forward(self, bias: Tensor) -> Tensor:
        """The nearest values, like ``bias``, (m,)."""
        with torch.no_grad():
            step = (self.weight.step()[:, 0] * self.source.step()).expand(len(bias))
            steps = (bias.double() / step.double()).round().clamp(BIAS.low, BIAS.high)
            rounded = steps.float() * step
        result: Tensor = _StraightThrough.apply(bias, rounded)
        return result


class _StraightThrough(torch.autograd.Function):
    """The second value, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@dataclass(frozen=True)
class LearnSteps:
    """Lets the steps of a network learn during a part of the training only; called before each step with the part that is done.

    Attributes:
        first, last: the part, 0 ≤ first ≤ last ≤ 1. Weights that settle last find steps that no longer move.
    """

    first: float = 0.0
    last: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last <= 1:
            raise InputError(
                f"steps that learn from {self.first} to {self.last} of the training: 0 ≤ first ≤ last ≤ 1 is needed"
            )

    def __call__(self, module: nn.Module, done: float) -> None:
        """Set whether the steps in ``module`` learn."""
        for part in module.modules():
            if isinstance(part, Step):
                part.learning = self.first <= done < self.last
