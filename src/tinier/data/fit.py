"""Data as the model's inputs need them: the conversions that lose nothing, and clear refusals of the rest."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tinier.data.base import Batch, Examples, Store
from tinier.data.reader import Options
from tinier.errors import DataError


class Fitted(Store):
    """A store whose inputs are converted to the model's dtypes as they are fetched.

    Args:
        store: the data as they are.
        dtypes: input name → dtype that the model needs.
        scaled: inputs that are uint8 images for a float model: divided by 255, then ``mean`` and ``std``.
    """

    def __init__(
        self,
        store: Store,
        dtypes: Mapping[str, torch.dtype],
        scaled: Sequence[str],
        options: Options,
    ) -> None:
        self.store = store
        self.dtypes = dict(dtypes)
        self.scaled = frozenset(scaled)
        self.options = options
        self.size = store.size
        self.labelled = store.labelled
        self.finite = store.finite

    def fetch(self, rows: Sequence[int]) -> Batch:
        inputs, labels = self.store.fetch(rows)
        return {name: self._convert(name, value, rows) for name, value in inputs.items()}, labels

    def labels(self, rows: Sequence[int]) -> Tensor:
        return self.store.labels(rows)

    def _convert(self, name: str, value: Tensor, rows: Sequence[int]) -> Tensor:
        dtype = self.dtypes[name]
        if name in self.scaled:
            return normalized(value.to(dtype) / 255, self.options)
        converted = value.to(dtype)
        if not dtype.is_floating_point and not torch.equal(converted.to(value.dtype), value):
            wrong = (converted.to(value.dtype) != value).flatten(1).any(1)
            row = int(wrong.int().argmax())
            raise DataError(
                f"{name}: example {rows[row]} has a value that {dtype} cannot hold, which the model's "
                "input needs"
            )
        return converted


def fit(examples: Examples, example: Mapping[str, Tensor], options: Options) -> Examples:
    """The examples with the dtypes of the model's inputs.

    uint8 images for a float model are divided by 255 (then ``mean`` and ``std``, if given), floats become the model's
    float type, integers the model's integer type where every value fits. Anything else is refused.

    Args:
        examples: as read.
        example: the network's example inputs.
        options: mean and std.

    Raises:
        DataError: no examples, an input is missing, or a dtype that does not fit; the message has the fix.
    """
    if not len(examples):
        raise DataError(f"{examples.origin or 'the data'}: there are no examples")
    first = examples.store.fetch(examples.rows[:1])[0]
    missing = [name for name in example if name not in first]
    if missing:
        raise DataError(f"the data have no {', '.join(missing)}; they have {', '.join(first)}")
    scaled = []
    notes = list(examples.notes)
    for name, wanted in example.items():
        got = first[name]
        if got.dtype == wanted.dtype:
            continue
        if wanted.dtype.is_floating_point and got.dtype == torch.uint8 and got.ndim >= 3:
            scaled.append(name)
            notes.append(
                f"{name}: uint8 images divided by 255"
                + (", then mean and std" if options.mean or options.std else "")
            )
        elif got.is_floating_point() != wanted.is_floating_point():
            plain = str(wanted.dtype).removeprefix("torch.")
            raise DataError(
                f"{name}: the data are {str(got.dtype).removeprefix('torch.')}, the model needs {plain}; "
                f"convert them as the model was trained, for instance x.astype('{plain}')"
                + (" / 255" if got.dtype == torch.uint8 else "")
            )
        else:
            short = [str(dtype).removeprefix("torch.") for dtype in (got.dtype, wanted.dtype)]
            notes.append(f"{name}: {short[0]} cast to {short[1]}")
    dtypes = {name: value.dtype for name, value in example.items()}
    extra = [name for name in first if name not in example]
    if extra:
        raise DataError(
            f"the model has no inputs {', '.join(extra)}; it takes {', '.join(example)}"
        )
    if all(first[name].dtype == dtype for name, dtype in dtypes.items()):
        return examples
    return Examples(
        Fitted(examples.store, dtypes, scaled, options),
        origin=examples.origin,
        classes=examples.classes,
        notes=notes,
        rows=examples.rows,
    )


def normalized(images: Tensor, options: Options) -> Tensor:
    """Images (n, channels, height, width) in [0, 1] less the mean and divided by the deviation of each channel.

    Raises:
        DataError: as many means or deviations are needed as there are channels (or one), deviations above 0.
    """
    for name, values in (("mean", options.mean), ("std", options.std)):
        if values is None:
            continue
        if images.ndim != 4 or len(values) not in (1, images.shape[1]):
            raise DataError(
                f"{name} has {len(values)} numbers, the images have shape {tuple(images.shape[1:])}; "
                "give one for each channel (dimension 0 of an image), or one for all"
            )
        if name == "std" and min(values) <= 0:
            raise DataError(f"std {values}: each must be above 0")
        column = torch.tensor(values, dtype=images.dtype).view(1, -1, 1, 1)
        images = images - column if name == "mean" else images / column
    return images
