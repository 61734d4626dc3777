"""Where the tensors lie in the bytes of an ONNX file, so that the file can be taken apart and put together again byte by byte."""

import hashlib
from typing import Any

import torch
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto
from torch import Tensor

from tinier.errors import InputError
from tinier.report.packed_file import PackedFile
from tinier.sources.onnx_check import is_external, tensors_of
from tinier.tensors.array_code import whole

GRAPH = "graph"  # what is left of the file without its tensors
LEAST = 32  # bytes of a tensor that is taken out
_TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT16: torch.uint16,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
}  # others, as integers of four bits, two in a byte, are bytes


def taken_apart(data: bytes, name: str) -> tuple[list[tuple[str, Tensor]], dict[str, Any]]:
    """The tensors of an ONNX file, what is left of it, and what `put_together` needs to know.

    Whatever bytes are found are taken out where they are found: the file comes back as it was, even where they belong to something else.

    Args:
        data: the file.
        name: of the file, for errors.

    Returns:
        ((name, flat tensor) of each that the file holds as plain bytes and of the rest, ``GRAPH``; facts, JSON-able).

    Raises:
        InputError: it is no ONNX file, or its tensors are in other files.

    Cost:
        A few times the bytes.
    """
    proto = ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise InputError(f"{name}: not an ONNX file ({error})") from error
    if not proto.ir_version or not proto.graph.node:
        raise InputError(f"{name}: not an ONNX file, or one without operators")
    found: list[tuple[int, int, str, torch.dtype]] = []
    end = 0
    for tensor in tensors_of(proto):
        if is_external(tensor):
            raise InputError(
                f"{name}: its tensors are in other files; write it as one file first: "
                "onnx.save(onnx.load(path), 'whole.onnx')"
            )
        raw = tensor.raw_data or torch.tensor(tensor.float_data).numpy().tobytes()
        if len(raw) < LEAST:
            continue
        start = data.find(raw, end)
        if start < 0:  # tensors of nodes are written before those of the graph
            start = data.find(raw)
        if start >= 0:
            end = start + len(raw)
            found.append((start, end, tensor.name, _TYPES.get(tensor.data_type, torch.uint8)))
    parts: list[tuple[str, Tensor]] = []
    starts: list[int] = []
    rest, end = bytearray(), 0
    for start, stop, tensor_name, dtype in sorted(found, key=lambda one: one[:2]):
        if start < end:
            continue
        rest += data[end:start]
        part = torch.frombuffer(bytearray(data[start:stop]), dtype=torch.uint8)
        if len(part) % dtype.itemsize == 0:
            part = part.view(dtype)
        parts.append((f"{len(parts)} {tensor_name}", part))
        starts.append(start)
        end = stop
    rest += data[end:]
    parts.append((GRAPH, torch.frombuffer(rest, dtype=torch.uint8)))
    return parts, {"starts": starts, "sha256": hashlib.sha256(data).hexdigest()}


def put_together(packed: PackedFile) -> bytes:
    """The bytes of the ONNX file that was taken apart.

    Raises:
        InputError: the parts do not fit, or are not those of the file.

    Cost:
        A few times the bytes.
    """
    *parts, rest = packed.tensors or (None,)
    starts, digest = packed.facts.get("starts"), packed.facts.get("sha256")
    if rest is None or rest.name != GRAPH or not isinstance(starts, list) or len(starts) != len(parts):  # fmt: skip
        raise InputError(f"{packed.file}: its parts are not those of an ONNX file")
    loaded = packed.load()
    remaining = _raw(loaded[rest.name])
    made, used = bytearray(), 0
    for start, one in zip(starts, parts, strict=True):
        gap = whole("start", start, len(made), len(made) + len(remaining) - used) - len(made)
        made += remaining[used : used + gap] + _raw(loaded[one.name])
        used += gap
    made += remaining[used:]
    if hashlib.sha256(made).hexdigest() != digest:
        raise InputError(f"{packed.file}: its parts do not give the ONNX file that was packed")
    return bytes(made)


def _raw(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
