"""Several networks as one, which answers with the means of their outputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Ensemble(nn.Module):
    """The means of the outputs of networks with the same inputs; of logits, the geometric mean of their probabilities.

    Args:
        networks: at least one; what they return must have the same structure.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, **inputs: Tensor) -> Any:
        answers = [pytree.tree_flatten(network(**inputs)) for network in self.networks]
        leaves = zip(*(found for found, _ in answers), strict=True)
        return pytree.tree_unflatten([_mean(values) for values in leaves], answers[0][1])


def _mean(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor) and first.is_floating_point():
        return torch.stack(list(values)).mean(0)
    return first
