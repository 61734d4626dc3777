"""One array in the fewest bytes that give back the same bits: a codebook, integers of few bits, byte planes, or few that are not alike.

An array is seen as words: its bit patterns as unsigned integers, so that −0, NaN and every type come back as they were. Its code is a row
of plain values, which says how it was coded, and bytes:

- ``planes``: byte i of all words, for each i. Exponents are alike and lie together; mantissas are noise and are stored.
- ``codebook``: at most 256 different words, and for each word its number in the book.
- ``integers``: an integer type whose values lie less than 256 apart: what lies above the lowest, in as many bits as that takes.
- ``sparse``: a bit for each word says whether it is the most frequent one, as 0 after pruning; the others in one of the forms above.

Numbers in a book lie in a byte each, or packed without gaps (`tinier.tensors.packing`), whichever Huffman codes make smaller.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tinier.errors import InputError
from tinier.tensors import entropy_code, packing

FORMS = ("planes", "codebook", "integers", "sparse")
WORDS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
MOST_DIFFERENT = 256
_SAMPLE = 1 << 16  # words that are looked at first, to see whether there are few different ones
_FREQUENT = 0.25  # share of the most frequent word from which a bit for each word may pay

Array = np.ndarray[Any, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Coded:
    """An array's code.

    Attributes:
        row: form and numbers that ``decode`` needs, JSON-able.
        data: the bytes.
    """

    row: Row
    data: bytes


def encode(raw: Array, width: int, signed: bool | None) -> Coded:
    """The smallest of the forms, judged by Huffman codes; its bytes then get the smallest code of `entropy_code.encode`.

    Args:
        raw: (n · width,) uint8, the bytes of n words, little-endian.
        width: bytes of a word, 1 or more.
        signed: of integers; None for what is none.

    Returns:
        The code; `decode` gives ``raw`` back, bit by bit.

    Cost:
        That of `entropy_code.encode`, and up to two sorts of the words; about six times the bytes.
    """
    parts = _smallest(raw, width, signed, sparse=True)
    return _finished(*parts)


def decode(row: Any, data: bytes, width: int, count: int) -> Array:
    """The bytes that were encoded.

    Args:
        row: from `Coded.row`, perhaps from anybody.
        data: from `Coded.data`, perhaps from anybody.
        width: bytes of a word.
        count: number of words.

    Returns:
        (count · width,) uint8.

    Raises:
        InputError: row or bytes do not fit each other, ``width`` or ``count``; found before more memory is taken than a few times
            count · width bytes.

    Cost:
        O(count · width).
    """
    streams = _streams(row, data)
    found = _decoded(row, streams, width, count)
    if next(streams, None) is not None:
        raise InputError("code of an array: more streams than its form has")
    return found


# What a form is made of before entropy coding: its row, and its streams of bytes.
_Parts = tuple[Row, list[bytes]]


def _finished(row: Row, streams: list[bytes]) -> Coded:
    coded = [entropy_code.encode(stream) for stream in streams]
    listed = [[code, len(data)] for code, data in coded]
    return Coded({**row, "streams": listed}, b"".join(data for _, data in coded))


def _size(parts: _Parts) -> int:
    """About how many bytes a form takes: its streams by Huffman codes, or as they are."""
    row, streams = parts
    return len(str(row)) // 3 + sum(map(_huffman, streams))


def _huffman(stream: bytes) -> int:
    return min(len(stream), len(entropy_code.code(stream, "huffman")))


def _smallest(raw: Array, width: int, signed: bool | None, sparse: bool) -> _Parts:
    found = [_planes(raw, width)]
    if width in WORDS and len(raw):
        words = raw.view(WORDS[width])
        if signed is not None:
            narrow = [*_integers(words, signed)]
            # Of one byte, planes are the same symbols, in more bits.
            found = narrow if narrow and width == 1 else found + narrow
        found += _codebook(words)
        if sparse:
            found += _sparse(words, signed)
    return min(found, key=_size)  # of equals the first


def _planes(raw: Array, width: int) -> _Parts:
    planes = raw.reshape(-1, width).T
    return {"form": "planes"}, [plane.tobytes() for plane in planes]


def _integers(words: Array, signed: bool) -> Iterator[_Parts]:
    values = words.view(words.dtype.name.removeprefix("u")) if signed else words
    low, high = int(values.min()), int(values.max())
    if high - low < MOST_DIFFERENT:
        base = words.dtype.type(low % (1 << 8 * words.itemsize))
        row, streams = _labels((words - base).astype(np.uint8), (high - low).bit_length())
        yield {"form": "integers", "low": int(base), **row}, streams


def _codebook(words: Array) -> Iterator[_Parts]:
    if len(np.unique(words[:_SAMPLE])) > MOST_DIFFERENT:
        return
    book, labels = np.unique(words, return_inverse=True)
    if len(book) <= MOST_DIFFERENT:
        bits = (len(book) - 1).bit_length()
        row, streams = _labels(labels.reshape(-1).astype(np.uint8), bits)
        _, kept = _planes(book.view(np.uint8), words.itemsize)
        yield {"form": "codebook", "book": len(book), **row}, [b"".join(kept), *streams]


def _sparse(words: Array, signed: bool | None) -> Iterator[_Parts]:
    known, counts = np.unique(words[:_SAMPLE], return_counts=True)
    frequent = known[counts.argmax()]
    others = words != frequent
    rest = words[others]
    if not len(rest) or 1 - len(rest) / len(words) < _FREQUENT:
        return
    row, streams = _smallest(rest.view(np.uint8), words.itemsize, signed, sparse=False)
    mask = packing.pack(torch.from_numpy(others.view(np.uint8)), 1)
    yield {"form": "sparse", "value": int(frequent), "others": len(rest), "rest": row}, [mask, *streams]  # fmt: skip


def _labels(labels: Array, bits: int) -> _Parts:
    """Numbers of so many bits: none for 0 bits."""
    if not bits:
        return {"bits": 0}, []
    each, packed = labels.tobytes(), packing.pack(torch.from_numpy(labels), bits)
    dense = _huffman(packed) < _huffman(each)
    return {"bits": bits, "packed": dense}, [packed if dense else each]


def _streams(row: Any, data: bytes) -> Iterator[tuple[str, bytes]]:
    """(code, bytes) of each stream, once it is known that they are all the bytes."""
    listed = row.get("streams") if isinstance(row, dict) else None
    if not isinstance(listed, list) or not all(
        isinstance(part, list) and len(part) == 2 and isinstance(part[0], str) for part in listed
    ):
        raise InputError("code of an array: its streams are not listed")
    ends = [0]
    for _, length in listed:
        ends.append(ends[-1] + whole("bytes of a stream", length, 0, len(data)))
    if ends[-1] != len(data):
        raise InputError(f"code of an array: {ends[-1]} bytes are listed, there are {len(data)}")
    return ((code, data[a:b]) for (code, _), a, b in zip(listed, ends, ends[1:], strict=False))


def _next(streams: Iterator[tuple[str, bytes]], size: int) -> bytes:
    found = next(streams, None)
    if found is None:
        raise InputError("code of an array: a stream is missing")
    return entropy_code.decode(*found, size)


def _decoded(row: Any, streams: Iterator[tuple[str, bytes]], width: int, count: int) -> Array:
    form = row.get("form") if isinstance(row, dict) else None
    if form == "planes":
        planes = np.empty((count, width), np.uint8)
        for place in range(width):
            planes[:, place] = np.frombuffer(_next(streams, count), np.uint8)
        return planes.reshape(-1)
    if form not in FORMS or width not in WORDS or not count:
        raise InputError(f"code of an array: form {form!r} of {count} words of {width} bytes")
    kind, most = WORDS[width], (1 << 8 * width) - 1
    if form == "integers":
        low = kind(whole("low", row.get("low"), 0, most))
        return (low + _read_labels(row, streams, count).astype(kind)).view(np.uint8)
    if form == "codebook":
        size = whole("book", row.get("book"), 1, MOST_DIFFERENT)
        planes = np.frombuffer(_next(streams, size * width), np.uint8).reshape(width, size)
        book = np.ascontiguousarray(planes.T).reshape(-1).view(kind)
        labels = _read_labels(row, streams, count)
        if int(labels.max()) >= size:
            raise InputError(f"code of an array: number {int(labels.max())} in a book of {size}")
        return book[labels].view(np.uint8)
    others = whole("others", row.get("others"), 1, count)
    if isinstance(row.get("rest"), dict) and row["rest"].get("form") == "sparse":
        raise InputError("code of an array: a sparse form inside another")
    mask = packing.unpack(_next(streams, packing.packed_size(count, 1)), 1, (count,))
    chosen = mask.numpy().astype(bool)
    if int(chosen.sum()) != others:
        raise InputError(
            f"code of an array: {others} words are listed, {int(chosen.sum())} are marked"
        )
    words = np.full(count, whole("value", row.get("value"), 0, most), kind)
    words[chosen] = _decoded(row["rest"], streams, width, others).view(kind)
    return words.view(np.uint8)


def _read_labels(row: Row, streams: Iterator[tuple[str, bytes]], count: int) -> Array:
    bits = whole("bits", row.get("bits"), 0, 8)
    if not bits:
        return np.zeros(count, np.uint8)
    if row.get("packed") is True:
        data = _next(streams, packing.packed_size(count, bits))
        return packing.unpack(data, bits, (count,)).numpy()
    return np.frombuffer(_next(streams, count), np.uint8)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """An integer from a file, once it is known to be one between two bounds.

    Args:
        name: what the error calls it.
        value: anything.
        low, high: the bounds, both possible.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        shown = repr(value)[:40]
        raise InputError(f"{name} is {shown}; an integer from {low} to {high} is needed")
    return value
