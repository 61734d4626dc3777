"""Where NaN or infinity comes from."""

from typing import Any

import torch
from torch import Tensor, fx

from tinier.graph.rules import operator_name


class NotFinite(Exception):
    """NaN or infinity turned up; the text says where it was seen."""


def culprit(module: fx.GraphModule, inputs: list[Tensor], seen: str) -> str:
    """What made it: the first operator whose result has NaN, else the place where it was seen."""
    first: list[fx.Node] = []

    class Watch(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if not first and isinstance(value, Tensor) and value.is_floating_point():
                given = node.op in ("placeholder", "get_attr")  # there infinity is wrong, too
                bad = value.isnan() | value.isinf() if given else value.isnan()
                first.extend([node] * bool(bad.any()))
            return value

    with torch.no_grad():
        Watch(module).run(*inputs)
    if not first:
        return f"{seen}: NaN or infinity; scale the data, or exclude what makes it"
    node = first[0]
    what = {"placeholder": "input", "get_attr": "parameter"}.get(
        node.op, f"output of {operator_name(node)}"
    )
    return f"{node.name}: NaN or infinity in the {what}; remove such examples, or exclude what makes them"
