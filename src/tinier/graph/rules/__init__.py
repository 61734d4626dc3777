"""One propagation rule for each operator; importing this package fills the table."""

from tinier.graph.rules import (
    algebra,
    index,
    linear,
    losses,
    normalise,
    pointers,
    pointwise,
    recurrent,
    shape,
    spatial,
)
from tinier.graph.rules.base import RULES, Flow, argument, dimension, operator_name

__all__ = [
    "RULES",
    "Flow",
    "algebra",
    "argument",
    "dimension",
    "index",
    "linear",
    "losses",
    "normalise",
    "operator_name",
    "pointers",
    "pointwise",
    "recurrent",
    "shape",
    "spatial",
]
