"""Integer weights that no kernel reads as integers: operators of constants, which runtimes compute once, when they load the file.

ONNX Runtime computes ``DequantizeLinear`` of a constant at every run, but folds ``Cast → Sub → Mul`` when it opens the file; OpenVINO
takes both for the same. The file has the integers, the session what that of the float network has: convolutions, recurrent layers and
products whose inputs no block divides are as fast as in float. The exporter reorders the gates of recurrent layers with operators of
constants, which are folded, too.
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tinier.targets.onnx_integers import Wiring, drop_dead, fits_nibble, integer_tensor

# Operators that only move or pick values of a weight on its way to its reader.
MOVES = ("Transpose", "Reshape", "Slice", "Concat", "Unsqueeze", "Squeeze", "Identity")
# Operators that runtimes have in integers: with a quantized input they fuse with the pair of their weight.
FUSED = ("Conv", "MatMul", "Gemm")


def fold_weights(model: onnx.ModelProto) -> None:
    """Rewrite, in place, what dequantizes integer weights whose readers compute in float: ŵ = s · (cast(q) − z).

    Cost:
        A copy of each weight.
    """
    found = Wiring(model)
    changed = False
    for node in list(model.graph.node):
        if node.op_type != "DequantizeLinear" or node.input[0] not in found.constants:
            continue
        if any(a.name == "block_size" for a in node.attribute):
            continue  # products in blocks, for which there are kernels
        integers = found.array(node.input[0])
        if integers.dtype in (np.int8, np.uint8) and not _fuses(found, node.output[0]):
            _rewrite(found, node, integers)
            changed = True
    if changed:
        drop_dead(model)


def _fuses(found: Wiring, value: str) -> bool:
    """Whether an integer operator reads a weight: one with a quantized input."""
    for reader in found.readers.get(value, []):
        if reader.op_type in MOVES and any(_fuses(found, out) for out in reader.output):
            return True
        if reader.op_type in FUSED and reader.input[0] != value:
            other = found.maker.get(reader.input[0])
            if other is not None and other.op_type == "DequantizeLinear":
                return True
    return False


def _rewrite(found: Wiring, node: onnx.NodeProto, integers: np.ndarray) -> None:
    """Operators of constants in place of the node."""
    stem, shape = node.input[0].removesuffix("_integers"), integers.shape
    scale = found.array(node.input[1])
    zero = np.zeros(scale.shape, integers.dtype)
    if len(node.input) > 2:
        zero = found.array(node.input[2]).astype(integers.dtype)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1) % integers.ndim
    grouped = scale.ndim == 2
    if grouped:  # (rows, G) for (rows, columns)
        integers = integers.reshape(len(scale), scale.shape[1], -1)
        own = (*scale.shape, 1)
    else:
        own = tuple(-1 if d == axis else 1 for d in range(integers.ndim))
    nibble = fits_nibble(integers, zero)
    name = node.input[0]
    if nibble or grouped:
        name = found.add(integer_tensor(integers, f"{stem}_folded", nibble))
    cast = f"{stem}_float"
    kind = onnx.TensorProto.FLOAT
    made = [helper.make_node("Cast", [name], [cast], f"{node.name}_float", to=kind)]

    def then(operator: str, value: np.ndarray, what: str) -> None:
        name = found.add(numpy_helper.from_array(value, f"{stem}_folded_{what}"))
        before, after = made[-1].output[0], f"{stem}_{operator.lower()}"
        made.append(helper.make_node(operator, [before, name], [after], f"{node.name}_{what}"))

    if zero.any():
        then("Sub", zero.astype(np.float32).reshape(own), "zero_point")
    then("Mul", scale.reshape(own), "scale")
    if grouped:
        then("Reshape", np.array(shape, np.int64), "shape")
    made[-1].output[0] = node.output[0]
    nodes = found.graph.node
    place = list(nodes).index(node)
    del nodes[place]
    for offset, one in enumerate(made):
        nodes.insert(place + offset, one)
