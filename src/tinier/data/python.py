"""Data that are Python: arrays, torch data sets and loaders, and functions that make them."""

import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from tinier.data.base import Arrays, Batch, Examples, Store
from tinier.data.reader import Options, Reader, has_label_name, plain_labels
from tinier.errors import DataError
from tinier.graph.origin import line_of

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def import_function(spec: str) -> Callable[..., Any]:
    """The function that ``module:function`` names; modules of the current directory are found.

    Args:
        spec: for instance ``mytask:valid`` or ``package.module:function``.

    Raises:
        DataError: no such module or function, or it cannot be called.
    """
    module_name, _, name = spec.partition(":")
    folder = os.getcwd()
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        where = line_of(error)
        raise DataError(
            f"{spec}: the module {module_name} cannot be imported from the current folder or the "
            f"Python path: {type(error).__name__}: {error}{f' at {where}' if where else ''}"
        ) from error
    finally:
        if added:
            sys.path.remove(folder)
    function = getattr(module, name, None)
    if not callable(function):
        have = ", ".join(key for key, value in vars(module).items() if callable(value)) or "none"
        raise DataError(f"{spec}: {module_name} has no function {name}; it has {have}")
    return function  # type: ignore[no-any-return]


def call_function(spec: str) -> Any:
    """What the function that ``module:function`` names returns.

    Raises:
        DataError: there is none, or it fails; the message has the line of the user's file.
    """
    function = import_function(spec)
    try:
        return function()
    except Exception as error:
        where = line_of(error)
        raise DataError(
            f"{spec}() failed{f' at {where}' if where else ''}: {type(error).__name__}: {error}"
        ) from error


class Items(Store):
    """A map-style torch data set, read when it is needed.

    Args:
        dataset: items are ``(x, y)``, ``(x1, x2, …, y)``, a dict by input name, or ``x`` alone.
        collate: makes one batch of a list of items.
        names: input names of the network, in order.
    """

    def __init__(
        self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any], names: Sequence[str]
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.names = tuple(names)
        self.size = len(dataset)  # type: ignore[arg-type]
        self.labelled = self.size > 0 and self.fetch([0])[1] is not None

    def fetch(self, rows: Sequence[int]) -> Batch:
        items = []
        for row in rows:
            try:
                items.append(self.dataset[row])
            except Exception as error:
                raise DataError(
                    f"example {row} of the {type(self.dataset).__name__} cannot be read: "
                    f"{type(error).__name__}: {error}"
                ) from error
        try:
            batch = self.collate(items)
        except (RuntimeError, TypeError, ValueError) as error:
            raise DataError(
                f"examples {rows[0]} to {rows[-1]} cannot be put into one batch: {error}; "
                "every item must have the same shapes, or give a DataLoader with a collate_fn"
            ) from error
        return by_name(batch, self.names)


