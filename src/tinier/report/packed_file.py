"""The packed file: tensors, or another file that is full of them, in the fewest bytes that give back the same bits.

    magic 8 | version u32 | code of the header u32 | bytes of the header u64 | coded bytes of it u64 | bytes of the blocks u64
    | SHA-256 of the rest 32 | header | blocks

The header is JSON: the blocks (type, number of words, how they are coded), and for each tensor its name, shape, block and place there.
Small tensors of one type share a block, equal tensors share a place. Nothing in it is run or is used as a path.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinier.errors import InputError
from tinier.output import whole_file
from tinier.tensors import array_code, entropy_code
from tinier.tensors.array_code import whole
from tinier.version import VERSION

MAGIC, FORMAT = b"\x89tinier\n", 1
_FRONT = struct.Struct("<8sIIQQQ32s")
_HASHED = _FRONT.size - 32  # the hash is of what is before it, too
MOST_HEADER = 1 << 26  # bytes of a header, of some hundred thousand tensors
_MOST = 1 << 48  # of any number in a header
SMALL = 4096  # bytes of tensors that share a block
# What unpacking may take where nothing else says so: files that need more are refused.
RATIO, ALWAYS = 256, 1 << 28

_NAMES = """bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64 complex64 complex128
float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"""
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES.split()}

KINDS = {
    "codebook": "shared values",
    "integers": "integers",
    "planes": "floats",
    "sparse": "sparse",
}


@dataclass(frozen=True)
class Row:
    """What the tensors of one kind take.

    Attributes:
        kind: how they are stored.
        tensors: how many.
        values: entries of all of them; 0 for what has none.
        raw: bytes in memory.
        packed: bytes in the file.
    """

    kind: str
    tensors: int
    values: int
    raw: int
    packed: int

    @property
    def bits(self) -> float:
        """Bits of the file for each value; 0 where there is none."""
        return 8 * self.packed / self.values if self.values else 0.0


@dataclass(frozen=True)
class Packed:
    """What packing took.

    Attributes:
        file: what was written.
        raw: bytes of what was packed: of all tensors, or of the packed file.
        packed: bytes of the file.
        rows: what the tensors of each kind take; the last row is the header.
    """

    file: Path
    raw: int
    packed: int
    rows: tuple[Row, ...]

    @property
    def ratio(self) -> float:
        """How many times smaller the file is."""
        return self.raw / self.packed

    @property
    def total(self) -> Row:
        """All rows together."""
        tensors, values = (sum(numbers) for numbers in zip(*((r.tensors, r.values) for r in self.rows), strict=True))  # fmt: skip
        return Row("all", tensors, values, self.raw, self.packed)

    def as_dict(self) -> dict[str, Any]:
        """The figures, JSON-able."""
        rows = [{**vars(row), "bits_per_value": row.bits} for row in (*self.rows, self.total)]
        return {"file": str(self.file), "ratio": self.ratio, "rows": rows}

    def __str__(self) -> str:
        lines = [
            f"{row.kind}: {row.raw:,} → {row.packed:,} bytes"
            + (f", {row.tensors} tensors, {row.bits:.2f} bits a value" if row.values else "")
            for row in (*self.rows, self.total)
        ]
        return "\n".join([*lines, f"{self.file}: {self.ratio:.1f} times smaller"])


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: ``start`` is its first word in its block."""

    name: str
    shape: tuple[int, ...]
    block: int
    start: int


@dataclass
class _Block:
    """Flat tensors of one type that are coded as one."""

    dtype: torch.dtype
    parts: list[Tensor] = field(default_factory=list)
    count: int = 0
    tensors: int = 0  # that lie here, equal ones each
    values: int = 0  # of all of them, tied ones once

    def add(self, flat: Tensor) -> int:
        self.parts.append(flat)
        self.count += flat.numel()
        return self.count - flat.numel()


