"""Operators that contract axes: linear layers, matrix products, convolutions and attention."""

from typing import Any

from torch import fx

from tinier.graph.axes import UNIT, Axis, Product, fresh, mark, product, resolve, size
from tinier.graph.rules.base import Axes, Flow, Result, argument, hint, operator_name, rule

KERNEL = "a kernel's spatial extent"
ATTENTION = (
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
REGROUPING = frozenset(
    ("view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "to", "index", "index_select", "select")
)  # fmt: skip
SPATIAL = "spatial"


@rule("linear")
def linear(flow: Flow, node: fx.Node) -> Result:
    """y[…, m] = Σₖ x[…, k] w[m, k] + b[m]."""
    x, weight = flow.of(node.args[0]), flow.of(node.args[1])
    bias = flow.of(argument(node, 2, "bias"))
    flow.same(node, x[-1], weight[-1])
    if len(weight) == 1:
        return x[:-1]
    if bias:
        flow.same(node, weight[0], bias[0])
    return [*x[:-1], weight[0]]


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot")
def matmul(flow: Flow, node: fx.Node) -> Result:
    """y[…, n, m] = Σₖ a[…, n, k] b[…, k, m]; the leading axes broadcast."""
    return _matmul(flow, node, flow.of(node.args[0]), flow.of(node.args[1]))


@rule("addmm", "baddbmm", "addmv")
def addmm(flow: Flow, node: fx.Node) -> Result:
    """A matrix product and something that broadcasts onto it."""
    result = _matmul(flow, node, flow.of(node.args[1]), flow.of(node.args[2]))
    flow.broadcast(node, [result, flow.of(node.args[0])], len(result))
    return result


def _matmul(flow: Flow, node: fx.Node, left: Axes, right: Axes) -> Axes:
    flow.same(node, left[-1], right[-2] if len(right) > 1 else right[-1])
    leading = flow.broadcast(node, [left[:-2], right[:-2]], max(len(left) - 2, len(right) - 2, 0))
    _note_heads(flow, node, left, right)
    return [
        *leading,
        *(left[-2:-1] if len(left) > 1 else []),
        *(right[-1:] if len(right) > 1 else []),
    ]


def _note_heads(flow: Flow, node: fx.Node, left: Axes, right: Axes) -> None:
    """A product of two activations, batched over more than the batch, is attention: its other batch axes are heads."""
    if any(_is_weight(source) for source in node.all_input_nodes):
        return
    if len(left) == len(right) == 4:
        heads = (left[1], right[1])
    elif len(left) == len(right) == 3 and isinstance(folded := resolve(left[0]), Product):
        heads = (product(*folded.factors[1:]), product(*folded.factors[1:]))
    else:
        return
    if size(heads[0]) == 1:
        return
    for axis in heads:
        mark(axis, "head")
    for axis in (*left[-2:], *right[-2:]):
        mark(axis, "head_dim")
    flow.heads[node] = heads


def _is_weight(node: Any) -> bool:
    """Whether a tensor is a parameter, or a choice of its rows, regrouped."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if operator_name(node) not in REGROUPING:
            return False
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "get_attr"


@rule("einsum")
def einsum(flow: Flow, node: fx.Node) -> Result:
    """Axes with the same letter are the same; an ellipsis stands for leading axes, which broadcast."""
    operands = [flow.of(source) for source in node.args[1]]  # type: ignore[union-attr]
    inputs, output = letters(str(node.args[0]), [len(axes) for axes in operands])
    known: dict[str, Axis] = {}
    for names, axes in zip(inputs, operands, strict=True):
        for name, axis in zip(names, axes, strict=True):
            before = known.get(name, UNIT)
            if before == UNIT:
                known[name] = axis
            elif axis != UNIT:
                flow.same(node, before, axis)
    _note_batched(flow, node, inputs, output, known)
    return [known[name] for name in output]


def letters(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """An equation of ``einsum`` with a letter for each dimension of each operand, and the letters of the result.

    Args:
        equation: with or without "->", with or without ellipses.
        ranks: of the operands.
    """
    equation = equation.replace(" ", "")
    left, arrow, output = equation.partition("->")
    terms = left.split(",")
    free = [chr(code) for code in range(0x3B1, 0x3B1 + 24)]  # greek: no letter of an equation
    most = 0
    for place, (term, rank) in enumerate(zip(terms, ranks, strict=True)):
        if "..." in term:
            more = rank - len(term) + 3
            most = max(most, more)
            terms[place] = term.replace("...", "".join(free[:more][::-1]))
    dots = "".join(free[:most][::-1])
    if arrow:
        return terms, output.replace("...", dots)
    every = "".join(terms)
    once = sorted(name for name in set(every) if every.count(name) == 1 and name not in dots)
    return terms, dots + "".join(once)


def _note_batched(
    flow: Flow, node: fx.Node, inputs: list[str], output: str, known: dict[str, Axis]
) -> None:
    """A product of two activations with the same two batch letters, one of them the batch, is attention."""
    if len(inputs) != 2 or any(_is_weight(source) for source in node.args[1]):  # type: ignore[union-attr]
        return
    shared = [name for name in inputs[0] if name in inputs[1] and name in output]
    if len(shared) != 2 or len(inputs[0]) != 4 or len(inputs[1]) != 4:
        return
    for name in {*inputs[0], *inputs[1]} - set(shared):
        mark(known[name], "head_dim")
    heads = known[shared[1]]
    if size(heads) > 1:
        mark(heads, "head")
        flow.heads[node] = (heads, heads)


@rule("conv1d", "conv2d", "conv3d")
def convolution(flow: Flow, node: fx.Node) -> Result:
    """y[b, g·o] = Σ x[b, g·c] ∗ w[g·o, c]: groups are the outer factor of both channel axes."""
    return _convolution(flow, node, argument(node, 6, "groups", 1), False)


@rule("convolution", "_convolution")
def any_convolution(flow: Flow, node: fx.Node) -> Result:
    """A convolution or its transpose, by an argument."""
    return _convolution(flow, node, argument(node, 8, "dim"), bool(node.args[6]))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(flow: Flow, node: fx.Node) -> Result:
    """As a convolution, with the weight w[g·c, o]."""
    return _convolution(flow, node, argument(node, 6, "groups", 1), True)


def _convolution(flow: Flow, node: fx.Node, count: int | fx.Node, transposed: bool) -> Axes:
    # One group for each example, where each has a filter of its own: their number is free.
    groups = hint(count.meta["val"]) if isinstance(count, fx.Node) else int(count)
    x, weight = flow.of(node.args[0]), flow.of(node.args[1])
    bias = flow.of(argument(node, 2, "bias"))
    channel = len(x) - len(weight) + 1  # inputs without a batch have their channels first
    outer = flow.outer[node] = fresh(groups)
    if isinstance(count, fx.Node):
        flow.pin(node, outer, "its size is free (batch or sequence)")
    for axis in weight[2:]:
        flow.pin(node, axis, KERNEL)
    for axis in x[channel + 1 :]:
        flow.pin(node, axis, SPATIAL)
    if transposed:
        flow.same(node, weight[0], product(outer, fresh(size(weight[0]) // groups)))
        flow.same(node, x[channel], weight[0])
        out = product(outer, weight[1])
    else:
        flow.same(node, x[channel], product(outer, weight[1]))
        out = weight[0]
        flow.same(node, out, product(outer, fresh(size(out) // groups)))
    if bias:
        flow.same(node, out, bias[0])
    spatial = [flow.pinned(node, dim, SPATIAL) for dim in range(channel + 1, node.meta["val"].ndim)]
    return [*x[:channel], out, *spatial]


@rule(*ATTENTION)
def attention(flow: Flow, node: fx.Node) -> Result:
    """softmax(q kᵀ · scale + mask) v; with grouped queries the query heads are key heads × queries of each."""
    query, key, value = (flow.of(source) for source in node.args[:3])
    plain = operator_name(node) == "scaled_dot_product_attention"
    names = ("attn_mask", "attn_bias")
    mask = flow.of(argument(node, 3, "attn_mask") if plain else None)
    for name in names if not plain else ():
        mask = mask or flow.of(node.kwargs.get(name))
    if not plain and "flash" not in operator_name(node):
        mask = flow.of(argument(node, 3, "attn_bias"))
    flow.same(node, query[-1], key[-1])
    flow.same(node, key[-2], value[-2])
    mark(key[-2], "normalised")  # where attention runs over channels, as in DaViT
    mark(query[-1], "head_dim")
    mark(value[-1], "head_dim")
    leading = query[:-2]
    if len(query) > 2:
        flow.same(node, key[-3], value[-3])
        heads, few = size(query[-3]), size(key[-3])
        if heads != few and few > 1:
            again = fresh(heads // few)
            mark(again, "repeated")
            flow.same(node, query[-3], product(key[-3], again))
            leading = flow.broadcast(node, [query[:-3], key[:-3], value[:-3]], len(query) - 3)
            leading = [*leading, query[-3]]
        else:
            leading = flow.broadcast(node, [query[:-2], key[:-2], value[:-2]], len(query) - 2)
        mark(query[-3], "head")
        flow.heads[node] = (query[-3], key[-3])
    if mask:
        flow.broadcast(node, [[*leading, query[-2], key[-2]], mask], len(query))
    result = [*leading, query[-2], value[-1]]
    if plain:
        return result
    others: Any = flow.opaque(node, "statistics of the attention")
    return (result, *others[1:])
