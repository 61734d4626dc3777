"""Weights of integer operators that fit four bits: two in a byte of the file, a byte each once it is open.

ONNX Runtime and OpenVINO have integer products of bytes alone: where ``DequantizeLinear`` reads INT4 beside quantized activations, both
compute the product in float (measured with ONNX Runtime 1.31 and OpenVINO 2026.4: ten times and twice the time of a small CNN). Behind a
``Cast``, which both compute once, when they load the file, they find the bytes that they fuse.
"""

import numpy as np
import onnx
from onnx import helper

from tinier.targets.onnx_integers import Wiring, fits_nibble, integer_tensor

LEAST = 64  # integers for which an operator more is worth it
# Operator → which of its inputs are integers of a weight.
READS = {"DequantizeLinear": 0, "MatMulInteger": 1}


def halve(model: onnx.ModelProto) -> None:
    """Store integers of up to four bits as INT4 or UINT4, in place, where operators read bytes.

    Args:
        model: after ``compact`` and ``fold_weights``, which give products in blocks and float operators forms of their own.

    Cost:
        A copy of each weight.
    """
    found = Wiring(model)
    made: list[onnx.NodeProto] = []
    for name, tensor in list(found.constants.items()):
        if tensor.data_type not in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8):
            continue
        readers = found.readers.get(name, [])
        if not readers or not all(_reads_bytes(node, name) for node in readers):
            continue
        integers = found.array(name)
        if integers.size < LEAST or not fits_nibble(integers, np.zeros(1, np.int64)):
            continue
        kind = tensor.data_type
        tensor.CopyFrom(integer_tensor(integers, name, nibble=True))
        byte = f"{name}_bytes"
        made.append(helper.make_node("Cast", [name], [byte], byte, to=kind))
        for node in readers:
            node.input[READS[node.op_type]] = byte
    if not made:
        return
    nodes = [*made, *found.graph.node]
    del found.graph.node[:]
    found.graph.node.extend(nodes)


def _reads_bytes(node: onnx.NodeProto, name: str) -> bool:
    position = READS.get(node.op_type)
    blocks = any(a.name == "block_size" for a in node.attribute)
    return (
        position is not None
        and not blocks
        and [i for i, read in enumerate(node.input) if read == name] == [position]
    )
