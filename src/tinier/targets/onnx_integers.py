"""Integer weights that stand alone in an ONNX file, in the forms that runtimes have kernels for.

ONNX Runtime fuses ``DequantizeLinear → MatMul`` into ``MatMulNBits``, and OpenVINO keeps the integers in its kernels, where the weight is
(inputs, outputs) and has scales for blocks of inputs; other layouts are dequantized at every run. Integers of up to four bits become INT4
or UINT4, two in a byte. Rows of an embedding are dequantized after they were looked up, not the whole table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

BLOCKS = (128, 64, 32, 16)  # that kernels have; the largest that divides what shares a scale
# What ONNX Runtime fuses with a Gemm before it.
ACTIVATIONS = {"Elu", "HardSigmoid", "LeakyRelu", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign"}
ACTIVATIONS |= {"Tanh", "ThresholdedRelu"}


@dataclass
class _Weight:
    """A dequantized constant: q (rows, columns), s and z (rows, G), and whether the graph has it (columns, rows)."""

    node: onnx.NodeProto
    integers: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    transposed: bool


class Wiring:
    """A model's graph with who makes and who reads each value."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.ranks = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in [*model.graph.value_info, *model.graph.output]
        }
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self.maker: dict[str, onnx.NodeProto] = {}
        for node in model.graph.node:
            for name in node.output:
                self.maker[name] = node
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.constants[name])

    def add(self, tensor: onnx.TensorProto) -> str:
        self.graph.initializer.append(tensor)
        self.constants[tensor.name] = tensor
        return str(tensor.name)

    def weights(self) -> Iterator[_Weight]:
        """Constants of two dimensions that are dequantized with one scale a row, a column or a group of columns."""
        for node in list(self.graph.node):
            if node.op_type != "DequantizeLinear" or node.input[0] not in self.constants:
                continue
            integers, scale = self.array(node.input[0]), self.array(node.input[1])
            if integers.ndim != 2 or integers.dtype not in (np.int8, np.uint8):
                continue
            zero = np.zeros(scale.shape, integers.dtype)
            if len(node.input) > 2:
                zero = self.array(node.input[2]).astype(integers.dtype)
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1) % 2
            transposed = scale.ndim == 1 and axis == 1
            if scale.ndim == 1:
                scale, zero = scale[:, None], zero[:, None]
                integers = integers.T if transposed else integers
            elif scale.ndim != 2:
                continue
            yield _Weight(node, integers, scale, zero, transposed)


def compact(model: onnx.ModelProto) -> None:
    """Rewrite, in place, integer weights that float operators read.

    Weights whose other operand is quantized, too, stay as they are: runtimes fuse those pairs into integer operators.

    Cost:
        A copy of each weight.
    """
    found = Wiring(model)
    changed = False
    for weight in list(found.weights()):
        changed |= _products(found, weight) | _lookups(found, weight)
    if changed:
        drop_dead(model)


