"""ONNX operators on numbers that are sizes of the graph, which the importer's own functions would fix."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def reshape(value: Tensor, shape: Sequence[int], allow_zero: int) -> Tensor:
    """ONNX Reshape: 0 keeps a size unless ``allow_zero``, −1 is what is left."""
    sizes = [
        value.shape[i] if isinstance(s, int) and s == 0 and not allow_zero else s
        for i, s in enumerate(shape)
    ]
    return value.reshape(sizes)


def cut(
    value: Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Tensor:
    """ONNX Slice; negative steps are only those that reverse a whole axis, or have constant ends."""
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step > 0:
            value = torch.ops.aten.slice.Tensor(value, axis, start, end, step)
            continue
        size = value.shape[axis]
        kept = range(int(size))[slice(start, None if end < -size else end, step)]
        value = value.index_select(axis, torch.tensor(list(kept), dtype=torch.int64))
    return value


def count(start: float, limit: float, step: float) -> Tensor:
    """ONNX Range of numbers that are not data."""
    floats = any(isinstance(value, float) for value in (start, limit, step))
    return torch.arange(start, limit, step, dtype=torch.float32 if floats else torch.int64)


def pad(value: Tensor, pads: Sequence[int], mode: str, fill: float | Tensor) -> Tensor:
    """ONNX Pad: beginnings of all axes, then ends."""
    half = len(pads) // 2
    # torch: the last axis first, its beginning and end side by side; leading axes that are not padded are left out.
    flat = [side for axis in range(half - 1, -1, -1) for side in (pads[axis], pads[axis + half])]
    while len(flat) > 2 and all(isinstance(side, int) and side == 0 for side in flat[-2:]):
        flat = flat[:-2]
    if mode == "constant":
        return F.pad(value, flat, value=float(fill))
    return F.pad(value, flat, mode={"edge": "replicate", "wrap": "circular"}.get(mode, mode))


def average_pool(value: Tensor) -> Tensor:
    """ONNX GlobalAveragePool; of three dimensions it may also be the mean of a norm over features."""
    if value.ndim == 3:
        return value.mean(dim=2, keepdim=True)
    pools = {4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}
    return pools[value.ndim](value, 1)  # type: ignore[no-any-return]


def max_pool(value: Tensor) -> Tensor:
    """ONNX GlobalMaxPool."""
    return value.amax(dim=tuple(range(2, value.ndim)), keepdim=True)


def maximum(value: Tensor, axes: Sequence[int] | None, keep: bool, nothing: bool) -> Tensor:
    """ONNX ReduceMax; without axes over all of them, or none of them if ``nothing``."""
    if not axes:
        return value if nothing else value.amax(dim=tuple(range(value.ndim)), keepdim=keep)
    return value.amax(dim=tuple(axes), keepdim=keep)


def minimum(value: Tensor, axes: Sequence[int] | None, keep: bool, nothing: bool) -> Tensor:
    """ONNX ReduceMin; see ``maximum``."""
    return -maximum(-value, axes, keep, nothing)


def tensor_of(values: Sequence[float], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of numbers, some of which are sizes of the graph."""
    return torch.stack([torch.full((), value, dtype=dtype) for value in values]).reshape(shape)


def gather_nd(data: Tensor, indices: Tensor, batch_dims: int = 0) -> Tensor:
    """ONNX GatherND: the last dimension of ``indices`` is one index into ``data``."""
    return data[_coordinates(data, indices, batch_dims)]


def scatter_nd(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """ONNX ScatterND: ``data`` with other values at some indices."""
    return data.index_put(_coordinates(data, indices, 0), updates)


def scatter_nd_add(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """ONNX ScatterND that adds."""
    return data.index_put(_coordinates(data, indices, 0), updates, accumulate=True)


def _coordinates(data: Tensor, indices: Tensor, batch_dims: int) -> tuple[Tensor, ...]:
    rank = indices.ndim - 1
    shared = [
        torch.arange(data.shape[dim]).reshape([-1 if i == dim else 1 for i in range(rank)])
        for dim in range(batch_dims)
    ]
    return (*shared, *indices.long().unbind(-1))


def of_sizes(value: Tensor, dims: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The value, of which some sizes are known."""
    for dim, size in zip(dims, sizes, strict=True):
        torch._check(value.shape[dim] == size)
    return value
