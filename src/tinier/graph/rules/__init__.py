"""One propagation rule for each operator; importing this package fills the table."""

from tinier.graph.rules import index, linear, normalise, pointwise, shape, spatial
from tinier.graph.rules.base import RULES, Flow, argument, dimension, operator_name

__all__ = [
    "RULES",
    "Flow",
    "argument",
    "dimension",
    "index",
    "linear",
    "normalise",
    "operator_name",
    "pointwise",
    "shape",
    "spatial",
]