def _products(found: Wiring, weight: _Weight) -> bool:
    """Products x · Wᵀ and x · W with this weight read (inputs, outputs) with blocks of inputs."""
    readers = []
    value = weight.node.output[0]
    for node in found.readers.get(value, []):
        if node.op_type == "Transpose" and not weight.transposed:
            readers += [(user, node) for user in found.readers.get(node.output[0], [])]
        else:
            readers.append((node, node))
    chosen = [
        node
        for node, through in readers
        if _multiplies(found, node, through.output[0] if through is not node else value)
        and outputs_are_rows(node, through is not node, weight.transposed)
    ]
    columns = weight.integers.shape[1]
    groups = weight.scale.shape[1]
    block = next((b for b in BLOCKS if columns // groups % b == 0), 0)
    if not chosen or not block:
        return False
    repeat = columns // block // groups
    stem = weight.node.input[0].removesuffix("_integers")
    nibble = fits_nibble(weight.integers, weight.zero_point)
    names = [
        found.add(integer_tensor(weight.integers.T, _by_inputs(weight), nibble)),
        found.add(
            numpy_helper.from_array(
                np.ascontiguousarray(weight.scale.repeat(repeat, 1).T), f"{stem}_blocks_scale"
            )
        ),
    ]
    zero = weight.zero_point.repeat(repeat, 1).T
    if zero.any():
        names.append(found.add(integer_tensor(zero, f"{stem}_blocks_zero_point", nibble)))
    output = f"{stem}_by_inputs_dequantized"
    made = helper.make_node(
        "DequantizeLinear",
        names,
        [output],
        f"{weight.node.name}_by_inputs",
        axis=0,
        block_size=block,
    )
    nodes = found.graph.node
    nodes.insert(list(nodes).index(weight.node), made)
    for node in chosen:
        _multiply(found, node, output)
    return True


def _by_inputs(weight: _Weight) -> str:
    """Name of the integers (inputs, outputs) that products read."""
    return weight.node.input[0].removesuffix("_integers") + "_by_inputs"


def _multiplies(found: Wiring, node: onnx.NodeProto, value: str) -> bool:
    if node.op_type not in ("MatMul", "Gemm") or len(node.input) < 2 or node.input[1] != value:
        return False
    other = found.maker.get(node.input[0])
    return other is None or other.op_type != "DequantizeLinear"


def outputs_are_rows(node: onnx.NodeProto, through: bool, transposed: bool) -> bool:
    """Whether the weight's rows, as `_Weight` has them, are the product's outputs."""
    attributes = {a.name: a for a in node.attribute}
    if node.op_type == "Gemm":
        plain = all(attributes[n].f == 1 for n in ("alpha", "beta") if n in attributes)
        flipped = bool("transB" in attributes and attributes["transB"].i)
        if not plain or ("transA" in attributes and attributes["transA"].i):
            return False
        return (flipped != through) != transposed
    return through != transposed


def _multiply(found: Wiring, node: onnx.NodeProto, weight: str) -> None:
    """The product reads ``weight`` (inputs, outputs); a Gemm becomes a MatMul and an Add."""
    nodes = found.graph.node
    if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]:
        product = f"{node.output[0]}_product"
        # ONNX Runtime makes one operator of product, Add and activation function, which then dequantizes at every run: not of Sum.
        active = {reader.op_type for reader in found.readers.get(node.output[0], [])} & ACTIVATIONS
        add = helper.make_node(
            "Sum" if active else "Add",
            [product, node.input[2]],
            list(node.output),
            f"{node.name}_bias",
        )
        nodes.insert(list(nodes).index(node) + 1, add)
        fresh = helper.make_node("MatMul", [node.input[0], weight], [product], node.name)
    else:
        fresh = helper.make_node("MatMul", [node.input[0], weight], list(node.output), node.name)
    node.CopyFrom(fresh)


def _lookups(found: Wiring, weight: _Weight) -> bool:
    """Rows are looked up as integers and dequantized then: s[i] · (q[i] − z[i])."""
    value = weight.node.output[0]
    lookups = [
        node
        for node in found.readers.get(value, [])
        if node.op_type == "Gather"
        and node.input[0] == value
        and next((a.i for a in node.attribute if a.name == "axis"), 0) == 0
    ]
    ranks = [found.ranks.get(node.output[0]) for node in lookups]
    groups = weight.scale.shape[1]
    if not lookups or weight.transposed or (groups > 1 and None in ranks):
        return False
    stem = weight.node.input[0].removesuffix("_integers")
    table, packed = _table(found, weight, stem)
    # A table that is the weight of a product, too, is stored once, (columns, rows), and transposed when the file is opened; ONNX Runtime
    # has its kernels for products whose constant nothing else reads.
    tied = not packed and _by_inputs(weight) in found.constants
    scale = found.add(numpy_helper.from_array(weight.scale, f"{stem}_rows_scale"))
    zero = ""
    if weight.zero_point.any():
        zeros = weight.zero_point.astype(np.float32)
        zero = found.add(numpy_helper.from_array(zeros, f"{stem}_rows_zero_point"))
    for number, (node, rank) in enumerate(zip(lookups, ranks, strict=True)):
        made = _Steps(found, node, f"{node.output[0]}_lookup_{number}")
        at = node.input[1]
        whole = made("Transpose", _by_inputs(weight), perm=[1, 0]) if tied else table
        rows = made("Gather", whole, at)
        if packed:
            rows = _unpacked(made, rows, weight.integers.dtype == np.int8)
        rows = made("Cast", rows, to=onnx.TensorProto.FLOAT)
        if groups > 1:
            shape = [0] * (int(rank or 0) - 1)
            rows = made("Reshape", rows, made.constant([*shape, groups, -1]))
        last = made.constant([-1]) if groups > 1 else ""

        def own(name: str, made: _Steps = made, last: str = last, at: str = at) -> str:
            row = made("Gather", name, at)
            return made("Unsqueeze", row, last) if last else row

        if zero:
            rows = made("Sub", rows, own(zero))
        rows = made("Mul", rows, own(scale))
        if groups > 1:
            rows = made("Reshape", rows, made.constant([*shape, weight.integers.shape[1]]))
        made.instead(rows)
    return True


def _table(found: Wiring, weight: _Weight, stem: str) -> tuple[str, bool]:
    """Name of the integers to look rows up in, and whether two are in a byte: the first half of a row low, the second high."""
    columns = weight.integers.shape[1]
    if not fits_nibble(weight.integers, weight.zero_point) or columns % 2:
        return weight.node.input[0], False
    nibbles = (weight.integers.astype(np.int16) & 0xF).astype(np.uint8)
    halves = nibbles[:, : columns // 2] | (nibbles[:, columns // 2 :] << 4)
    return found.add(numpy_helper.from_array(halves, f"{stem}_packed")), True


def _unpacked(made: "_Steps", rows: str, signed: bool) -> str:
    """Bytes with two integers each → the integers. In arithmetic of 32 bits: OpenVINO's shift of bytes gives other numbers."""
    wide = made("Cast", rows, to=onnx.TensorProto.INT32)
    sixteen = made.constant(16, np.int32)
    both = made("Concat", made("Mod", wide, sixteen), made("Div", wide, sixteen), axis=-1)
    if not signed:
        return both
    # Of two's complement: 0 … 7 stay, 8 … 15 become −8 … −1.
    eight = made.constant(8, np.int32)
    return made("Sub", made("Mod", made("Add", both, eight), sixteen), eight)


class _Steps:
    """Operators in place of one node."""

    def __init__(self, found: Wiring, node: onnx.NodeProto, base: str) -> None:
        self.found, self.node, self.base = found, node, base
        self.made: list[onnx.NodeProto] = []

    def __call__(self, operator: str, *inputs: str, **attributes: Any) -> str:
        output = f"{self.base}_{len(self.made)}"
        # The exporter counts operators of a kind: node_embedding, node_embedding_1.
        name = f"{self.node.name}_step_{len(self.made)}"
        self.made.append(helper.make_node(operator, inputs, [output], name, **attributes))
        return output

    def constant(self, value: object, dtype: type = np.int64) -> str:
        name = f"{self.base}_{len(self.made)}_{len(self.found.constants)}"
        return self.found.add(numpy_helper.from_array(np.array(value, dtype), name))

    def instead(self, result: str) -> None:
        """Put the operators where the node is; the last one gives its output."""
        assert self.made[-1].output[0] == result
        self.made[-1].output[0] = self.node.output[0]
        nodes = self.found.graph.node
        place = list(nodes).index(self.node)
        del nodes[place]
        for offset, one in enumerate(self.made):
            nodes.insert(place + offset, one)


def integer_tensor(values: np.ndarray, name: str, nibble: bool) -> onnx.TensorProto:
    """Integers as a constant, of four bits each where ``nibble`` says that they fit those."""
    values = np.ascontiguousarray(values)
    if not nibble:
        return numpy_helper.from_array(values, name)
    signed = values.dtype == np.int8
    nibbles = values.reshape(-1).astype(np.uint8) & 0xF
    if len(nibbles) % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    kind = onnx.TensorProto.INT4 if signed else onnx.TensorProto.UINT4
    packed = (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8)
    return onnx.TensorProto(name=name, data_type=kind, dims=values.shape, raw_data=packed.tobytes())


def fits_nibble(integers: np.ndarray, zero_point: np.ndarray) -> bool:
    """Whether int8 or uint8 integers and their zero points fit four bits."""
    low = min(int(integers.min()), int(zero_point.min()))
    high = max(int(integers.max()), int(zero_point.max()))
    return low >= -8 and high <= 7 if integers.dtype == np.int8 else high <= 15


def drop_dead(model: onnx.ModelProto) -> None:
    """Without nodes and constants that nothing reads any more."""
    graph = model.graph
    while True:
        used = {value.name for value in graph.output}
        used.update(name for node in graph.node for name in node.input)
        dead = [node for node in graph.node if not any(name in used for name in node.output)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
