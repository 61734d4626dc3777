"""Products of dynamically rounded activations with integer weights: ``DynamicQuantizeLinear → MatMulInteger → Cast → Mul``.

ONNX Runtime makes one operator of the four, ``DynamicQuantizeMatMul``. With a scale for each row, which that has not, it is ``Abs →
ReduceMax → Div`` for the scales, ``Div → QuantizeLinear → MatMulInteger → Cast`` and two ``Mul``.
"""

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tinier.graph.dynamic import LARGEST, LEAST
from tinier.targets.onnx_integers import Wiring, drop_dead, outputs_are_rows

PRODUCTS = ("MatMul", "Gemm")


def rounded(x: Any) -> Any:
    """How `round_dynamically` is written."""
    from onnxscript import opset18

    op: Any = opset18
    return op.DequantizeLinear(*op.DynamicQuantizeLinear(x))


def rounded_rows(x: Any) -> Any:
    """How `round_tokens` is written: unsigned integers around 128."""
    from onnxscript import opset18

    op: Any = opset18
    greatest = op.ReduceMax(op.Abs(x), op.Constant(value_ints=[-1]), keepdims=1)
    least, largest, one = (op.Constant(value_float=float(n)) for n in (LEAST, LARGEST, 1))
    scale = op.Div(op.Max(greatest, least), largest)
    middle = op.Constant(value=numpy_helper.from_array(np.array(LARGEST + 1, np.uint8)))
    q = op.QuantizeLinear(op.Div(x, scale), one, middle)
    return op.Mul(op.DequantizeLinear(q, one, middle), scale)


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
            if not outputs_are_rows(node, flipped, weight.transposed):
                continue
            if not names:
                stem = weight.node.input[0].removesuffix("_integers")
                integers = np.ascontiguousarray(weight.integers.T)  # (inputs, outputs)
                scale = np.ascontiguousarray(weight.scale[:, 0])  # (outputs,)
                names = [
                    found.add(numpy_helper.from_array(integers, f"{stem}_by_inputs")),
                    found.add(numpy_helper.from_array(scale, f"{stem}_outputs_scale")),
                ]
            make = _multiply_rows if rounded.op_type == "Mul" else _multiply
            make(found, node, rounded, *names)
            changed = True
    if changed:
        drop_dead(model)


def _rounding(found: Wiring, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The DynamicQuantizeLinear whose integers a product reads, dequantized; or the Mul by the scales of rows behind such a pair."""
    pair = found.maker.get(node.input[0])
    if pair is not None and pair.op_type == "Mul" and _of_rows(found, pair) is not None:
        return pair
    if pair is None or pair.op_type != "DequantizeLinear":
        return None
    rounded = found.maker.get(pair.input[0])
    return rounded if rounded is not None and rounded.op_type == "DynamicQuantizeLinear" else None


def _multiply(
    found: Wiring, node: onnx.NodeProto, rounded: onnx.NodeProto, integers: str, scale: str
) -> None:
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    values, step, zero_point = rounded.output
    out = node.output[0]
    steps = [
        ("MatMulInteger", [values, integers, zero_point], f"{out}_sums"),
        ("Cast", [f"{out}_sums"], f"{out}_sums_float"),
        ("Mul", [step, scale], f"{out}_scale"),
        ("Mul", [f"{out}_sums_float", f"{out}_scale"], f"{out}_product" if bias else out),
    ]
    _instead(found, node, steps, bias)


def _of_rows(found: Wiring, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The DequantizeLinear of integers with scale 1 that a Mul by the scales of rows reads."""
    pair = found.maker.get(node.input[0])
    if pair is None or pair.op_type != "DequantizeLinear" or pair.input[1] not in found.constants:
        return None
    made = found.maker.get(pair.input[0])
    one = found.array(pair.input[1])
    alone = made is not None and made.op_type == "QuantizeLinear"
    return pair if alone and one.size == 1 and float(one.reshape(())) == 1 else None


def _multiply_rows(
    found: Wiring, node: onnx.NodeProto, scaled: onnx.NodeProto, integers: str, scale: str
) -> None:
    """Unsigned integers around 128: ONNX Runtime's kernels for signed ones are slower than float."""
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    pair = _of_rows(found, scaled)
    assert pair is not None
    out = node.output[0]
    steps = [
        ("MatMulInteger", [pair.input[0], integers, pair.input[2]], f"{out}_sums"),
        ("Cast", [f"{out}_sums"], f"{out}_sums_float"),
        ("Mul", [f"{out}_sums_float", scaled.input[1]], f"{out}_rows"),
        ("Mul", [f"{out}_rows", scale], f"{out}_product" if bias else out),
    ]
    _instead(found, node, steps, bias)


def _instead(
    found: Wiring, node: onnx.NodeProto, steps: list[tuple[str, list[str], str]], bias: str
) -> None:
    """Put operators where a product is; and its bias behind them."""
    out, name = node.output[0], node.name
    if bias:
        steps = [*steps, ("Add", [f"{out}_product", bias], out)]
    nodes = found.graph.node
    place = list(nodes).index(node)
    del nodes[place]
    for offset, (operator, inputs, output) in enumerate(steps):
        made = helper.make_node(operator, inputs, [output], f"{name}_step_{offset}")
        if operator == "Cast":
            made.attribute.append(helper.make_attribute("to", onnx.TensorProto.FLOAT))
        nodes.insert(place + offset, made)
