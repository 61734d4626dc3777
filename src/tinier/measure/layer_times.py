"""What each layer of an artifact takes on its runtime, by the runtime's own profiler."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from tinier.targets.base import Kernel, Target

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN")
THROUGH = ("DequantizeLinear", "Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze")
FUSED = 6  # operators behind a layer that a runtime may fuse with it and name the result after


def layer_times(
    target: Target, onnx_file: Path, inputs: Mapping[str, np.ndarray], threads: int
) -> dict[str, float]:
    """Milliseconds of each layer of an ONNX file.

    Args:
        target: the runtime, which must read ONNX.
        onnx_file: float or quantized.
        inputs: input name → array.
        threads: of the session.

    Returns:
        Name of the layer's weight → median milliseconds of the kernels that compute it, what is fused with it counted in; "" → all other
        kernels, such as those that move values between layouts and precisions.

    Raises:
        RefusedError: the runtime has no profiler.

    Cost:
        35 runs.
    """
    model = onnx.load(onnx_file, load_external_data=False)
    return assigned(labels(model), target.kernels(onnx_file, inputs, threads))


def assigned(names: Mapping[str, Sequence[str]], kernels: Sequence[Kernel]) -> dict[str, float]:
    """Weight → milliseconds; a kernel belongs to the layer with the longest label that its name has.

    Args:
        names: weight → labels of the layer, from `labels`.
        kernels: of a profile.
    """
    layer_of = {label: weight for weight, found in names.items() for label in found}
    ordered = sorted(layer_of, key=len, reverse=True)
    result = dict.fromkeys(names, 0.0)
    result[""] = 0.0
    for kernel in kernels:
        label = next((label for label in ordered if label in kernel.name), None)
        result[layer_of[label] if label else ""] += kernel.milliseconds
    return result


def labels(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Weight of each layer of an ONNX file → what a runtime may name its kernel after: the layer's node and output, and those that it is
    fused with."""
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    result: dict[str, list[str]] = {}
    for node in graph.node:
        if node.op_type not in WEIGHTED or len(node.input) < 2:
            continue
        weight = node.input[1]
        while weight not in stored and weight in maker and maker[weight].op_type in THROUGH:
            weight = maker[weight].input[0]
        if weight not in stored:
            continue
        found = result.setdefault(weight.removesuffix("_integers"), [])
        at = node
        for _ in range(FUSED):
            found += [name for name in (at.name, at.output[0]) if name]
            users = readers.get(at.output[0], [])
            if len(users) != 1 or users[0].op_type in (*WEIGHTED, "QuantizeLinear"):
                break
            at = users[0]
    return result
