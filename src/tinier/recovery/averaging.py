"""An exponential moving average of the weights, which is often better than the last ones."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Averaged:
    """``m ← d·m + (1 − d)·w`` after each step, d = min(decay, (1 + t) / (10 + t)) at step t: the first are forgotten soon.

    Args:
        module: whose parameters and floating point buffers are averaged; others are taken as they are.
        decay: in (0, 1).

    Source:
        Polyak and Juditsky 1992; the rise of the decay as in TensorFlow's ``ExponentialMovingAverage`` (``num_updates``).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in module.state_dict().items():
            mean = self.values[name]
            if mean.is_floating_point():
                mean.lerp_(value.to(mean.dtype), 1 - decay)
            else:
                mean.copy_(value)

    def restore(self, values: Mapping[str, Tensor], steps: int) -> None:
        """Go on from what an earlier one had."""
        self.steps = steps
        for name, value in values.items():
            self.values[name].copy_(value)
