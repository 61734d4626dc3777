"""Layers that stay float between quantized ones stay float in ONNX Runtime, too.

Where a convolution with float weights reads a ``DequantizeLinear`` and a ``QuantizeLinear`` reads its result, ONNX Runtime rounds its
weights to eight bits by itself when it opens the file, with one scale for all channels. With a clamp that changes nothing between the
two it does not.
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper

OPERATORS = ("Conv", "ConvTranspose", "Gemm")
LEAST = np.finfo(np.float32).min
LOW, READ = "tinier.least", ".tinier.read"  # no name of a Python argument or module


def keep_float(model: onnx.ModelProto) -> None:
    """Put the clamps in, in place.

    Cost:
        One pass over the values that such operators read, at each run.
    """
    graph = model.graph
    floats = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    constants = {tensor.name for tensor in graph.initializer}
    activations = {
        node.output[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] not in constants
    }
    found = [
        (index, node)
        for index, node in enumerate(graph.node)
        if node.op_type in OPERATORS and node.input[1] in floats and node.input[0] in activations
    ]
    for index, node in reversed(found):
        name = f"{node.output[0]}{READ}"
        graph.node.insert(index, helper.make_node("Clip", [node.input[0], LOW], [name], name))
        node.input[0] = name
    if found:
        graph.initializer.append(numpy_helper.from_array(np.array(LEAST), LOW))
