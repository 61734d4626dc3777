"""Entropy coding of bytes by the standard library: the smallest of several codes is kept, with its name."""

import lzma
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from tinier.errors import InputError

RAW = -15  # zlib: no header and no checksum, the whole file has one; a window of 32 kB
DICTIONARY = 1 << 22  # bytes that lzma looks back, which is also the memory that unpacking takes

# lc = 0: a byte's probabilities do not depend on the byte before, of which those of weights know nothing.
_LZMA: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "lzma": {"id": lzma.FILTER_LZMA1, "preset": 9, "lc": 0, "lp": 0, "pb": 0},
        "lzma text": {"id": lzma.FILTER_LZMA1, "preset": 9},
    }
)
_ZLIB = MappingProxyType({"huffman": zlib.Z_HUFFMAN_ONLY, "deflate": zlib.Z_DEFAULT_STRATEGY})
CODES = ("stored", *_ZLIB, *_LZMA)


def encode(data: bytes) -> tuple[str, bytes]:
    """The smallest code of some bytes.

    Args:
        data: of any length.

    Returns:
        (name of the code, of ``CODES``, the coded bytes); never more bytes than there were. Of equally small ones the first of
        ``CODES``.

    Cost:
        About 1 s for each MB that can be made smaller, 0.1 s for others; four times the bytes.

    Source:
        Huffman 1952; Han et al. 2016, "Deep Compression", section 4; RFC 1951 (deflate); Martin 1979, range encoding, which lzma uses.

    Differs:
        Han et al. have Huffman codes alone. The range coder of lzma may spend less than one bit on a symbol.
    """
    best = ("stored", data)
    for name in CODES[1:]:
        # What neither Huffman codes nor repetitions make smaller, lzma does not either.
        if name in _LZMA and best[0] == "stored" and len(data) > 4096:
            break
        coded = code(data, name)
        if len(coded) < len(best[1]):
            best = name, coded
    return best


def code(data: bytes, name: str) -> bytes:
    """The bytes in one code, of ``CODES``, whether it is smaller or not."""
    if name == "stored":
        return data
    if name in _ZLIB:
        coder = zlib.compressobj(9, zlib.DEFLATED, RAW, 9, _ZLIB[name])
        return coder.compress(data) + coder.flush()
    return lzma.compress(data, lzma.FORMAT_RAW, filters=[_filter(name)])


def decode(name: str, data: bytes, size: int) -> bytes:
    """The bytes that ``encode`` was given.

    Args:
        name: of the code.
        data: the coded bytes, from anybody.
        size: how many bytes there were.

    Raises:
        InputError: an unknown code, damage, or another number of bytes; found before more than ``size`` + 1 bytes are made.

    Cost:
        O(size); the result, and 4 MB for lzma.
    """
    if name not in CODES:
        raise InputError(f"code {name!r}; {', '.join(CODES)} are known")
    if name == "stored":
        found, whole = data, True
    else:
        try:
            found, whole = _decoded(name, data, size)
        except (zlib.error, lzma.LZMAError, EOFError) as error:
            raise InputError(f"{name}: {error}") from error
    if not whole or len(found) != size:
        raise InputError(f"{name}: the code does not end after {size} bytes")
    return found


def entropy(symbols: np.ndarray) -> float:
    """−Σ p log₂ p in bits for each symbol, of their frequencies p: what no code of single symbols falls below.

    Args:
        symbols: uint8, any shape.
    """
    counts = np.bincount(symbols.reshape(-1), minlength=1)
    p = counts[counts > 0] / max(symbols.size, 1)
    return float(-(p * np.log2(p)).sum()) + 0.0


def _decoded(name: str, data: bytes, size: int) -> tuple[bytes, bool]:
    """At most size + 1 bytes, and whether the code ends where the data does."""
    if name in _ZLIB:
        inflate = zlib.decompressobj(RAW)
        found = inflate.decompress(data, size + 1)
        if not inflate.eof and len(found) <= size:  # the end of the code may be still to come
            found += inflate.decompress(inflate.unconsumed_tail, 1)
        return found, inflate.eof and not inflate.unused_data
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[_filter(name)])
    found = b""
    while len(found) <= size and not decoder.eof:
        part = decoder.decompress(data, size + 1 - len(found))
        if not part and (decoder.needs_input or not data):
            break
        found, data = found + part, b""
    return found, decoder.eof and not decoder.unused_data


def _filter(name: str) -> dict[str, Any]:
    return {**_LZMA[name], "dict_size": DICTIONARY}
