"""The activation functions of a network, and the network with some of them replaced by straight lines."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tinier.graph.macs import module_path
from tinier.graph.rules import argument, operator_name
from tinier.graph.trace import Traced

FUNCTIONS = """
relu relu6 hardtanh gelu silu hardswish tanh sigmoid hardsigmoid elu celu selu leaky_relu prelu mish softplus rrelu softsign
log_sigmoid hardshrink softshrink threshold
"""
# What people write activation functions of: with one of these inside, a product of functions of one tensor is such a function.
BENT = {*FUNCTIONS.split(), "erf", "where", "maximum", "clamp", "clamp_min"}
NUMBERS = {"zeros_like", "zeros", "full", "full_like", "scalar_tensor", "ones_like"}
_STEPS = """
mul div add sub rsub neg pow exp square sign abs gt ge lt le logical_not to _to_copy clone
"""
STEPS = {*BENT, *_STEPS.split()}
WRITTEN = (
    "mul",
    "where",
    "maximum",
    "clamp",
    "clamp_min",
)  # the last step of a function that is written by hand
# Behind these, dimension 1 has the channels.
IMAGES = ("conv", "_conv", "batch_norm", "group_norm", "instance_norm", "max_pool", "avg_pool")


@dataclass(frozen=True, eq=False)
class Activation:
    """One use of an activation function.

    Attributes:
        name: the module that it comes from, and a number where there are several.
        node: in the traced graph, whose value is the function's.
        source: the node that it is a function of.
        inside: what computes it, from the source to ``node``; nothing else uses what lies between.
        dim: the dimension of its channels.
        channels: how many there are.
    """

    name: str
    node: fx.Node
    source: fx.Node
    inside: frozenset[fx.Node]
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

    Those that are written by hand are found, too: ``x * sigmoid(x)``, ``x.clamp(min=0)``, ``torch.maximum(x, zero)``,
    ``torch.where(x > 0, x, 0)``, the tanh form of GELU. Functions that change their input in place while others read it are left out, and
    so are those on tensors without channels.
    """
    roots: dict[fx.Node, tuple[fx.Node, ...]] = {}
    functions: dict[fx.Node, tuple[fx.Node, frozenset[fx.Node]]] = {}
    for node in traced.module.graph.nodes:
        if node.op != "call_function":
            continue
        roots[node] = _roots(node, roots)
        found = _function(node, roots)
        if found is not None:
            for inner in found[1]:  # of which this is made
                functions.pop(inner, None)
            functions[node] = found
    taken: dict[str, int] = {}
    result = []
    for node, (source, inside) in functions.items():
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.ndim < 2:
            continue
        dim = 1 if value.ndim > 2 and _of_image(source) else value.ndim - 1
        length = value.shape[dim]
        if not isinstance(length, int):
            continue
        base = module_path(node) or operator_name(node)
        taken[base] = taken.get(base, 0) + 1
        name = base if taken[base] == 1 else f"{base}#{taken[base]}"
        result.append(Activation(name, node, source, inside, dim, length))
    return tuple(result)


def _roots(node: fx.Node, known: Mapping[fx.Node, tuple[fx.Node, ...]]) -> tuple[fx.Node, ...]:
    """Tensors that a node is an entrywise function of, each alone: itself, and what all of its operands are functions of."""
    operands = [item for item in node.all_input_nodes if not _is_number(item)]
    if operator_name(node) not in STEPS or not operands:
        return (node,)
    if any(not _alike(item, node) for item in operands):
        return (node,)
    shared = known.get(operands[0], (operands[0],))
    for item in operands[1:]:
        others = known.get(item, (item,))
        shared = tuple(root for root in shared if root in others)
    return (node, *shared)


def _function(
    node: fx.Node, roots: Mapping[fx.Node, tuple[fx.Node, ...]]
) -> tuple[fx.Node, frozenset[fx.Node]] | None:
    """What a node is an activation function of, and the nodes that compute it; None where it is none."""
    name, target = operator_name(node), node.target
    first = node.args[0] if node.args else None
    if name in FUNCTIONS.split() and isinstance(first, fx.Node):
        if target._schema.is_mutable and len(first.users) > 1:  # type: ignore[union-attr]
            return None
        return first, frozenset([node])
    if name not in WRITTEN or len(roots[node]) < 2:
        return None
    if name.startswith("clamp") and argument(node, 1, "min") not in (0, 0.0):
        return None  # a limit, such as that of a deviation
    source = roots[node][1]
    inside: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one not in inside and one is not source:
            inside.add(one)
            waiting += [item for item in one.all_input_nodes if not _is_number(item)]
    bent = any(operator_name(one) in BENT for one in inside)
    writes = any(one.target._schema.is_mutable for one in inside)  # type: ignore[union-attr]
    own = all(set(one.users) <= inside for one in inside if one is not node)
    return (source, frozenset(inside)) if bent and own and not writes else None


def _is_number(node: fx.Node) -> bool:
    """Whether it is one number, or a tensor that is filled with one."""
    value = node.meta.get("val")
    if node.op == "call_function":
        made = (
            isinstance(value, Tensor)
            and value.ndim == 0
            and all(map(_is_number, node.all_input_nodes))
        )
        return made or operator_name(node) in NUMBERS
    return node.op == "get_attr" and isinstance(value, Tensor) and value.numel() == 1


def _alike(left: fx.Node, right: fx.Node) -> bool:
    shapes = [getattr(node.meta.get("val"), "shape", None) for node in (left, right)]
    return shapes[0] is not None and str(shapes[0]) == str(shapes[1])


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
    traced: Traced, lines: Mapping[Activation, Line], inputs: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    """The reference of linearizing: the original graph with the values of some functions computed by lines.

    Args:
        traced: the original network.
        lines: activation → its line.
        inputs: input name → tensor.

    Returns:
        The outputs.

    Cost:
        One run of the original network.
    """
    interpreter = _Straight(traced.module, lines)
    with torch.no_grad():
        return tuple(interpreter.run(*(inputs[name] for name in traced.inputs)))


class Watched(fx.Interpreter):
    """Runs a graph and keeps what goes into some activations until it is asked for.

    Attributes:
        found: node of an activation → the activation.
        given: source → its value.
    """

    def __init__(self, module: fx.GraphModule, found: Iterable[Activation]) -> None:
        super().__init__(module)
        self.found = {one.node: one for one in found}
        self.sources = {one.source for one in self.found.values()}
        self.given: dict[fx.Node, Tensor] = {}

    def run_node(self, node: fx.Node) -> Any:
        """The value of a node."""
        value = super().run_node(node)
        if node in self.sources:
            self.given[node] = value
        return value


class _Straight(Watched):
    def __init__(self, module: fx.GraphModule, lines: Mapping[Activation, Line]) -> None:
        super().__init__(module, lines)
        self.lines = lines

    def run_node(self, node: fx.Node) -> Any:
        one = self.found.get(node)
        if one is None:
            return super().run_node(node)
        value = self.lines[one](self.given[one.source], one.dim)
        if node in self.sources:
            self.given[node] = value
        return value
