"""A finite, indexable, repeatable set of examples, in memory or read when it is needed."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from tinier.errors import DataError

Batch = tuple[dict[str, Tensor], Tensor | None]

# Rows read at a time where nobody chose a batch size; it changes no result.
CHUNK = 64


class Store(ABC):
    """Where examples are kept: rows that can be fetched in any order, any number of times.

    Attributes:
        size: number of rows.
        labelled: whether rows have labels.
        finite: whether inputs cannot be NaN or infinite by their nature (decoded images), so that nobody need look.
    """

    size: int
    labelled: bool
    finite: bool = False

    @abstractmethod
    def fetch(self, rows: Sequence[int]) -> Batch:
        """Inputs by name and labels (None where ``labelled`` is false) of some rows, dimension 0 being the row."""

    def labels(self, rows: Sequence[int]) -> Tensor:
        """Labels alone; stores that know them without reading the inputs override this."""
        parts = []
        for start in range(0, len(rows), CHUNK):
            labels = self.fetch(rows[start : start + CHUNK])[1]
            if labels is None:
                raise DataError("the data have no labels")
            parts.append(labels)
        return torch.cat(parts)


class Arrays(Store):
    """Tensors in memory.

    Args:
        inputs: input name → tensor; dimension 0 is the example.
        labels: one row for each example, or None.

    Raises:
        DataError: no inputs, or different numbers of rows.
    """

    def __init__(self, inputs: Mapping[str, Tensor], labels: Tensor | None = None) -> None:
        self.inputs = dict(inputs)
        self._labels = labels
        self.labelled = labels is not None
        if not self.inputs:
            raise DataError("the data have no inputs; give at least one array")
        counts = {name: len(value) if value.ndim else None for name, value in self.inputs.items()}
        if labels is not None:
            counts["labels"] = len(labels) if labels.ndim else None
        if None in counts.values():
            name = next(key for key, count in counts.items() if count is None)
            raise DataError(
                f"{name} is a single number; one row for each example is needed (dimension 0)"
            )
        if len(set(counts.values())) > 1:
            raise DataError(
                "the arrays have different numbers of examples: "
                + ", ".join(f"{name} {count}" for name, count in counts.items())
            )
        self.size = next(count for count in counts.values() if count is not None)

    def fetch(self, rows: Sequence[int]) -> Batch:
        first, last = (rows[0], rows[-1] + 1) if len(rows) else (0, 0)
        # Rows that follow each other are handed out as they are, without a copy.
        together = list(rows) == list(range(first, last))
        index: slice | Tensor = (
            slice(first, last) if together else torch.as_tensor(rows, dtype=torch.long)
        )
        labels = None if self._labels is None else self._labels[index]
        return {name: value[index] for name, value in self.inputs.items()}, labels

    def labels(self, rows: Sequence[int]) -> Tensor:
        if self._labels is None:
            raise DataError("the data have no labels")
        return self._labels[torch.as_tensor(rows, dtype=torch.long)]


class Examples:
    """A finite set of examples: inputs by name and, where there are any, labels.

    Args:
        store: where the rows are kept.
        origin: what ``read`` can read again ("valid.npz", "module:function"); "" for Python objects.
        classes: names of the classes by label, where known.
        notes: what was done to the data on reading that a reader of the result must know ("uint8 scaled by 1/255").
        rows: the rows of the store that belong to the set, in order; all of them if None.
    """

    def __init__(
        self,
        store: Store,
        *,
        origin: str = "",
        classes: Sequence[str] = (),
        notes: Sequence[str] = (),
        rows: Sequence[int] | None = None,
    ) -> None:
        self.store = store
        self.origin = origin
        self.classes = tuple(classes)
        self.notes = tuple(notes)
        self.rows = tuple(range(store.size) if rows is None else rows)

    @property
    def labelled(self) -> bool:
        return self.store.labelled

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        """Go through every example once; the last batch may be smaller.

        Args:
            size: examples in a batch, 1 or more.
            shuffle: seed of the order; None keeps the order of the data.

        Returns:
            Inputs by name (dimension 0 is the batch) and labels, or None without labels.
        """
        if size < 1:
            raise DataError(f"batch size {size}; 1 or more is needed")
        order: Sequence[int] = self.rows
        if shuffle is not None:
            generator = torch.Generator().manual_seed(shuffle)
            order = [self.rows[i] for i in torch.randperm(len(self), generator=generator).tolist()]
        for start in range(0, len(order), size):
            yield self.store.fetch(order[start : start + size])

    def labels(self) -> Tensor | None:
        """All labels in order, without reading the inputs where the store knows them; None without labels."""
        if not self.labelled:
            return None
        return self._labels

    @cached_property
    def _labels(self) -> Tensor:
        return self.store.labels(self.rows)

    def subset(self, indices: Sequence[int]) -> "Examples":
        """The examples at ``indices`` (0 … len − 1), in that order, sharing the store.

        Raises:
            DataError: an index is out of range.
        """
        wrong = next((index for index in indices if not 0 <= index < len(self)), None)
        if wrong is not None:
            raise DataError(f"example {wrong} does not exist; the data have {len(self)}")
        return Examples(
            self.store,
            origin=self.origin,
            classes=self.classes,
            notes=self.notes,
            rows=[self.rows[index] for index in indices],
        )

    def fingerprints(self) -> list[bytes]:
        """A hash of the inputs of each example, in order: equal inputs have equal ones, whatever their labels.

        Cost:
            One pass over the data.
        """
        found: list[bytes] = []
        for inputs, _ in self.batches(CHUNK):
            mask = inputs.get("attention_mask")
            tensors = [inputs[name].detach().cpu().contiguous() for name in sorted(inputs)]
            for row in range(len(tensors[0])):
                one = hashlib.blake2b(digest_size=16)
                for tensor in tensors:
                    value = tensor[row]
                    if mask is not None and mask.ndim == 2 and tensor.shape[:2] == mask.shape:
                        # The same text is padded to other lengths in other files.
                        value = value[mask[row].bool()]
                    one.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
                found.append(one.digest())
        return found

    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all inputs and labels, in order, as 64 hexadecimal digits.

        It is of what the network is fed (decoded, scaled, padded), and does not depend on how the data are stored.

        Cost:
            One pass over the data.
        """
        hashes: dict[str, hashlib._Hash] = {}
        kinds: dict[str, str] = {}
        for inputs, labels in self.batches(CHUNK):
            tensors = {f"input {name}": value for name, value in inputs.items()}
            if labels is not None:
                tensors["labels"] = labels
            for name, value in tensors.items():
                kinds[name] = f"{value.dtype} {tuple(value.shape[1:])}"
                # bfloat16 has no numpy type: hash the bytes themselves.
                raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
                hashes.setdefault(name, hashlib.sha256()).update(raw.numpy().tobytes())
        whole = hashlib.sha256(f"{len(self)} examples".encode())
        for name in sorted(hashes):
            whole.update(f"\n{name} {kinds[name]} {hashes[name].hexdigest()}".encode())
        return whole.hexdigest()
