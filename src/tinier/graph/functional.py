"""Writes in place that nobody looks at through another name become ordinary operators.

A graph that writes into the output of a softmax computes the right thing and cannot be trained, for the softmax's gradient needs what was
there before; a class avoids this with an autograd function of its own, which no graph shows.
"""

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
# What they return is new, and no view; of others the schema does not always say so.
_FRESH = """
    linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution addmm baddbmm mm bmm matmul addbmm
    scaled_dot_product_attention batch_norm layer_norm group_norm instance_norm rms_norm native_layer_norm native_group_norm
    add sub mul div rsub pow neg abs square sqrt rsqrt exp log sin cos tanh sigmoid erf reciprocal clamp maximum minimum where
    relu relu6 gelu silu elu leaky_relu hardswish hardsigmoid hardtanh mish softplus celu selu prelu softmax _softmax log_softmax
    sum mean var std amax amin max_pool1d max_pool2d avg_pool2d adaptive_avg_pool2d cat stack embedding gather cumsum masked_fill
    index_select clone zeros zeros_like ones ones_like full full_like empty empty_like arange rand randn rand_like randn_like
    new_zeros new_ones new_full new_empty
"""
FRESH = frozenset(_FRESH.split())


def without_writes(module: fx.GraphModule) -> None:
    """Replace, in place, operators that write into a tensor of the graph's own by those that return a new one.

    Only where the tensor was just computed, and nothing is a view of it.

    Args:
        module: a traced graph; nodes have their values in ``meta``.

    Cost:
        One pass over the nodes.
    """
    changed = False
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        plain = _plain_operator(node)
        if plain is None or not _is_own(node, node.args[0]):
            continue
        base = node.args[0]
        for user in list(base.users):
            if order[user] > order[node]:
                user.replace_input_with(base, node)
        node.target = plain
        changed = True
    if changed:
        module.recompile()


def _plain_operator(node: fx.Node) -> Any:
    """The operator without the write, where there is one that takes the same arguments; else None."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    schema = target._schema
    name = schema.name.removeprefix("aten::")
    if not schema.is_mutable or not name.endswith("_") or name.endswith("__") or not node.args:
        return None
    packet = getattr(aten, name[:-1], None)
    plain = getattr(packet, target._overloadname, None) if packet is not None else None
    if plain is None or len(plain._schema.returns) != 1 or plain._schema.is_mutable:
        return None
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    same = [(a.name, str(a.type)) for a in plain._schema.arguments] == [
        (a.name, str(a.type)) for a in schema.arguments
    ]
    return plain if same and written[0] and sum(written) == 1 else None


def _is_own(node: fx.Node, base: Any) -> bool:
    """Whether what is written to is a tensor that an operator made, of which there is no other view."""
    if not isinstance(base, fx.Node) or base.op != "call_function" or _aliases(base):
        return False
    if any(_aliases(user) for user in base.users if user is not node):
        return False
    value: Any = base.meta.get("val")
    others = [n.meta.get("val") for n in node.all_input_nodes if n is not base]
    if not isinstance(value, Tensor):
        return False
    # The result has the type of what is written to; the plain operator's follows its operands.
    return all(
        not isinstance(other, Tensor) or other.dtype in (value.dtype, torch.bool)
        for other in others
    ) and (value.is_floating_point() or value.is_complex())


def _aliases(node: fx.Node) -> bool:
    """Whether a node's result may be its input, or a view of it."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op != "output"
    name = node.target._schema.name.removeprefix("aten::")
    return (name.removesuffix("_") if node.target._schema.is_mutable else name) not in FRESH
