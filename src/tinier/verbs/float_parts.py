"""What of a quantized network computes in float, and why."""

from typing import Any

from torch import fx

from tinier.edits.quantize import Quantize, QuantizeDynamically, QuantizeWeight
from tinier.graph.dynamic import ROUND, ROUND_TOKENS
from tinier.graph.fold import fold, parameter_of, read
from tinier.graph.layers import linear_layer
from tinier.graph.macs import macs
from tinier.graph.placement import place
from tinier.graph.rules import operator_name
from tinier.graph.stored import RECURRENT, stored
from tinier.verbs.smaller import Smaller

ALONE = "its weight is integers, its product float"
UNKNOWN = "{} cannot be stored as integers: it is grouped, shared or not float32"
ASKED = "it was asked to stay float"


def integer_macs(smaller: Smaller) -> tuple[int, int]:
    """Multiply-accumulates at batch 1 of which both factors are integers, as quantize/dequantize pairs say; and all."""
    counts = macs((smaller.trainable or smaller.network).traced)
    nodes = {node.name: node for node in smaller.network.traced.module.graph.nodes}
    integer = sum(
        count for name, count in counts.items() if name in nodes and _of_integers(nodes[name])
    )
    return integer, sum(counts.values())


def _of_integers(node: fx.Node) -> bool:
    first = 1 if operator_name(node) in ("addmm", "baddbmm", "addmv") else 0
    return all(_dequantized(source) for source in node.args[first : first + 2])


def _dequantized(source: Any) -> bool:
    while isinstance(source, fx.Node) and operator_name(source) in ("t", "transpose", "permute"):
        source = source.args[0]
    if not isinstance(source, fx.Node):
        return False
    return source.target in (ROUND, ROUND_TOKENS) or operator_name(source).startswith("dequantize")


def float_operators(smaller: Smaller) -> list[tuple[str, str, str]]:
    """(node, operator, reason) of those that stay float.

    Where activations are rounded to fixed ranges, all that could have been quantized. Where they are rounded in the range of each run, and
    where weights are stored alone, what multiplies weights: by weights that are float, or, with ranges of each run, in float.
    """
    if smaller.trainable is None:
        return []
    integers = {e.tensor for e in smaller.plan.edits if isinstance(e, QuantizeWeight)}
    module = fold(smaller.trainable.traced.module)
    if any(isinstance(edit, Quantize) for edit in smaller.plan.edits):
        return place(module, lambda name: name not in integers).skipped
    dynamic = [e for e in smaller.plan.edits if isinstance(e, QuantizeDynamically)]
    rounded = {reader for edit in dynamic for reader in edit.readers}
    known = stored(module)
    result = []
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        names = [name for name in _weights(node) if (w := read(module, name)) is not None and w.ndim > 1]  # fmt: skip
        left = [name for name in names if name not in integers]
        reason = ""
        if left:
            reason = ASKED if left[0] in known else UNKNOWN.format(left[0])
        elif names and dynamic and node.name not in rounded and operator_name(node) != "embedding":
            reason = f"ranges of each run are for linear layers; {ALONE}"
        elif not names and operator_name(node) in PRODUCTS:
            reason = "both factors are activations"
        if reason:
            result.append((node.name, str(node.target), reason))
    return result


PRODUCTS = ("matmul", "bmm", "baddbmm", "scaled_dot_product_attention", "einsum")


def _weights(node: fx.Node) -> list[str]:
    """Names of the parameters that an operator multiplies or looks up."""
    operator = operator_name(node)
    if operator in RECURRENT:
        return [name for value in node.all_input_nodes if (name := parameter_of(value))]
    if operator == "embedding":
        name = parameter_of(node.args[0])
        return [name] if name else []
    layer = linear_layer(node)
    return [layer.weight] if layer is not None else []