def by_name(batch: Any, names: Sequence[str]) -> Batch:
    """Inputs by name and labels of arrays, a tuple ``(inputs…, labels)``, a dict, or one array.

    Args:
        batch: arrays or tensors whose dimension 0 is the example.
        names: input names of the network, in order.

    Raises:
        DataError: it is none of these, or inputs are missing.
    """
    if isinstance(batch, Mapping):
        arrays = {str(key): value for key, value in batch.items()}
        labels = next((arrays.pop(key) for key in list(arrays) if has_label_name(key, names)), None)
        if len(names) == 1 and names[0] not in arrays and arrays:
            # One input: whatever the array is called, it can only be that one.
            arrays = {names[0]: arrays.get("x", next(iter(arrays.values())))}
        missing = [name for name in names if name not in arrays]
        if missing:
            raise DataError(
                f"the data have no {', '.join(missing)}; the model's inputs are {', '.join(names)}, "
                f"the data have {', '.join(map(str, batch)) or 'nothing'}: rename them"
            )
        inputs = {name: arrays[name] for name in names}
    elif isinstance(batch, tuple | list):
        values = list(batch)
        if values and isinstance(values[0], Mapping | tuple | list):
            inputs = by_name(values[0], names)[0]
            labels = values[1] if len(values) > 1 else None
            extra = len(values) - 2
        else:
            inputs = dict(zip(names, values, strict=False))
            labels = values[len(names)] if len(values) > len(names) else None
            extra = len(values) - len(names) - 1
        if len(inputs) < len(names) or extra > 0:
            raise DataError(
                f"each item has {len(values)} parts; the model takes {len(names)} "
                f"({', '.join(names)}) and at most one label: give tuples of {len(names)} or "
                f"{len(names) + 1}, or a dict by input name"
            )
    elif len(names) == 1:
        inputs, labels = {names[0]: batch}, None
    else:
        raise DataError(
            f"each item is one {type(batch).__name__}, but the model takes {', '.join(names)}: "
            "give a dict by input name"
        )
    tensors = {name: to_tensor(value, name) for name, value in inputs.items()}
    return tensors, None if labels is None else plain_labels(to_tensor(labels, "labels"))


def to_tensor(value: Any, name: str) -> Tensor:
    """A tensor of an array, a tensor or nested lists of numbers.

    Raises:
        DataError: it has no numbers in it.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"{name}: an array of {array.dtype} holds no numbers; give integers or floats"
            + (" (class indices 0, 1, …)" if name == "labels" else "")
        )
    if array.dtype in (np.uint16, np.uint32, np.uint64):
        array = array.astype(np.int64)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


class PythonReader(Reader):
    """Tensors, data sets, loaders, and ``module:function``."""

    name = "python"

    def accepts(self, spec: Any) -> bool:
        if isinstance(spec, str):
            return FUNCTION.fullmatch(spec) is not None and not os.path.exists(spec)
        kinds = (Examples, Dataset, DataLoader, Mapping, tuple, list, Tensor, np.ndarray)
        return isinstance(spec, kinds)

    def read(self, spec: Any, example: Mapping[str, Tensor], options: Options) -> Examples:
        names = tuple(example)
        if isinstance(spec, str):
            made = call_function(spec)
            if isinstance(made, str) or not self.accepts(made):
                raise DataError(
                    f"{spec}() gave a {type(made).__name__}; a Dataset, a DataLoader, a tuple (x, y) "
                    "or a dict of arrays is needed"
                )
            read = self.read(made, example, options)
            return Examples(
                read.store, origin=spec, classes=read.classes, notes=read.notes, rows=read.rows
            )
        if isinstance(spec, Examples):
            return spec
        notes: tuple[str, ...] = ()
        collate: Callable[[list[Any]], Any] = default_collate
        if isinstance(spec, DataLoader):
            if spec.collate_fn is not None:
                collate = spec.collate_fn
            # Examples are fetched by index, in the order of the data set, so that every pass sees the same ones.
            notes = ("the loader's order, workers and batch size are not used",)
            spec = spec.dataset
        if isinstance(spec, IterableDataset):
            raise DataError(
                f"{type(spec).__name__} can be read only once and in one order; give a Dataset with "
                "__len__ and __getitem__, or arrays"
            )
        if isinstance(spec, Dataset):
            if not hasattr(spec, "__len__"):
                raise DataError(f"{type(spec).__name__} has no __len__; it is needed")
            classes = getattr(spec, "classes", ())
            return Examples(Items(spec, collate, names), classes=_names(classes), notes=notes)
        if isinstance(spec, tuple | list | Mapping) and not spec:
            raise DataError(f"the data: there are no examples; {type(spec).__name__} is empty")
        return Examples(Arrays(*by_name(spec, names)))


def _names(classes: Any) -> tuple[str, ...]:
    is_list = isinstance(classes, tuple | list)
    return tuple(classes) if is_list and all(isinstance(name, str) for name in classes) else ()
