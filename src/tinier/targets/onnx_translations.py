"""Operators that torch's ONNX exporter does not know, or writes as what runtimes compute otherwise or slowly."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import helper, numpy_helper

from tinier.targets.onnx_dynamic import rounded, rounded_rows

NEVER = -1e30


def translations(program: torch.export.ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """How the operators of the network that the exporter does not know are written."""
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    known: dict[str, Callable[..., Any]] = {
        "transformers::grouped_mm_fallback": _grouped_product,
        "aten::_grouped_mm": _grouped_product,
        "aten::_is_all_true": _all_true,
        "quantized_decomposed::dequantize_per_channel_group": _dequantized_groups,
        "tinier::round_dynamically": rounded,
        "tinier::round_tokens": rounded_rows,
        "quantized_decomposed::quantize_per_tensor": _quantized,
        "aten::rnn_tanh": _rnn_tanh,
        "aten::rnn_relu": _rnn_relu,
    }
    attention = torch.ops.aten.scaled_dot_product_attention.default
    for node in program.graph.find_nodes(op="call_function", target=attention):
        if node.args[0].meta["val"].ndim != 4:
            known["aten::scaled_dot_product_attention"] = _attention
    return {
        target: known[target._schema.name]
        for target in targets
        if isinstance(target, torch._ops.OpOverload) and target._schema.name in known
    }


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(s · q kᵀ + mask) v, of any number of dimensions; the exporter knows four."""
    from onnxscript import opset18

    op: Any = opset18
    if is_causal or enable_gqa:
        raise NotImplementedError("causal or grouped attention that is not of four dimensions")
    rank = len(query.shape)
    order = [*range(rank - 2), rank - 1, rank - 2]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scaled = op.Mul(query, op.CastLike(op.Constant(value_float=float(factor)), query))
    weights = op.MatMul(scaled, op.Transpose(key, perm=order))
    if attn_mask is None:
        return op.MatMul(op.Softmax(weights, axis=-1), value)
    # A finite number for −∞, and zeros where all is masked, as torch has them: runtimes make NaN of what they fuse.
    zero, never = (op.CastLike(op.Constant(value_float=n), weights) for n in (0.0, NEVER))
    mask = (
        op.Where(attn_mask, zero, never)
        if attn_mask.dtype == onnx_ir.DataType.BOOL
        else op.Max(attn_mask, never)
    )
    shares = op.Softmax(op.Add(weights, mask), axis=-1)
    seen = op.Greater(op.ReduceMax(mask, op.Constant(value_ints=[-1]), keepdims=1), never)
    return op.MatMul(op.Where(seen, shares, zero), value)


def _quantized(x: Any, scale: float, zero_point: int, low: int, high: int, dtype: int) -> Any:
    """Fewer integers than their type has are clamped to: QuantizeLinear goes to the ends of the type."""
    from onnxscript import opset18

    op: Any = opset18
    kind = helper.tensor_dtype_to_np_dtype(dtype)

    def constant(value: int) -> Any:
        return op.Constant(value=numpy_helper.from_array(np.array(value, kind)))

    q = op.QuantizeLinear(x, scale, constant(zero_point))
    info = np.iinfo(kind)
    return q if (low, high) == (info.min, info.max) else op.Clip(q, constant(low), constant(high))


def _dequantized_groups(
    q: Any,
    scale: Any,
    zero_point: Any,
    low: int,
    high: int,
    dtype: int,
    group: int,
    *_: Any,
    **__: Any,
) -> Any:
    """Blocks come with opset 21: ``onnx_integers`` writes their size."""
    from onnxscript import opset18

    op: Any = opset18
    return op.DequantizeLinear(q, scale, op.CastLike(zero_point, q), axis=1)


def _all_true(self: Any) -> Any:
    from onnxscript import opset18

    op: Any = opset18
    least = op.ReduceMin(op.Cast(self, to=onnx.TensorProto.INT64), keepdims=0)
    return op.Cast(least, to=onnx.TensorProto.BOOL)


def _grouped_product(input: Any, weight: Any, offs: Any, *_: Any, **__: Any) -> Any:
    """y[r] = x[r] wₑ where row r is among those of expert e: each expert's rows are cut out, multiplied and joined."""
    from onnxscript import opset18

    op: Any = opset18
    ends, zero, start = op.Cast(offs, to=onnx.TensorProto.INT64), op.Constant(value_ints=[0]), None
    pieces = []
    for expert in range(weight.shape[0]):
        here, behind = op.Constant(value_ints=[expert]), op.Constant(value_ints=[expert + 1])
        end = op.Slice(ends, here, behind, zero)
        rows = op.Slice(input, zero if start is None else start, end, zero)
        matrix = op.Squeeze(op.Slice(weight, here, behind, zero), zero)
        pieces.append(op.MatMul(rows, matrix))
        start = end
    return op.Concat(*pieces, axis=0)


def _rnn_tanh(
    input: Any,
    hx: Any,
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    return _recurrent(input, hx, params, has_biases, num_layers, bidirectional, batch_first, "Tanh")


def _rnn_relu(
    input: Any,
    hx: Any,
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    return _recurrent(input, hx, params, has_biases, num_layers, bidirectional, batch_first, "Relu")


def _recurrent(
    input: Any,
    hx: Any,
    params: Sequence[Any],
    biased: bool,
    layers: int,
    both: bool,
    batch_first: bool,
    function: str,
) -> Any:
    """ONNX's RNN. The exporter would write each step by itself, with products of integer weights whose inputs ONNX Runtime rounds."""
    from onnxscript import opset18

    op: Any = opset18
    ways, each = 2 if both else 1, 4 if biased else 2
    zero = op.Constant(value_ints=[0])

    def joined(parts: list[Any]) -> Any:
        whole = [op.Unsqueeze(part, zero) for part in parts]
        return whole[0] if len(whole) == 1 else op.Concat(*whole, axis=0)

    value = op.Transpose(input, perm=[1, 0, 2]) if batch_first else input  # (length, batch, inputs)
    last = []
    for layer in range(layers):
        own = [params[(layer * ways + way) * each :][:each] for way in range(ways)]
        bias = joined([op.Concat(p[2], p[3], axis=0) for p in own]) if biased else None
        start = op.Constant(value_ints=[layer * ways])
        end = op.Constant(value_ints=[(layer + 1) * ways])
        every, final = op.RNN(
            value,
            joined([p[0] for p in own]),
            joined([p[1] for p in own]),
            bias,
            None,
            op.Slice(hx, start, end, zero),
            activations=[function] * ways,
            direction="bidirectional" if both else "forward",
            hidden_size=hx.shape[2],
        )  # (length, ways, batch, hidden), (ways, batch, hidden)
        if both:
            shape = op.Constant(value_ints=[0, 0, -1])
            value = op.Reshape(op.Transpose(every, perm=[0, 2, 1, 3]), shape)
        else:
            value = op.Squeeze(every, op.Constant(value_ints=[1]))
        last.append(final)
    if batch_first:
        value = op.Transpose(value, perm=[1, 0, 2])
    return value, last[0] if layers == 1 else op.Concat(*last, axis=0)
