"""The first inputs of data, from which a model's example inputs can be taken."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from tinier.data.npz import arrays_of
from tinier.data.python import FUNCTION, call_function
from tinier.data.reader import LABELS
from tinier.errors import DataError

COUNT = 2  # a batch of one would fix the batch size while tracing

First = dict[str, Tensor] | tuple[Tensor, ...]


def first_inputs(data: Any) -> First | None:
    """The inputs of the first two examples, as a float model gets them: uint8 images divided by 255, float64 as float32.

    Args:
        data: what the user handed in: arrays, a Dataset, a DataLoader, an ``.npz`` file, or ``module:function``.

    Returns:
        Inputs by name, or in order; None where they cannot be told without knowing the model (texts, images in files).

    Raises:
        DataError: there is no example to take.
    """
    if isinstance(data, str) and FUNCTION.fullmatch(data) and not Path(data).exists():
        return first_inputs(call_function(data))
    if isinstance(data, str | Path):
        path = Path(data)
        if path.suffix.lower() != ".npz" or not path.is_file():
            return None
        data = arrays_of(path)
    if isinstance(data, DataLoader):
        batch = next(iter(data), None)
        if batch is None:
            raise DataError("the DataLoader gives no batch")
        return _inputs(batch)
    if isinstance(data, Dataset):
        if isinstance(data, IterableDataset):
            rows = [row for row, _ in zip(data, range(COUNT), strict=False)]
        else:
            rows = [data[index] for index in range(min(COUNT, len(data)))]  # type: ignore[arg-type]
        if not rows:
            raise DataError("the Dataset has no example")
        return _inputs(default_collate(rows))
    if isinstance(data, tuple | Mapping | np.ndarray | Tensor):
        return _inputs(data)
    return None


def _inputs(batch: Any) -> First:
    if isinstance(batch, Mapping):
        named = {
            name: _tensor(value) for name, value in batch.items() if name.lower() not in LABELS
        }
        # One array goes to the model's one input, whatever either is called.
        return named if len(named) > 1 else tuple(named.values())
    if not isinstance(batch, tuple | list):
        return (_tensor(batch),)
    if isinstance(batch[0], Mapping):
        return _inputs(batch[0])
    # (x, y) has one input; (x1, x2, …, y) has all but the last.
    return tuple(_tensor(value) for value in (batch[:-1] if len(batch) > 1 else batch))


def _tensor(value: Any) -> Tensor:
    tensor = torch.as_tensor(value)[:COUNT]
    if tensor.dtype == torch.uint8 and tensor.ndim >= 3:
        return tensor.float() / 255
    return tensor.float() if tensor.dtype == torch.float64 else tensor
