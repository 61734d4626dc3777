"""Edits change networks, plans are lists of edits: decisions as values that can be printed, saved and applied again."""

import base64
import dataclasses
import json
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from tinier.network import Network

# The types that tensors of a plan may have.
DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (torch.float32, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
}


@dataclass(frozen=True, eq=False)
class Values:
    """A tensor as a value: two of the same type, shape and bits are equal. What it holds must not be changed.

    Attributes:
        tensor: on the CPU, contiguous.
    """

    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Values):
            return NotImplemented
        ours, theirs = self.tensor, other.tensor
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)

    def __hash__(self) -> int:
        return hash((self.tensor.dtype, tuple(self.tensor.shape)))

    def __deepcopy__(self, memo: object) -> "Values":
        return self

    def to_json(self) -> dict[str, Any]:
        """Type, shape and the compressed bytes as text."""
        array = self.tensor.detach().contiguous().numpy()
        text = base64.b85encode(zlib.compress(array.tobytes(), 6)).decode()
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return {"dtype": dtype, "shape": list(array.shape), "bytes": text}

    @staticmethod
    def from_json(row: Any) -> "Values":
        """What ``to_json`` made; anything else raises ValueError, before more memory is taken than the shape asks for."""
        shape, dtype = row["shape"], DTYPES.get(row["dtype"])
        if dtype is None or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(
                f"a tensor of {row['dtype']} {shape}; {', '.join(DTYPES)} are possible"
            )
        size = prod(shape) * dtype.itemsize
        raw = zlib.decompressobj()
        try:
            data = raw.decompress(base64.b85decode(row["bytes"]), size + 1)
        except zlib.error as error:
            raise ValueError(f"a tensor of shape {shape}: {error}") from error
        if len(data) != size:
            raise ValueError(f"a tensor of shape {shape} needs {size} bytes")
        if not size:
            return Values(torch.zeros(shape, dtype=dtype))
        return Values(torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape))


@dataclass(frozen=True)
class Edit(ABC):
    """One change of a network. Concrete edits are frozen dataclasses of numbers, strings, ``Values`` and (nested) tuples of them.

    Attributes:
        stage: consecutive edits of one stage are applied together; the kind where it is empty.
        of_artifact: what it does belongs to what a runtime runs; the weights on disk, to train on, are those before it.
    """

    kind: ClassVar[str]
    stage: ClassVar[str] = ""
    of_artifact: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def apply_all(cls, edits: "list[Edit]", network: Network) -> Network:
        """A new network with consecutive edits of this stage applied together; ``network`` is left as it is."""

    @abstractmethod
    def row(self) -> tuple[str, str]:
        """What is changed, and to what: one line of the plan's table."""


@dataclass(frozen=True)
class Plan:
    """An ordered list of edits. Applying it needs no data and is deterministic; an empty plan is the identity."""

    edits: tuple[Edit, ...] = ()

    def apply(self, network: Network) -> Network:
        """A new network with every edit applied, in order.

        Raises:
            RefusedError: an edit does not fit the network.
        """
        # Edits leave their input alone, so that the network's trace can be used as it is.
        result = network if self.edits else network.copy()
        for _, run in groupby(self.edits, lambda edit: edit.stage or edit.kind):
            edits = list(run)
            result = type(edits[0]).apply_all(edits, result)
        return result

    def __add__(self, other: "Plan") -> "Plan":
        return Plan(self.edits + other.edits)

    def to_json(self) -> str:
        """The plan as JSON text; ``Plan.from_json`` gives an equal plan back."""
        rows = [
            {"kind": edit.kind}
            | {f.name: _plain(getattr(edit, f.name)) for f in dataclasses.fields(edit)}
            for edit in self.edits
        ]
        return json.dumps({"version": 1, "edits": rows}, indent=1)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """The plan that ``to_json`` wrote. Unknown kinds and fields raise ValueError."""
        kinds = {cls.kind: cls for cls in _concrete(Edit)}  # type: ignore[type-abstract]
        edits = []
        for row in json.loads(text)["edits"]:
            kind = row.pop("kind")
            if kind not in kinds:
                raise ValueError(f"plan: unknown edit {kind!r}; known are {', '.join(kinds)}")
            try:
                edits.append(kinds[kind](**{key: _frozen(value) for key, value in row.items()}))
            except (TypeError, KeyError) as error:
                raise ValueError(f"plan: {kind}: {error}") from error
        return Plan(tuple(edits))

    def __str__(self) -> str:
        rows = [(edit.kind, *edit.row()) for edit in self.edits] or [("nothing", "", "")]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def _concrete(cls: type[Edit]) -> list[type[Edit]]:
    return [leaf for child in cls.__subclasses__() for leaf in (_concrete(child) or [child])]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.to_json() if isinstance(value, Values) else value


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return Values.from_json(value)
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
