"""The ONNX file that ONNX Runtime and OpenVINO read: standard operators, no metadata, free batch size."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import helper, numpy_helper

from tinier.errors import ModelError, RefusedError
from tinier.graph.states import quiet
from tinier.network import Network
from tinier.targets.onnx_dynamic import multiply_integers
from tinier.targets.onnx_float import keep_float
from tinier.targets.onnx_folded import fold_weights
from tinier.targets.onnx_integers import compact
from tinier.targets.onnx_nibbles import halve
from tinier.targets.onnx_opset import raise_opset
from tinier.targets.onnx_scalar import share_scales
from tinier.targets.onnx_shapes import count_instead
from tinier.targets.onnx_translations import translations

OPSET = 18
PRODUCER = "tinier"
SMALL = 1e-7
_POOL: tuple[Any, ...] = (None, None, [], [0], False, True)  # defaults of pooling


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
            _negate(traced.exported)
            _average(traced.exported)
            _overhang(traced.exported)
            program = torch.onnx.export(
                traced.exported,
                (),
                kwargs=dict(network.example),
                input_names=list(traced.inputs),
                output_names=list(traced.outputs),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                custom_translation_table=translations(traced.exported),
                verbose=False,
            )
            assert program is not None
            _keep_small_terms(program.model)
            _optimize(program)
    # The exporter's passes raise errors of several packages that have no common base.
    except Exception as error:
        raise RefusedError(f"{network.name} cannot be written as ONNX: {_reason(error)}") from error
    model = program.model_proto
    _cast_constants(model)
    _average_globally(model)
    _pad_apart(model)
    _drop_unused(model)
    _name_dimensions(model)
    count_instead(model)
    _name_values(model)
    multiply_integers(model)
    compact(model)
    fold_weights(model)
    share_scales(model)
    halve(model)
    keep_float(model)
    raise_opset(model)
    _strip(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{network.name}: the ONNX file would not be valid: {error}") from error
    return model


def _negate(program: torch.export.ExportedProgram) -> None:
    """c − x becomes −x + c, in place: of integers and a fraction, as 1.0 − mask, the exporter makes c − x of a number and a tensor."""
    aten, graph = torch.ops.aten, program.graph
    for node in graph.find_nodes(op="call_function", target=aten.rsub.Scalar):
        if node.args[2:] not in ((), (1,)) or node.kwargs:
            continue
        source = node.args[0]
        kind = source.meta["val"].dtype
        if kind.is_floating_point or not kind.is_signed or not isinstance(node.args[1], float):
            continue
        with graph.inserting_before(node):
            negative = graph.call_function(aten.neg.default, (source,))
        negative.meta = {**node.meta, "val": -source.meta["val"]}
        node.target, node.args = aten.add.Tensor, (negative, node.args[1])


def _average(program: torch.export.ExportedProgram) -> None:
    """Pooling adaptively to one value is written as a mean, in place.

    Where channels lie last in memory, torch makes it a mean and ``as_strided``, which the exporter writes as a lookup in the flat tensor:
    OpenVINO finds other values there where the mean is quantized, and it is slow.
    """
    aten, graph = torch.ops.aten, program.graph
    for rank, pool in enumerate((aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d), 1):  # fmt: skip
        for node in graph.find_nodes(op="call_function", target=pool.default):
            if list(node.args[1]) == [1] * rank:
                node.target = aten.mean.dim
                node.args = (node.args[0], list(range(-rank, 0)), True)


def _overhang(program: torch.export.ExportedProgram) -> None:
    """Average pooling whose last windows overhang counts what it has of the padded values, which are padded apart, in place.

    With ``ceil_mode`` and ``count_include_pad`` runtimes divide by other numbers in integers than in float.
    """
    aten, graph = torch.ops.aten, program.graph
    for rank, pool in enumerate((aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d), 1):
        for node in graph.find_nodes(op="call_function", target=pool.default):
            source, kernel, stride, padding, ceil, counted = (*node.args, *_POOL[len(node.args) :])[
                :6
            ]
            if not (ceil and counted) or node.args[6:]:
                continue
            padding = [*padding] * (rank // len(padding))
            if any(padding):
                with graph.inserting_before(node):
                    sides = [side for size in reversed(padding) for side in (size, size)]
                    source = graph.call_function(aten.constant_pad_nd.default, (source, sides))
                # The exporter finds the values' shapes again.
                source.meta = {key: value for key, value in node.meta.items() if key != "val"}
            node.args = (source, kernel, stride, [0] * rank, True, False)


def _reason(error: BaseException) -> str:
    """The innermost message of an export error: the one that names the operator."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__


def _optimize(program: Any) -> None:
    """Fold and fuse; what onnxscript stumbles over, as it does over unbind, stays as it is, and is valid and slower."""
    with contextlib.suppress(Exception):
        program.optimize()


def _keep_small_terms(model: Any) -> None:
    """x + ε stays where onnxscript's optimizer would take ε for 0, up to 1e-8: ``Sum`` is the same, and no pattern of its own."""
    for node in model.graph.all_nodes():
        if node.domain or node.op_type != "Add":
            continue
        for value in node.inputs:
            constant = onnx_ir.convenience.get_const_tensor(value)
            if constant is None or constant.size != 1:
                continue
            if 0 < abs(float(constant.numpy().reshape(()))) <= SMALL:
                node.op_type = "Sum"


def _cast_constants(model: onnx.ModelProto) -> None:
    """Constants that are cast to small integers become such: the optimizer leaves large ones, as zero points of a vocabulary's rows."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Cast"]:
        kind = next(a.i for a in node.attribute if a.name == "to")
        if node.input[0] in constants and kind in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8):
            value = numpy_helper.to_array(constants[node.input[0]])
            value = value.astype(helper.tensor_dtype_to_np_dtype(kind))
            graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
            graph.node.remove(node)


def _pad_apart(model: onnx.ModelProto) -> None:
    """A padding with zeros before pooling says its axes: ONNX Runtime would else make it the pooling's, which pads otherwise."""
    graph = model.graph
    pooled = {node.input[0] for node in graph.node if node.op_type in ("MaxPool", "AveragePool")}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    for node in graph.node:
        if node.op_type != "Pad" or node.output[0] not in pooled or len(node.input) > 3:
            continue
        sizes = [i.dims[0] for i in graph.initializer if i.name == node.input[1]]
        rank = sizes[0] // 2 if sizes else ranks.get(node.output[0], 0)
        if rank:
            name = f"{node.output[0]}_axes"
            graph.initializer.append(numpy_helper.from_array(np.arange(rank), name))
            node.input.extend([""] * (3 - len(node.input)) + [name])


def _drop_unused(model: onnx.ModelProto) -> None:
    """Without constants that nothing reads, of which ONNX Runtime would complain."""
    used: set[str] = set()
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        used.update(value.name for value in graph.output)
        for node in graph.node:
            used.update(node.input)
            for attribute in node.attribute:
                graphs += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
    for index in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[index].name not in used:
            del model.graph.initializer[index]


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
