"""What an ONNX file must be before any of it is used."""

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from tinier.errors import ModelError

QUANTIZED = (
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "ConvInteger",
    "MatMulInteger",
    "MatMulNBits",
)


def checked(path: Path) -> tuple[ModelProto, dict[str, str]]:
    """The model in an ONNX file, once it is known to be whole, importable and to stay inside its folder.

    Tensors are renamed where their names, made identifiers, would be equal; functions of the file are inlined.

    Args:
        path: the file.

    Returns:
        The model with its weights loaded, and of each input the name in the file → the name as an identifier.

    Raises:
        ModelError: not an ONNX file; external data outside the folder; invalid; already quantized; an operator that
            cannot be imported, with the name of a node that has it.
    """
    try:
        proto = onnx.load_model(str(path), load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise ModelError(f"{path}: not an ONNX file ({error})") from error
    if not proto.ir_version or not proto.graph.node:
        raise ModelError(f"{path}: not an ONNX file, or one without operators")
    external = [tensor for tensor in tensors_of(proto) if is_external(tensor)]
    for tensor in external:
        _stays_inside(path, tensor)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ModelError(
            f"{path}: not a valid ONNX model: {str(error).strip().splitlines()[0]}"
        ) from error
    for node in _nodes(proto.graph):
        if node.op_type in QUANTIZED or node.op_type.startswith("QLinear"):
            raise ModelError(
                f"{path}: already quantized (operator {node.op_type}, node {node.name or node.output[0]}); "
                "give the float model it was made from"
            )
    if external:
        onnx.load_external_data_for_model(proto, str(path.parent))
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    _importable(path, proto)
    return proto, _identifiers(proto)


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _nodes(attribute.g)
            for inner in attribute.graphs:
                yield from _nodes(inner)


def tensors_of(proto: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that the file holds, wherever it is."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        for node in function.node:
            yield from _node_tensors(node)
    for info in proto.training_info:
        yield from _graph_tensors(info.initialization)
        yield from _graph_tensors(info.algorithm)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("sparse_tensor"):
            yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
        if attribute.HasField("g"):
            yield from _graph_tensors(attribute.g)
        for graph in attribute.graphs:
            yield from _graph_tensors(graph)


def is_external(tensor: TensorProto) -> bool:
    """Whether a tensor lies in another file."""
    return tensor.data_location == TensorProto.EXTERNAL or bool(tensor.external_data)


def _stays_inside(path: Path, tensor: TensorProto) -> None:
    """Raise ModelError for external data that are not plain files inside the model's folder."""
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    where = f"{path}: the external data of {tensor.name or 'a tensor'} ({location!r})"
    folder = path.parent.resolve()
    parts = Path(location.replace("\\", "/")).parts
    if not location or os.path.isabs(location) or ".." in parts or ":" in location:
        raise ModelError(
            f"{where} are outside the model's folder, which is not read; save the model with its data beside it"
        )
    file = folder
    for part in parts:
        file = file / part
        if file.is_symlink():
            raise ModelError(
                f"{where} are behind a symbolic link, which is not followed; copy the file there"
            )
    if not file.is_file():
        raise ModelError(f"{where} are missing; put the file beside the model")


def _importable(path: Path, proto: ModelProto) -> None:
    import onnx2fx

    versions = {
        "" if entry.domain == "ai.onnx" else entry.domain: entry.version
        for entry in proto.opset_import
    }
    for node in _nodes(proto.graph):
        domain = "" if node.domain == "ai.onnx" else node.domain
        if not onnx2fx.is_supported(node.op_type, domain, versions.get(domain, 1)):
            raise ModelError(
                f"{path}: the operator {node.op_type}{f' of {domain}' if domain else ''} (node "
                f"{node.name or node.output[0]}) cannot be imported; export the model without it"
            )


def _identifiers(proto: ModelProto) -> dict[str, str]:
    """Rename what the importer would give equal names; the inputs' names in the file → as identifiers."""
    from onnx2fx.utils.names import sanitize_name

    graph = proto.graph
    held = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in held]
    constants = [n.output[0] for n in graph.node if n.op_type == "Constant"]
    renamed: dict[str, str] = {}
    # Names of tensors inside the network stay as they are.
    taken = {name for node in _nodes(graph) for name in node.output} - set(constants)
    for name in [*(value.name for value in inputs), *sorted(held), *constants]:
        plain = base = sanitize_name(name)
        count = 1
        while plain in taken:
            count += 1
            plain = f"{base}_{count}"
        taken.add(plain)
        if plain != base or name in {value.name for value in inputs}:
            renamed[name] = plain
    for node in _nodes(graph):
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name in renamed:
                    names[index] = renamed[name]
    for values in (graph.initializer, graph.input, graph.output, graph.value_info):
        for value in values:
            value.name = renamed.get(value.name, value.name)
    return {name: plain for name, plain in renamed.items() if plain in {v.name for v in inputs}}
