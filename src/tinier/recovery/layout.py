"""How the tensors of images lie in memory while a network trains: channels last, where it accepts that, for the speed of convolutions."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tinier.graph import trace as tracing


def layout_of(module: nn.Module, inputs: Mapping[str, Tensor]) -> torch.memory_format:
    """Channels last for networks of images that run so; their kernels are stored so from now on.

    Args:
        module: in evaluation mode.
        inputs: a few examples.
    """
    images = any(value.ndim == 4 for value in inputs.values())
    convolutions = any(p.ndim == 4 for p in module.parameters())
    if not (images and convolutions):
        return torch.contiguous_format
    try:
        store(module, torch.channels_last)
        with torch.no_grad():
            tracing.call(module, lying(inputs, torch.channels_last))
    except RuntimeError:  # a `view` that only contiguous tensors allow
        store(module, torch.contiguous_format)
        return torch.contiguous_format
    return torch.channels_last


def store(module: nn.Module, layout: torch.memory_format) -> None:
    """Store the kernels of two dimensions in a layout."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def lying(inputs: Mapping[str, Tensor], layout: torch.memory_format) -> dict[str, Tensor]:
    """The inputs, images among them in a layout."""
    if layout is torch.contiguous_format:
        return dict(inputs)
    return {
        name: value.contiguous(memory_format=layout) if value.ndim == 4 else value
        for name, value in inputs.items()
    }
