"""The first inputs of data that a model's example inputs can be taken from."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tinier.data.reader import LABELS

COUNT = 2  # a batch of one would fix the batch size while tracing


def first_inputs(data: Any) -> dict[str, Tensor] | tuple[Tensor, ...] | None:
    """Two examples' inputs of Python data.

    Args:
        data: what the user handed in.

    Returns:
        Inputs by name or position, or None where they cannot be told (paths, functions).
    """
    if isinstance(data, DataLoader):
        return _inputs(next(iter(data)), COUNT)
    if isinstance(data, Dataset):
        rows = [data[index] for index in range(COUNT)]
        return _inputs(torch.utils.data.default_collate(rows), COUNT)
    if isinstance(data, tuple | Mapping | np.ndarray | Tensor):
        return _inputs(data, COUNT)
    return None


def _inputs(batch: Any, count: int) -> dict[str, Tensor] | tuple[Tensor, ...]:
    if isinstance(batch, Mapping):
        return {
            name: torch.as_tensor(value)[:count]
            for name, value in batch.items()
            if name not in LABELS
        }
    first = batch[0] if isinstance(batch, tuple | list) else batch
    if isinstance(first, Mapping):
        return _inputs(first, count)
    return (torch.as_tensor(first)[:count],)
