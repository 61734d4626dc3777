"""Operators that work on each element alone, and constants."""

from torch import fx

from tinier.graph.axes import UNIT
from tinier.graph.rules.base import Axes, Flow, Result, rule

POINTWISE = """
abs acos acosh add addcdiv addcmul alias angle asin asinh atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not
bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min clone contiguous copy
copysign cos cosh deg2rad detach div dropout dropout2d elu eq erf erfc erfinv exp exp2 expm1 fill floor floor_divide
fmax fmin fmod frac ge gelu gt hardshrink hardsigmoid hardswish hardtanh heaviside isfinite isinf isnan le leaky_relu
lerp lift_fresh_copy log log10 log1p log2 log_sigmoid logaddexp logical_and logical_not logical_or logical_xor logit
lt masked_fill maximum minimum mish mul nan_to_num ne neg nextafter polar pow rad2deg reciprocal relu relu6 remainder
round rrelu rsqrt rsub selu sgn sigmoid sign silu sin sinc sinh softplus softshrink softsign sqrt square sub tan tanh
threshold to to_copy _to_copy true_divide trunc where xlogy zero feature_dropout alpha_dropout
_conj resolve_conj resolve_neg complex real imag __and__ __or__ __xor__ fake_quantize_per_tensor_affine
ones_like zeros_like full_like empty_like subtract
multiply divide negative greater less greater_equal less_equal not_equal arctan arctan2
special_erf special_expit special_log1p clip absolute
"""

CONSTANT = """
full zeros ones empty new_full new_zeros new_ones new_empty scalar_tensor
"""
DRAWN = """
rand_like randn_like randint_like bernoulli rrelu_with_noise normal uniform exponential multinomial poisson
"""
ORDERED = """
linspace eye tril_indices triu_indices randn rand randperm logspace
"""


@rule(*POINTWISE.split())
def pointwise(flow: Flow, node: fx.Node) -> Result:
    """Every operand broadcasts against the others: aligned axes are the same."""
    operands = [flow.of(source) for source in node.all_input_nodes]
    rank = node.meta["val"].ndim
    axes = flow.broadcast(node, operands, rank)
    return [
        flow.free(node, dim) if axis == UNIT and not flow.fixed(node, dim) else axis
        for dim, axis in enumerate(axes)
    ]


@rule("prelu", "_prelu_kernel")
def prelu(flow: Flow, node: fx.Node) -> Result:
    """The slopes, if more than one, belong to dimension 1."""
    axes, weight = (flow.of(argument) for argument in node.args[:2])
    if flow.shape(node.args[1])[0:1] == [1] or not weight:  # type: ignore[arg-type]
        return list(axes)
    slopes = weight[0] if len(weight) == 1 else weight[1]
    flow.same(node, axes[1], slopes)
    return list(axes)


@rule(*CONSTANT.split())
def constant(flow: Flow, node: fx.Node) -> Result:
    """The same value everywhere: an axis that may have any size."""
    return [flow.free(node, dim) for dim in range(node.meta["val"].ndim)]


@rule("type_as")
def type_as(flow: Flow, node: fx.Node) -> Result:
    """The first operand; of the other only the type counts."""
    return list(flow.of(node.args[0]))


@rule(*DRAWN.split())
def drawn(flow: Flow, node: fx.Node) -> Result:
    """Random values are drawn position by position: with fewer positions the others would get other values."""
    flow.pin_all(node, "random values are drawn position by position")
    return flow.opaque(node, "random values are drawn position by position")


@rule(*ORDERED.split())
def ordered(flow: Flow, node: fx.Node) -> Result:
    """Values that depend on the position: no position may leave."""
    return flow.opaque(node, "its values depend on the position")


@rule("tril", "triu")
def triangle(flow: Flow, node: fx.Node) -> Result:
    """The last two dimensions are compared by position."""
    axes: Axes = list(flow.of(node.args[0]))
    for axis in axes[-2:]:
        flow.pin(node, axis, "the triangle depends on the position")
    return axes
