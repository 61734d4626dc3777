"""The activation functions of a network, and the network with some of them replaced by straight lines."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tinier.graph.macs import module_path
from tinier.graph.rules import operator_name
from tinier.graph.trace import Traced

FUNCTIONS = """
relu relu6 hardtanh gelu silu hardswish tanh sigmoid hardsigmoid elu celu selu leaky_relu prelu mish softplus rrelu softsign
log_sigmoid hardshrink softshrink threshold
"""
# Behind these, dimension 1 has the channels.
IMAGES = ("conv", "_conv", "batch_norm", "group_norm", "instance_norm", "max_pool", "avg_pool")


@dataclass(frozen=True, eq=False)
class Activation:
    """One use of an activation function.

    Attributes:
        name: the module that it comes from, and a number where there are several.
        node: in the traced graph.
        dim: the dimension of its channels.
        channels: how many there are.
    """

    name: str
    node: fx.Node
    dim: int
    channels: int


@dataclass(frozen=True)
class Line:
    """y = slope · x + intercept for each channel; both (channels,)."""

    slope: Tensor
    intercept: Tensor

    def __call__(self, x: Tensor, dim: int) -> Tensor:
        """The line of each channel; ``dim`` is the dimension of the channels."""
        shape = [1] * x.ndim
        shape[dim] = -1
        return x * self.slope.to(x).view(shape) + self.intercept.to(x).view(shape)


def activations(traced: Traced) -> tuple[Activation, ...]:
    """Every activation function that works on whole channels, in the order of the graph.

    Functions that change their input in place while others read it are left out, and so are those on tensors without channels.
    """
    functions = set(FUNCTIONS.split())
    taken: dict[str, int] = {}
    result = []
    for node in traced.module.graph.nodes:
        if node.op != "call_function" or operator_name(node) not in functions:
            continue
        source, value = node.args[0], node.meta.get("val")
        if not isinstance(source, fx.Node) or not isinstance(value, Tensor) or value.ndim < 2:
            continue
        if node.target._schema.is_mutable and len(source.users) > 1:
            continue
        dim = 1 if value.ndim > 2 and _of_image(source) else value.ndim - 1
        length = value.shape[dim]
        if not isinstance(length, int):
            continue
        base = module_path(node) or operator_name(node)
        taken[base] = taken.get(base, 0) + 1
        name = base if taken[base] == 1 else f"{base}#{taken[base]}"
        result.append(Activation(name, node, dim, length))
    return tuple(result)


def _of_image(node: fx.Node) -> bool:
    """Whether the nearest operator before that says where channels are says dimension 1."""
    for _ in range(8):
        name = operator_name(node) if node.op == "call_function" else ""
        if name.startswith(IMAGES):
            return True
        if name in ("linear", "matmul", "layer_norm", "rms_norm", "addmm", "bmm", "mm", "permute", "transpose"):  # fmt: skip
            return False
        if not node.all_input_nodes or node.op != "call_function":
            return False
        node = node.all_input_nodes[0]
    return False


def straightened(
    traced: Traced, lines: Mapping[fx.Node, tuple[Line, int]], inputs: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    """The reference of linearizing: the original graph with the values of some nodes computed by lines.

    Args:
        traced: the original network.
        lines: node of an activation → its line and the dimension of its channels.
        inputs: input name → tensor.

    Returns:
        The outputs.

    Cost:
        One run of the original network.
    """
    interpreter = _Straight(traced.module, lines)
    with torch.no_grad():
        return tuple(interpreter.run(*(inputs[name] for name in traced.inputs)))


class _Straight(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, lines: Mapping[fx.Node, tuple[Line, int]]) -> None:
        super().__init__(module)
        self.lines = lines

    def run_node(self, node: fx.Node) -> Any:
        if node not in self.lines:
            return super().run_node(node)
        line, dim = self.lines[node]
        source: Any = node.args[0]
        return line(self.env[source], dim)