def write(
    tensors: Iterable[tuple[str, Tensor]], facts: dict[str, Any], file: Path, rest: str = ""
) -> Packed:
    """Write a packed file.

    Args:
        tensors: (name, tensor of a type of ``DTYPES``); equal ones are stored once.
        facts: JSON-able, of what it is that was packed.
        file: to write; replaced when the new one is whole.
        rest: name of the tensor, if there is one, that holds no values but the rest of a file.

    Returns:
        What the tensors of each kind take; ``raw`` counts tied ones once.

    Raises:
        InputError: a tensor of a type that cannot be stored.
        OutputError: the file cannot be written.

    Cost:
        That of `array_code.encode`; about seven times the largest tensor beside the file.
    """
    blocks, stored = _arranged(tensors)
    listed, payload = [], []
    kinds: dict[str, list[int]] = {}
    for number, block in enumerate(blocks):
        flat = torch.cat(block.parts) if len(block.parts) > 1 else block.parts[0]
        coded = array_code.encode(_bytes(flat), block.dtype.itemsize, _signed(block.dtype))
        name = str(block.dtype).removeprefix("torch.")
        listed.append({"dtype": name, "count": block.count, "bytes": len(coded.data), **coded.row})
        payload.append(coded.data)
        kind, values = _kind(coded.row, name), block.values
        if rest and any(one.name == rest and one.block == number for one in stored):
            kind, values = rest, 0
        raw = block.values * block.dtype.itemsize
        _count(kinds, kind, block.tensors, values, raw, len(coded.data))
    rows = [[one.name, list(one.shape), one.block, one.start] for one in stored]
    header = {"facts": facts, "tinier": VERSION, "blocks": listed, "tensors": rows}
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > MOST_HEADER:
        raise InputError(f"{file}: {len(rows)} tensors are more than a packed file lists")
    code, head = entropy_code.encode(text)
    body = b"".join(payload)
    front = _front(entropy_code.CODES.index(code), len(text), head, body)
    with whole_file(file) as made:
        made.write_bytes(front + head + body)
    counted = [Row(kind, *numbers) for kind, numbers in sorted(kinds.items())]
    top = Row("header", 0, 0, 0, len(front) + len(head))
    return Packed(
        file, sum(row.raw for row in counted), len(front) + len(head) + len(body), (*counted, top)
    )


class PackedFile:
    """A packed file whose hash is right and whose header says nothing impossible; blocks are unpacked when asked for.

    Attributes:
        facts: of what it is that was packed.
        tensors: where each lies.
        size: bytes of all blocks, unpacked.
    """

    def __init__(self, file: Path, at_most: int | None = None) -> None:
        """Read and check a file; no block is unpacked.

        Args:
            file: from anybody.
            at_most: bytes that the blocks may take unpacked; None for 256 times the file and 256 MiB.

        Raises:
            InputError: it is no packed file, of a newer version, damaged, or takes more memory.
        """
        self.file = file
        try:
            data = file.read_bytes()
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
        header, self._payload = _opened(file, data)
        self._guarded(lambda: self._understand(header))
        limit = RATIO * len(data) + ALWAYS if at_most is None else at_most
        if self.size > limit:
            raise InputError(
                f"{file}: {len(data):,} bytes that say to become {self.size:,}; at most {limit:,} are allowed. "
                "If you trust the file, give at_most"
            )

    def load(self) -> dict[str, Tensor]:
        """Name → tensor, on the CPU; equal tensors, and small ones of one type, share memory.

        Raises:
            InputError: a block is not what the header says.

        Cost:
            O(bytes); the tensors, and a few times the largest block.
        """
        blocks = [
            self._guarded(partial(self._block, row, place))
            for row, place in zip(self._rows, self._places, strict=True)
        ]
        return {
            one.name: blocks[one.block][one.start : one.start + prod(one.shape)].view(one.shape)
            for one in self.tensors
        }

    def dtype(self, tensor: Stored) -> torch.dtype:
        """The type of a tensor, without unpacking it."""
        return DTYPES[self._rows[tensor.block]["dtype"]]

    def _understand(self, header: Any) -> None:
        self.facts: dict[str, Any] = _a(dict, "facts", _a(dict, "header", header).get("facts"))
        self._rows: list[Any] = _a(list, "blocks", header.get("blocks"))
        self._places: list[int] = [0]
        self.size = 0
        for row in self._rows:
            dtype = DTYPES.get(str(_a(dict, "block", row).get("dtype")))
            if dtype is None:
                raise InputError(f"a block of type {str(row.get('dtype'))[:40]!r}")
            self.size += whole("count", row.get("count"), 0, _MOST) * dtype.itemsize
            length = whole("bytes", row.get("bytes"), 0, len(self._payload))
            self._places.append(self._places[-1] + length)
        if self._places.pop() != len(self._payload):
            raise InputError("the blocks do not fill the file")
        self.tensors: list[Stored] = []
        for row in _a(list, "tensors", header.get("tensors")):
            if len(_a(list, "tensor", row)) != 4:
                raise InputError("a tensor needs a name, a shape, a block and a place")
            name, shape, block, start = row
            sizes = tuple(whole("size", n, 0, _MOST) for n in _a(list, "shape", shape))
            place = whole("block", block, 0, len(self._rows) - 1)
            room = self._rows[place]["count"] - whole("start", start, 0, _MOST)
            if prod(sizes) > room or prod(n or 1 for n in sizes) > _MOST or len(sizes) > 64:
                raise InputError(f"a tensor of shape {sizes} is larger than its block")
            self.tensors.append(Stored(_a(str, "name", name), sizes, place, start))
        if len({one.name for one in self.tensors}) != len(self.tensors):
            raise InputError("two tensors have one name")

    def _block(self, row: dict[str, Any], place: int) -> Tensor:
        dtype = DTYPES[row["dtype"]]
        data = self._payload[place : place + row["bytes"]]
        found = array_code.decode(row, data, dtype.itemsize, row["count"])
        if dtype == torch.bool and bool((found > 1).any()):
            raise InputError("truth values that are neither 0 nor 1")
        return torch.from_numpy(found).view(dtype) if len(found) else torch.empty(0, dtype=dtype)

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except InputError as error:
            raise InputError(f"{self.file}: not a sound packed file: {error}") from error


