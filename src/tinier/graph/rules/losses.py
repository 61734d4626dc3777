"""Losses that a network returns beside its outputs: elementwise distances, then a mean or a sum over all positions."""

from torch import fx

from tinier.graph.axes import mark
from tinier.graph.rules.base import Flow, Result, argument, rule

LOSSES = """
mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy binary_cross_entropy_with_logits soft_margin_loss
"""
NONE, MEAN, SUM = 0, 1, 2  # torch's numbers of the reductions


def reduction(node: fx.Node) -> int:
    """How the elementwise loss is reduced, as torch numbers it."""
    names = [item.name for item in node.target._schema.arguments]  # type: ignore[union-attr]
    return int(argument(node, names.index("reduction"), "reduction", MEAN))


@rule(*LOSSES.split())
def loss(flow: Flow, node: fx.Node) -> Result:
    """Operands broadcast; a mean normalises over every position that is left."""
    operands = [flow.of(source) for source in node.all_input_nodes]
    axes = flow.broadcast(node, operands, max(len(operand) for operand in operands))
    if reduction(node) == NONE:
        return axes
    if reduction(node) == MEAN:
        for axis in axes:
            mark(axis, "normalised")
    return []
