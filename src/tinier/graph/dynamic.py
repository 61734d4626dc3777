"""Activations rounded to a range that each run finds for itself: one operator, as ONNX has it."""

import torch
from torch import Tensor

STEPS = 255  # of unsigned integers of eight bits
LARGEST = 127  # of signed ones, as many below 0 as above
LEAST = 1e-30  # a row of smaller values is one of zeros


@torch.library.custom_op("tinier::round_dynamically", mutates_args=())
def round_dynamically(x: Tensor) -> Tensor:
    """x̂ = s · (clamp(round(x / s) + z, 0, 255) − z) with s = (max(x, 0) − min(x, 0)) / 255 and z = round(−min(x, 0) / s).

    Args:
        x: float32, of any shape with at least one value; one range for the whole tensor, which 0 is in.

    Returns:
        Of the same shape and type.

    Source:
        ONNX, DynamicQuantizeLinear (opset 11).
    """
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / STEPS
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = (-low / scale).clamp(0, STEPS).round()
    return (((x / scale).round() + zero_point).clamp(0, STEPS) - zero_point) * scale


@round_dynamically.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tinier::round_tokens", mutates_args=())
def round_tokens(x: Tensor) -> Tensor:
    """x̂ = s · round(x / s) with s = max |x| / 127 over the last axis.

    Args:
        x: float32, (…, n); each row of n values has a scale of its own. A row of zeros stays one.

    Returns:
        Of the same shape and type.

    Source:
        Yao et al. 2022, "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers", section 4.1.
    """
    scale = x.abs().amax(-1, keepdim=True).clamp(min=LEAST) / LARGEST
    return (x / scale).round().clamp(-LARGEST - 1, LARGEST) * scale


@round_tokens.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


# In graphs.
ROUND = torch.ops.tinier.round_dynamically.default
ROUND_TOKENS = torch.ops.tinier.round_tokens.default