def _arranged(tensors: Iterable[tuple[str, Tensor]]) -> tuple[list[_Block], list[Stored]]:
    """Large tensors in blocks of their own, small ones of a type in one, equal ones at one place."""
    blocks: list[_Block] = []
    pools: dict[torch.dtype, int] = {}
    known: dict[tuple[torch.dtype, bytes], tuple[int, int]] = {}
    tied: set[tuple[Any, ...]] = set()
    stored = []
    for name, tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_quantized or str(tensor.dtype)[6:] not in DTYPES:  # fmt: skip
            raise InputError(
                f"{name}: tensors of {tensor.dtype}, {tensor.layout} cannot be packed; {', '.join(DTYPES)} can"
            )
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        key = flat.dtype, _hash(_bytes(flat).data)
        if key not in known:
            number = pools.get(flat.dtype, len(blocks)) if _is_small(flat) else len(blocks)
            if number == len(blocks):
                blocks.append(_Block(flat.dtype))
                if _is_small(flat):
                    pools[flat.dtype] = number
            known[key] = number, blocks[number].add(flat)
        block = blocks[known[key][0]]
        block.tensors += 1
        place = tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()
        if place not in tied:
            block.values += flat.numel()
        tied.add(place)
        stored.append(Stored(name, tuple(tensor.shape), *known[key]))
    return blocks, stored


def _is_small(flat: Tensor) -> bool:
    """Whether a tensor takes less in a block with others: small, and not of a few different values."""
    if flat.numel() * flat.dtype.itemsize >= SMALL:
        return False
    words = _bytes(flat).reshape(-1, flat.dtype.itemsize)
    return flat.numel() < 64 or 4 * len(np.unique(words, axis=0)) > flat.numel()


def _bytes(flat: Tensor) -> np.ndarray[Any, Any]:
    """(n · width,) uint8: the memory of a flat tensor."""
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)


def _signed(dtype: torch.dtype) -> bool | None:
    return None if dtype.is_floating_point or dtype.is_complex else dtype.is_signed


def _kind(row: dict[str, Any], dtype: str) -> str:
    if row["form"] == "sparse":
        return f"sparse {_kind(row['rest'], dtype)}"
    if row["form"] == "planes":
        return dtype
    bits = f"{row['bits']} bits" if row["bits"] else "all alike"
    return f"{dtype} as {KINDS[row['form']]}, {bits}"


def _count(kinds: dict[str, list[int]], kind: str, *numbers: int) -> None:
    before = kinds.get(kind, [0] * len(numbers))
    kinds[kind] = [a + b for a, b in zip(before, numbers, strict=True)]


def _front(code: int, length: int, head: bytes, body: bytes) -> bytes:
    front = _FRONT.pack(MAGIC, FORMAT, code, length, len(head), len(body), bytes(32))[:_HASHED]
    return front + _hash(front, head, body)


def _hash(*parts: bytes | memoryview) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.digest()


def _opened(file: Path, data: bytes) -> tuple[Any, bytes]:
    """Header and payload of a file whose hash is right."""
    if len(data) < _FRONT.size or not data.startswith(MAGIC):
        raise InputError(f"{file}: not a file that tinier packed")
    _, version, code, length, head, body, digest = _FRONT.unpack_from(data)
    if version != FORMAT:
        raise InputError(f"{file}: packed in format {version}; this tinier reads format {FORMAT}")
    if len(data) != _FRONT.size + head + body:
        raise InputError(
            f"{file}: {len(data):,} bytes, {_FRONT.size + head + body:,} were written; fetch it again"
        )
    if _hash(data[:_HASHED], data[_FRONT.size :]) != digest:
        raise InputError(f"{file}: damaged, its SHA-256 is another; fetch it again")
    if length > MOST_HEADER or code >= len(entropy_code.CODES):
        raise InputError(f"{file}: a header of {length:,} bytes; at most {MOST_HEADER:,} are read")
    coded = data[_FRONT.size : _FRONT.size + head]
    try:
        text = entropy_code.decode(entropy_code.CODES[code], coded, length)
        return json.loads(text), data[_FRONT.size + head :]
    except (ValueError, RecursionError) as error:  # InputError is one, as are those of JSON
        raise InputError(f"{file}: its header cannot be read: {error}") from error


def _a(kind: type, name: str, value: Any) -> Any:
    if not isinstance(value, kind):
        raise InputError(
            f"{name} of a packed file: a {type(value).__name__}, a {kind.__name__} is needed"
        )
    return value
