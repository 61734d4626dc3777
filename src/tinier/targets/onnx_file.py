"""The ONNX file that ONNX Runtime and OpenVINO read: standard operators, no metadata, free batch size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper, numpy_helper

from tinier.errors import ModelError, RefusedError
from tinier.graph.states import quiet
from tinier.network import Network

OPSET = 18
PRODUCER = "tinier"


def write_onnx(network: Network, path: Path) -> None:
    """Write a float or quantized network as an ONNX file.

    Args:
        network: the network; inputs get the names of its example, outputs the names of its traced graph.
        path: the file; it is overwritten.

    Raises:
        RefusedError: an operator has no ONNX form; the message names it.
        ModelError: the network cannot be traced, or the file would not be valid ONNX.

    Cost:
        Seconds; about four times the size of the parameters in memory.
    """
    model = to_onnx(network)
    path.write_bytes(model.SerializeToString(deterministic=True))


def to_onnx(network: Network) -> onnx.ModelProto:
    """The network as an ONNX model in memory; see `write_onnx`."""
    traced = network.traced
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                traced.exported,
                (),
                kwargs=dict(network.example),
                input_names=list(traced.inputs),
                output_names=list(traced.outputs),
                opset_version=OPSET,
                dynamo=True,
                optimize=True,
                custom_translation_table=_translations(traced.exported),
                verbose=False,
            )
    # The exporter's passes raise errors of several packages that have no common base.
    except Exception as error:
        raise RefusedError(f"{network.name} cannot be written as ONNX: {_reason(error)}") from error
    assert program is not None
    model = program.model_proto
    _average_globally(model)
    _name_dimensions(model)
    _name_values(model)
    _strip(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{network.name}: the ONNX file would not be valid: {error}") from error
    return model


def _translations(program: torch.export.ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """How the operators of the network that the exporter does not know are written."""
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    known: dict[str, Callable[..., Any]] = {
        "transformers::grouped_mm_fallback": _grouped_product,
        "aten::_grouped_mm": _grouped_product,
        "aten::_is_all_true": _all_true,
    }
    return {
        target: known[target._schema.name]
        for target in targets
        if isinstance(target, torch._ops.OpOverload) and target._schema.name in known
    }


def _all_true(self: Any) -> Any:
    from onnxscript import opset18

    op: Any = opset18
    least = op.ReduceMin(op.Cast(self, to=onnx.TensorProto.INT64), keepdims=0)
    return op.Cast(least, to=onnx.TensorProto.BOOL)


def _grouped_product(input: Any, weight: Any, offs: Any, *_: Any, **__: Any) -> Any:
    """y[r] = x[r] wₑ where row r is among those of expert e: each expert's rows are cut out, multiplied and joined."""
    from onnxscript import opset18

    op: Any = opset18
    ends, zero, start = op.Cast(offs, to=onnx.TensorProto.INT64), op.Constant(value_ints=[0]), None
    pieces = []
    for expert in range(weight.shape[0]):
        here, behind = op.Constant(value_ints=[expert]), op.Constant(value_ints=[expert + 1])
        end = op.Slice(ends, here, behind, zero)
        rows = op.Slice(input, zero if start is None else start, end, zero)
        matrix = op.Squeeze(op.Slice(weight, here, behind, zero), zero)
        pieces.append(op.MatMul(rows, matrix))
        start = end
    return op.Concat(*pieces, axis=0)


def _reason(error: BaseException) -> str:
    """The innermost message of an export error: the one that names the operator."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__


def _average_globally(model: onnx.ModelProto) -> None:
    """ReduceMean over all spatial dimensions becomes GlobalAveragePool, which runtimes have in integers."""
    graph = model.graph
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in [*graph.value_info, *graph.input]
        if value.type.tensor_type.HasField("shape")
    }
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for index, node in enumerate(graph.node):
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in constants:
            continue
        rank = ranks.get(node.input[0], 0)
        axes = (
            {int(axis) % rank for axis in numpy_helper.to_array(constants[node.input[1]])}
            if rank
            else set()
        )
        keep = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
        if rank < 3 or axes != set(range(2, rank)) or not keep:
            continue
        pool = helper.make_node("GlobalAveragePool", [node.input[0]], list(node.output), node.name)
        graph.node[index].CopyFrom(pool)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _name_dimensions(model: onnx.ModelProto) -> None:
    """Free dimensions of the inputs are called batch and sequence_length; those computed from them have no name."""
    names: dict[str, str] = {}
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            # The exporter's name of a size that it found to have one value.
            if dim.dim_param.isdecimal():
                dim.dim_value = int(dim.dim_param)
    for value in model.graph.input:
        for index, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param and dim.dim_param not in names:
                free = "batch" if index == 0 else "sequence_length"
                names[dim.dim_param] = free if free not in names.values() else f"free_{len(names)}"
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
            elif dim.dim_param:
                dim.ClearField("dim_param")


def _name_values(model: onnx.ModelProto) -> None:
    """Scales, zero points and rounded values are called after the tensor that they belong to."""
    graph = model.graph
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return  # branches and loops read values of the graph by name
    taken = {name for node in graph.node for name in [*node.input, *node.output]}
    public = {value.name for value in [*graph.input, *graph.output]}
    names: dict[str, str] = {}

    def rename(old: str, new: str) -> None:
        while new in taken:
            new += "_"
        taken.add(new)
        names[old] = new

    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        source = names.get(node.input[0], node.input[0])
        stem = source.removesuffix("_quantized").removesuffix("_integers")
        for name, what in zip(node.input[1:], ("scale", "zero_point"), strict=False):
            if name.startswith("val_") and name not in names:
                rename(name, f"{stem}_{what}")
        if node.output[0] not in public:
            ending = "quantized" if node.op_type == "QuantizeLinear" else "dequantized"
            rename(node.output[0], f"{stem}_{ending}")
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)


def _strip(model: onnx.ModelProto) -> None:
    """Nothing of the machine or the user's source stays in the file: no paths, stack traces or documentation strings."""
    model.producer_name = PRODUCER
    model.ClearField("producer_version")
    model.ClearField("doc_string")
    del model.metadata_props[:]
    del model.functions[:]
    graph = model.graph
    graph.name = "main"
    graph.ClearField("doc_string")
    del graph.metadata_props[:]
    # Shapes of intermediate values only repeat what any reader infers.
    del graph.value_info[:]
    domains = {""}
    for node in graph.node:
        node.ClearField("doc_string")
        del node.metadata_props[:]
        domains.add(node.domain)
    for item in [*graph.input, *graph.output, *graph.initializer]:
        item.ClearField("doc_string")
        del item.metadata_props[:]
    kept = [entry for entry in model.opset_import if entry.domain in domains]
    del model.opset_import[:]
    model.opset_import.extend(kept)
