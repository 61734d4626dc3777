"""Sizes of free dimensions in quantized ONNX files, computed so that OpenVINO keeps the biases of its convolutions."""

from math import prod

import numpy as np
import onnx
from onnx import helper, numpy_helper


def count_instead(model: onnx.ModelProto) -> None:
    """The size of the only free dimension of a value becomes its number of elements over the product of the others, in place.

    OpenVINO takes a free size from whatever has it, as a convolution before its bias is added; with that second reader the integer
    convolution loses its bias (measured with OpenVINO 2026.4: DINOv2 was off by half of its range). A number of elements it leaves alone.
    A value with two free dimensions stays as it is. Files without integer convolutions, too.

    Cost:
        One pass over the graph.
    """
    graph = model.graph
    if not _multiplies_integers(graph):
        return
    sizes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.value_info]
    }
    for node in [node for node in graph.node if node.op_type == "Shape"]:
        own = sizes.get(node.input[0], [])
        ends = {a.name: a.i for a in node.attribute}
        axes = range(len(own))[slice(ends.get("start", 0), ends.get("end"))]
        free = [axis for axis, size in enumerate(own) if not size]
        if list(axes) != free or len(free) != 1:
            continue
        (out,) = node.output
        others = prod(size for size in own if size)
        name = f"{out}_others"
        graph.initializer.append(numpy_helper.from_array(np.array([others], np.int64), name))
        count = helper.make_node("Size", [node.input[0]], [f"{out}_count"], f"{node.name}_count")
        share = helper.make_node("Div", [f"{out}_count", name], [out], f"{node.name}_share")
        place = list(graph.node).index(node)
        del graph.node[place]
        graph.node.insert(place, share)
        graph.node.insert(place, count)


def _multiplies_integers(graph: onnx.GraphProto) -> bool:
    """Whether a convolution has a quantized input."""
    made = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return any(node.op_type == "Conv" and node.input[0] in made for node in graph.node)
