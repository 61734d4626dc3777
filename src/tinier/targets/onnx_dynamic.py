"""Products of dynamically rounded activations with integer weights: ``DynamicQuantizeLinear → MatMulInteger → Cast → Mul``.

ONNX Runtime makes one operator of the four, ``DynamicQuantizeMatMul``.
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tinier.targets.onnx_integers import Wiring, drop_dead, outputs_are_rows

PRODUCTS = ("MatMul", "Gemm")


def multiply_integers(model: onnx.ModelProto) -> None:
    """Rewrite, in place, products whose input `round_dynamically` rounded and whose weight has one scale an output and no zero point.

    Cost:
        A copy of each weight.
    """
    found = Wiring(model)
    changed = False
    for weight in list(found.weights()):
        if weight.scale.shape[1] != 1 or weight.zero_point.any():
            continue
        transposed = len(weight.scale) != len(found.array(weight.node.input[0]))
        value = weight.node.output[0]
        ways = [(node, value, False) for node in found.readers.get(value, [])]
        for node, _, _ in list(ways):
            if node.op_type == "Transpose":
                ways += [(n, node.output[0], True) for n in found.readers.get(node.output[0], [])]
        names: list[str] = []
        for node, through, flipped in ways:
            rounded = _rounding(found, node) if node.op_type in PRODUCTS else None
            if rounded is None or node.input[1] != through:
                continue
            if not outputs_are_rows(node, flipped, transposed):
                continue
            if not names:
                stem = weight.node.input[0].removesuffix("_integers")
                integers = np.ascontiguousarray(weight.integers.T)  # (inputs, outputs)
                scale = np.ascontiguousarray(weight.scale[:, 0])  # (outputs,)
                names = [
                    found.add(numpy_helper.from_array(integers, f"{stem}_by_inputs")),
                    found.add(numpy_helper.from_array(scale, f"{stem}_outputs_scale")),
                ]
            _multiply(found, node, rounded, *names)
            changed = True
    if changed:
        drop_dead(model)


def _rounding(found: Wiring, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The DynamicQuantizeLinear whose integers a product reads, dequantized."""
    pair = found.maker.get(node.input[0])
    if pair is None or pair.op_type != "DequantizeLinear":
        return None
    rounded = found.maker.get(pair.input[0])
    return rounded if rounded is not None and rounded.op_type == "DynamicQuantizeLinear" else None


def _multiply(
    found: Wiring, node: onnx.NodeProto, rounded: onnx.NodeProto, integers: str, scale: str
) -> None:
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    values, step, zero_point = rounded.output
    out, name = node.output[0], node.name
    steps = [
        ("MatMulInteger", [values, integers, zero_point], f"{out}_sums"),
        ("Cast", [f"{out}_sums"], f"{out}_sums_float"),
        ("Mul", [step, scale], f"{out}_scale"),
        ("Mul", [f"{out}_sums_float", f"{out}_scale"], f"{out}_product" if bias else out),
    ]
    if bias:
        steps.append(("Add", [f"{out}_product", bias], out))
    nodes = found.graph.node
    place = list(nodes).index(node)
    del nodes[place]
    for offset, (operator, inputs, output) in enumerate(steps):
        made = helper.make_node(operator, inputs, [output], f"{name}_{offset}")
        if operator == "Cast":
            made.attribute.append(helper.make_attribute("to", onnx.TensorProto.FLOAT))
        nodes.insert(place + offset, made)
