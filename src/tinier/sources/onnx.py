"""An ONNX file, as a module whose weights are parameters again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor, fx

from tinier.errors import MissingError, ModelError
from tinier.graph.trace import quiet
from tinier.network import Example, Network
from tinier.sources.base import Source, first_line, present
from tinier.sources.onnx_check import checked
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
# Allowed difference to ONNX Runtime, relative to the largest output: float32 sums in another order.
TOLERANCE = 1e-3


class OnnxSource(Source):
    """An ``.onnx`` file.

    It is imported with onnx2fx; weights are parameters, sums over shapes become sizes of the graph, and products with a
    constant matrix become linear layers. The result is compared with ONNX Runtime, if that is installed.
    """

    name = "onnx"

    def accepts(self, model: Any) -> bool:
        return isinstance(model, str | Path) and Path(model).suffix.lower() == ".onnx"

    def load(self, model: Any, example: Example | None) -> Network:
        path = Path(model)
        present(path)
        try:
            import onnx2fx
        except ImportError as error:
            raise MissingError("onnx2fx", "onnx", f"reading {path.name}") from error
        proto, names = checked(path)
        inputs, free = _inputs(path, proto, names, example)
        try:
            with quiet():
                imported = onnx2fx.convert(proto, base_dir=str(path.parent))
        except Exception as error:
            raise ModelError(f"{path}: cannot be imported: {first_line(error)}") from error
        module = _rewritten(path, imported, inputs, free) if free else None
        if module is not None:
            network = Network(module, inputs, path.stem)
            if network.traced.batched:
                _compare(path, network, names)
                return network
        # The file, or its operators, fix the batch: as declared, or 1 where it is declared free but is not.
        if free:
            inputs = {name: value[:1] for name, value in inputs.items()}
        module = _rewritten(path, imported, inputs, {})
        if module is None:
            raise ModelError(f"{path}: the imported network does not run on the example")
        network = Network(module, inputs, path.stem)
        _ = network.traced
        _compare(path, network, names)
        return network


def _inputs(
    path: Path, proto: onnx.ModelProto, names: Mapping[str, str], example: Example | None
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
                    f"size with example={{{plain!r}: tensor}}"
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


def _given(path: Path, example: Example | None, names: Mapping[str, str]) -> dict[str, Tensor]:
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


def _rewritten(
    path: Path,
    imported: fx.GraphModule,
    inputs: Mapping[str, Tensor],
    free: Mapping[tuple[str, int], str],
) -> fx.GraphModule | None:
    """The rewritten network, or None if it does not run at every probed size."""
    try:
        with quiet(), torch.no_grad():
            return rewrite(imported, inputs, free)
    except Exception as error:
        if free:
            return None
        raise ModelError(
            f"{path}: the imported network does not run on the example: {first_line(error)}"
        ) from error


def _compare(path: Path, network: Network, names: Mapping[str, str]) -> None:
    """Raise ModelError unless the network computes what ONNX Runtime computes, at its batch size and another one."""
    try:
        import onnxruntime
    except ImportError:
        return  # Nothing to compare with: the parity gate of the artifacts still is to come.
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ModelError(f"{path}: ONNX Runtime cannot open it: {error}") from error
    batches = [len(next(iter(network.example.values())))] + ([1] if network.traced.batched else [])
    for batch in batches:
        inputs = dict(network.example) if batch == batches[0] else network.batch(batch)
        fed = {own: inputs[plain].numpy() for own, plain in names.items() if plain in inputs}
        try:
            wanted = session.run(None, fed)
        except Exception as error:
            raise ModelError(
                f"{path}: ONNX Runtime cannot run it at batch {batch}: {error}"
            ) from error
        with torch.no_grad():
            # The traced network: the one that is edited and exported.
            got = [output.numpy() for output in network.traced.module(*inputs.values())]
        for number, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
            _compare_output(path, f"output {number} at batch {batch}", ours, np.asarray(theirs))


def _compare_output(path: Path, where: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    # Sizes of 1 may be squeezed away at batch 1 and only there.
    if ours.size != theirs.size or (ours.shape != theirs.shape and "at batch 1" not in where):
        raise ModelError(
            f"{path}: {where} of the imported network has shape {ours.shape}, of ONNX Runtime "
            f"{theirs.shape}; the import is wrong and is not used"
        )
    if not ours.size:
        return
    difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64).reshape(ours.shape))
    largest = float(np.abs(theirs.astype(np.float64)).max())
    worst = float(difference.max())
    if np.isnan(theirs).any() if theirs.dtype.kind == "f" else False:
        raise ModelError(
            f"{path}: {where} is NaN in ONNX Runtime; give example=… as the model gets it"
        )
    if not worst <= TOLERANCE * max(largest, 1e-6):
        raise ModelError(
            f"{path}: {where} of the imported network differs from ONNX Runtime by {worst:.3g} (largest value "
            f"{largest:.3g}); the import is wrong and is not used"
        )
