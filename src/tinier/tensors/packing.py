"""Integers of 1 to 8 bits without gaps between them: bit i of the stream is bit i mod 8 of byte ⌊i / 8⌋, lowest first."""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from tinier.errors import InputError

_CHUNK = (
    1 << 20
)  # integers that are spread to one byte a bit at once; a multiple of 8, so that chunks end with whole bytes


def pack(integers: Tensor, bits: int) -> bytes:
    """The lowest bits of integers, one behind the other in row-major order.

    Args:
        integers: uint8, any shape, each below 2^bits.
        bits: 1 to 8.

    Returns:
        ⌈entries · bits / 8⌉ bytes; the bits that fill the last one are 0.

    Raises:
        InputError: the type or the bits are others, or an integer is too large; the message names it.

    Cost:
        O(entries · bits); 8 MB beside the result.
    """
    _check_bits(bits)
    if integers.dtype != torch.uint8:
        raise InputError(f"integers to pack are {integers.dtype}; uint8 is needed")
    flat = integers.detach().cpu().flatten().numpy()
    if len(flat) and int(flat.max()) >> bits:
        raise InputError(f"{int(flat.max())} does not fit {bits} bits")
    if bits == 8:
        return flat.tobytes()
    parts = []
    for start in range(0, len(flat), _CHUNK):
        spread = np.unpackbits(flat[start : start + _CHUNK, None], axis=1, bitorder="little")
        parts.append(np.packbits(spread[:, :bits], bitorder="little").tobytes())
    return b"".join(parts)


def unpack(data: bytes, bits: int, shape: Sequence[int]) -> Tensor:
    """The integers that ``pack`` wrote.

    Args:
        data: ⌈entries · bits / 8⌉ bytes.
        bits: 1 to 8.
        shape: of the integers.

    Returns:
        uint8, of that shape.

    Raises:
        InputError: the bits are others, there are more or fewer bytes, or bits beyond the last integer are set.

    Cost:
        O(entries · bits); 16 MB beside the result.
    """
    _check_bits(bits)
    count = prod(shape)
    needed = packed_size(count, bits)
    if len(data) != needed:
        raise InputError(
            f"{count} integers of {bits} bits take {needed} bytes; there are {len(data)}"
        )
    stream = np.frombuffer(data, np.uint8)
    if count * bits % 8 and int(stream[-1]) >> (count * bits % 8):
        raise InputError(f"bits are set behind the last of {count} integers of {bits} bits")
    flat = np.empty(count, np.uint8)
    step = _CHUNK * bits // 8  # bytes of a chunk
    for number, start in enumerate(range(0, needed, step)):
        part = flat[number * _CHUNK : (number + 1) * _CHUNK]
        spread = np.unpackbits(
            stream[start : start + step], count=len(part) * bits, bitorder="little"
        )
        part[:] = np.packbits(spread.reshape(-1, bits), axis=1, bitorder="little")[:, 0]
    return torch.from_numpy(flat).reshape(tuple(shape))


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many integers of so many bits: ⌈count · bits / 8⌉."""
    return -(-count * bits // 8)


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not 1 <= bits <= 8:
        raise InputError(f"{bits} bits: 1 to 8 are possible")
