"""Masks of weights: which entries of a tensor stay. Pure maths; a mask is bool, True where the weight stays.

Scores are of any shape and finite; a higher score stays longer. Of equal scores the one that comes first in row-major order stays, so
that the same scores give the same mask everywhere.
"""

import base64
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor


def largest(scores: Tensor, count: int) -> Tensor:
    """The mask of the ``count`` largest scores, whatever their place.

    Args:
        scores: any shape.
        count: how many stay, in [0, entries].

    Returns:
        bool, like ``scores``.

    Cost:
        One sort of all entries.
    """
    flat = scores.flatten()
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    mask[flat.argsort(descending=True, stable=True)[:count]] = True
    return mask.view(scores.shape)


def largest_of_all(scores: Sequence[Tensor], count: int, least: Sequence[int]) -> list[Tensor]:
    """The ``count`` largest scores of several tensors together; each tensor keeps at least so many of its own.

    Args:
        scores: tensors of any shapes.
        count: how many entries stay in all.
        least: for each tensor, how many of its largest stay in any case.

    Returns:
        A mask for each tensor. More than ``count`` entries stay only where ``least`` asks for it.
    """
    sure = [largest(score, number) for score, number in zip(scores, least, strict=True)]
    flat = torch.cat([score.flatten().double() for score in scores])
    flat[torch.cat([mask.flatten() for mask in sure])] = torch.inf
    mask = largest(flat, max(count, sum(least)))
    parts = mask.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def largest_of_rows(scores: Tensor, keep: float) -> Tensor:
    """The same number of entries in each row: those with the largest scores of the row.

    Args:
        scores: (rows, …).
        keep: share of a row that stays, in [0, 1]; the number is rounded to the nearest, halves to even.

    Returns:
        bool, like ``scores``.

    Source:
        Sun et al. 2023, "A simple and effective pruning approach for large language models" (Wanda), section 3: within an output.
    """
    rows = scores.flatten(1) if scores.ndim > 1 else scores[:, None]
    return _of_last(rows, round(keep * rows.shape[1])).view(scores.shape)


def n_of_m(scores: Tensor, n: int, m: int, dim: int = 1) -> Tensor:
    """In each ``m`` neighbours along a dimension, the ``n`` with the largest scores.

    Args:
        scores: any shape; m divides its size along ``dim``.
        n: how many of each m stay, in [1, m].
        m: size of the neighbourhoods.
        dim: along which neighbours are taken: the input dimension of a weight.

    Returns:
        bool, like ``scores``.

    Source:
        Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", section 3 (2:4).
    """
    last = scores.movedim(dim, -1)
    mask = _of_last(last.reshape(*last.shape[:-1], last.shape[-1] // m, m), n)
    return mask.reshape(last.shape).movedim(-1, dim).contiguous()


def blocks(scores: Tensor, rows: int, columns: int) -> Tensor:
    """Mean score of each block of a matrix.

    Args:
        scores: (height, width, …), the rest counted to the width: a convolution's kernel belongs to its input. The last block of a
            dimension is smaller where ``rows`` or ``columns`` do not divide it.
        rows: height of a block.
        columns: width of a block.

    Returns:
        (⌈height / rows⌉, ⌈width / columns⌉) float64.
    """
    matrix = scores.double().flatten(1)
    over = (-matrix.shape[0] % rows, -matrix.shape[1] % columns)
    padded = torch.nn.functional.pad(matrix, (0, over[1], 0, over[0]))
    ones = torch.nn.functional.pad(torch.ones_like(matrix), (0, over[1], 0, over[0]))
    shape = (padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    return padded.view(shape).sum((1, 3)) / ones.view(shape).sum((1, 3))


def of_blocks(mask: Tensor, rows: int, columns: int, shape: Sequence[int]) -> Tensor:
    """The mask of a weight whose blocks stay or leave whole.

    Args:
        mask: of the blocks, as `blocks` shapes them.
        rows: height of a block.
        columns: width of a block.
        shape: of the weight.

    Returns:
        bool, of that shape.
    """
    whole = mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return whole[: shape[0], : prod(shape[1:])].reshape(tuple(shape))


def pack(mask: Tensor) -> str:
    """The bits of a mask in row-major order, eight a byte with the first lowest, as base64 text."""
    bits = mask.detach().cpu().flatten().numpy()
    return base64.b64encode(np.packbits(bits, bitorder="little").tobytes()).decode("ascii")


def unpack(bits: str, shape: Sequence[int]) -> Tensor:
    """The mask that ``pack`` wrote.

    Args:
        bits: base64 text.
        shape: of the mask.

    Returns:
        bool, of that shape.

    Raises:
        ValueError: the text is not base64, or has another number of bits.
    """
    data = np.frombuffer(base64.b64decode(bits, validate=True), dtype=np.uint8)
    count = prod(shape)
    if len(data) != -(-count // 8):
        raise ValueError(f"a mask of shape {tuple(shape)} has {count} bits, not {8 * len(data)}")
    found = np.unpackbits(data, count=count, bitorder="little").astype(bool)
    return torch.from_numpy(found).reshape(tuple(shape))


def _of_last(scores: Tensor, count: int) -> Tensor:
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(
        -1, order, True
    )
