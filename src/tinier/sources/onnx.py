"""An ONNX file, as a module whose weights are parameters again."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto
from torch import Tensor, fx

from tinier.errors import MissingError, ModelError
from tinier.graph.states import quiet
from tinier.network import Inputs, Network
from tinier.sources.base import Source, first_line, present
from tinier.sources.onnx_check import checked
from tinier.sources.onnx_compare import compare, culprit
from tinier.sources.onnx_graph import rewrite

DTYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.INT16: torch.int16,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}
# Of an input of token ids whose length the file leaves free.
TOKENS = 16


class OnnxSource(Source):
    """An ``.onnx`` file.

    It is imported with onnx2fx; weights are parameters, sums over shapes become sizes of the graph, and products with a
    constant matrix become linear layers. The result is compared with ONNX Runtime, if that is installed.
    """

    name = "onnx"

    def accepts(self, model: Any) -> bool:
        return isinstance(model, str | Path) and Path(model).suffix.lower() == ".onnx"

    def load(self, model: Any, example: Inputs | None) -> Network:
        path = Path(model)
        present(path)
        try:
            import onnx2fx
            from onnx2fx.utils.names import sanitize_name
        except ImportError as error:
            raise MissingError("onnx2fx", "onnx", f"reading {path.name}") from error
        proto, names = checked(path)
        inputs, free = _inputs(path, proto, names, example)
        own = {sanitize_name(tensor.name): tensor.name for tensor in proto.graph.initializer}
        try:
            with quiet():
                imported = onnx2fx.convert(proto, base_dir=str(path.parent))
        except Exception as error:
            raise ModelError(f"{path}: cannot be imported: {first_line(error)}") from error
        reason = ""
        for sizes in _attempts(inputs, free):
            # A batch that is declared free but is not: 1.
            fixed = any(dim == 0 for _, dim in free.keys() - sizes.keys())
            batch = {
                name: value[:1] if fixed and (name, 0) in free else value
                for name, value in inputs.items()
            }
            try:
                network = _network(path, imported, batch, sizes, own)
                kept = _kept(network, sizes)
                if any(dim == 0 and (name, dim) not in kept for name, dim in sizes):
                    failure = ModelError(f"{path}: an operator needs a fixed batch size")
                    reason = reason or str(failure)
                    continue
                compare(path, network, names, kept)
            except ModelError as error:
                failure = error
                reason = reason or str(error)
                continue
            return replace(network, notes=_notes(path, network, free, kept, reason))
        raise failure


def _attempts(
    inputs: Mapping[str, Tensor], free: Mapping[tuple[str, int], str]
) -> list[dict[tuple[str, int], str]]:
    """What to try to keep free, the most first: all, all with one length, the batch, the lengths, nothing."""
    batch = {key: symbol for key, symbol in free.items() if key[1] == 0}
    lengths = {key: symbol for key, symbol in free.items() if key[1] != 0}
    attempts = [dict(free)]
    if len({inputs[name].shape[dim] for name, dim in lengths}) == 1:
        attempts.append({**batch, **dict.fromkeys(lengths, "length")})
    attempts += [batch, lengths, {}]
    # The same sizes under one name are the same attempt.
    different: list[dict[tuple[str, int], str]] = []
    for attempt in attempts:
        groups = {frozenset(k for k, s in attempt.items() if s == n) for n in attempt.values()}
        if all(
            groups != {frozenset(k for k, s in a.items() if s == n) for n in a.values()}
            for a in different
        ):
            different.append(attempt)
    return different


def _network(
    path: Path,
    imported: fx.GraphModule,
    inputs: Mapping[str, Tensor],
    free: Mapping[tuple[str, int], str],
    own: Mapping[str, str],
) -> Network:
    """The imported network, traced."""
    try:
        with quiet(), torch.no_grad():
            module = rewrite(imported, inputs, free, own)
    except Exception as error:
        raise ModelError(
            f"{path}: the imported network does not run on the example{culprit(imported, inputs)}: "
            f"{first_line(error)}; give example=… as the model gets it, or export it without that operator"
        ) from error
    network = Network(module, inputs, path.stem)
    try:
        _ = network.traced
    except ModelError as error:
        raise ModelError(
            f"{path}{culprit(module, inputs, str(error.__cause__))}: {error}"
        ) from error
    return network


def _kept(network: Network, free: Mapping[tuple[str, int], str]) -> dict[tuple[str, int], str]:
    """Of the free sizes those that are free in the traced network."""
    kept = {}
    for node in network.traced.module.graph.find_nodes(op="placeholder"):
        for dim, size in enumerate(node.meta["val"].shape):
            is_open = not isinstance(size, int) and size.node.maybe_as_int() is None
            if is_open and (str(node.target), dim) in free:
                kept[str(node.target), dim] = free[str(node.target), dim]
    return kept


def _notes(
    path: Path,
    network: Network,
    free: Mapping[tuple[str, int], str],
    kept: Mapping[tuple[str, int], str],
    reason: str,
) -> tuple[str, ...]:
    """What the file declares free but is fixed, and why."""
    lost = [key for key in free if key not in kept]
    why = f": {reason.removeprefix(f'{path}: ')}" if reason else ": an operator needs this size"
    notes = []
    if any(dim == 0 for _, dim in lost):
        size = len(next(iter(network.example.values())))
        notes.append(
            f"{path.name}: the batch size is fixed at {size}, the file leaves it free{why}"
        )
    for name, dim in lost:
        if dim:
            size = network.example[name].shape[dim]
            notes.append(
                f"{path.name}: dimension {dim} of input {name} is fixed at {size}, the file leaves it free{why}; "
                f"give example=… of the length that you use"
            )
    return tuple(notes)


def _inputs(
    path: Path, proto: onnx.ModelProto, names: Mapping[str, str], example: Inputs | None
) -> tuple[dict[str, Tensor], dict[tuple[str, int], str]]:
    """Example inputs, and of the sizes that stay free the symbol: (input, dimension) → symbol."""
    given = _given(path, example, names)
    back = {plain: own for own, plain in names.items()}
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {}
    free: dict[tuple[str, int], str] = {}
    for value in proto.graph.input:
        plain = value.name
        if plain not in back:
            continue
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or kind.elem_type not in DTYPES:
            name = TensorProto.DataType.Name(kind.elem_type) if kind.elem_type else "no tensor"
            raise ModelError(
                f"{path}: input {back[plain]} is {name}; tensors of numbers are needed"
            )
        dtype = DTYPES[kind.elem_type]
        if plain not in given and not kind.HasField("shape"):
            raise ModelError(
                f"{path}: input {back[plain]} has no declared shape; give example={{{plain!r}: tensor}}"
            )
        declared = [
            dim.dim_value
            if dim.HasField("dim_value") and dim.dim_value > 0
            else dim.dim_param or "?"
            for dim in kind.shape.dim
        ]
        shape = []
        for number, size in enumerate(declared):
            open_size = isinstance(size, str)
            # Dimension 0 is the batch of every input, whatever each calls it; of token ids the length is free too.
            if open_size and (number == 0 or not dtype.is_floating_point):
                symbol = (
                    "batch" if number == 0 else f"{plain}.{number}" if size == "?" else str(size)
                )
                free[plain, number] = symbol
                shape.append(2 if number == 0 else TOKENS)
            elif isinstance(size, int):
                shape.append(size)
            elif plain in given:
                shape.append(given[plain].shape[number] if number < given[plain].ndim else 1)
            else:
                raise ModelError(
                    f"{path}: input {back[plain]}: the file leaves dimension {number} ({size}) open; give its "
                    f"size with example={{{plain!r}: tensor}}, or --data on the command line"
                )
        if plain in given:
            open_sizes = {number for name, number in free if name == plain}
            inputs[plain] = _fitting(path, back[plain], given[plain], dtype, shape, open_sizes)
        else:
            inputs[plain] = _invented(plain, shape, dtype, _rows(proto, plain), generator)
    if not inputs:
        raise ModelError(f"{path}: the network has no inputs")
    if any((name, 0) not in free for name, value in inputs.items() if value.ndim):
        # One input of fixed batch fixes it for all.
        inputs = {n: value[:1] if (n, 0) in free else value for n, value in inputs.items()}
        free = {key: symbol for key, symbol in free.items() if key[1] != 0}
    return inputs, free


def _given(path: Path, example: Inputs | None, names: Mapping[str, str]) -> dict[str, Tensor]:
    if example is None:
        return {}
    if isinstance(example, Mapping):
        unknown = [name for name in example if name not in names and name not in names.values()]
        if unknown:
            raise ModelError(f"{path}: no input {', '.join(unknown)}; it has {', '.join(names)}")
        return {names.get(name, name): value for name, value in example.items()}
    values = [example] if isinstance(example, Tensor) else list(example)
    if len(values) > len(names):
        raise ModelError(
            f"{path}: the example has {len(values)} inputs, the file {len(names)}: {', '.join(names)}"
        )
    return dict(zip(names.values(), values, strict=False))


def _fitting(
    path: Path,
    name: str,
    value: Tensor,
    dtype: torch.dtype,
    shape: list[int],
    open_sizes: set[int],
) -> Tensor:
    fits = value.ndim == len(shape) and all(
        number in open_sizes or value.shape[number] == size for number, size in enumerate(shape)
    )
    if value.dtype != dtype or not fits:
        raise ModelError(
            f"{path}: example input {name} is {value.dtype} {tuple(value.shape)}, the file needs {dtype} "
            f"({', '.join('any' if n in open_sizes else str(s) for n, s in enumerate(shape))})"
        )
    if 0 in open_sizes and len(value) == 1:
        value = value.repeat(2, *[1] * (value.ndim - 1))
    return value.detach().cpu()


def _invented(
    name: str, shape: list[int], dtype: torch.dtype, rows: int, generator: torch.Generator
) -> Tensor:
    if dtype.is_floating_point:
        return torch.rand(shape, generator=generator).to(dtype)
    if "mask" in name.lower() or dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    return torch.randint(0, max(1, min(rows, 100)), shape, generator=generator).to(dtype)


def _rows(proto: onnx.ModelProto, name: str) -> int:
    """How many values an input of indices may have: the rows of the smallest table that it, or what is made of it, indexes."""
    tables = {tensor.name: tensor.dims for tensor in proto.graph.initializer}
    reached = {name}
    rows = 256
    for node in proto.graph.node:
        if not reached.intersection(node.input):
            continue
        if node.op_type == "Gather":
            if node.input[1] in reached and len(tables.get(node.input[0], ())) > 1:
                axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
                rows = min(rows, tables[node.input[0]][axis])
            continue
        reached.update(node.output)
    return rows
