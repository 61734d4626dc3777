"""Where quantize/dequantize pairs go, so that a runtime fuses them into integer operators: one table, one pass."""

import enum
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from tinier.graph.fold import parameter_of, read, spatial

aten = torch.ops.aten


class Kind(enum.Enum):
    """What quantization does with an operator."""

    WEIGHTED = "integer input and weight"
    CLAMP = "an activation function that the quantization after it does as well"
    SAME = "only moves or picks values: scale in is scale out"
    OWN = "integer in and out, each with a scale of its own"
    BINARY = "two integer inputs and an integer output"
    JOIN = "all inputs and the output share one scale"
    FLOAT = "stays float"


@dataclass(frozen=True)
class Role:
    """One row of the table.

    Attributes:
        kind: see `Kind`.
        axis: for weighted operators, the dimension of the weight with one scale for each slice.
        weight: for weighted operators, which argument is the weight.
        weight_input: which argument the weight multiplies.
        bias: which argument is the bias; it may be missing.
        emits: the runtime's integer operator gives integers only, so that its output must be quantized.
        reason: why it stays float.
        refuses: for a node of this operator, why it stays float after all, or None.
    """

    kind: Kind
    axis: int = 0
    weight: int = 1
    weight_input: int = 0
    bias: int = 2
    emits: bool = False
    reason: str = ""
    refuses: Callable[[fx.Node], str | None] = lambda node: None


def _mean(node: fx.Node) -> str | None:
    keep = len(node.args) > 2 and node.args[2]
    fits = keep and isinstance(node.args[0], fx.Node) and spatial(node.args[0], node.args[1])
    return None if fits else "a mean that is not over all spatial dimensions"


_CONVOLUTION = Role(Kind.WEIGHTED, emits=True)
_SAME = Role(Kind.SAME)
_OWN = Role(Kind.OWN)
_NO_KERNEL = Role(Kind.FLOAT, reason="not every runtime has an integer operator for it")
_SENSITIVE = Role(Kind.FLOAT, reason="8 bits lose too much here")
_STORED = Role(Kind.FLOAT, reason="its weights are stored as integers and computed with in float")
_LOOKUP = Role(Kind.FLOAT, reason="rows are looked up as integers and are float from there on")
_PRODUCT = Role(Kind.FLOAT, reason="both factors are activations, whose product stays float")

# operator → role; what is not here stays float.
ROLES: dict[object, Role] = {
    aten.conv1d.default: _CONVOLUTION,
    aten.conv2d.default: _CONVOLUTION,
    aten.conv3d.default: _CONVOLUTION,
    aten.conv1d.padding: _CONVOLUTION,
    aten.conv2d.padding: _CONVOLUTION,
    aten.conv3d.padding: _CONVOLUTION,
    aten.linear.default: Role(Kind.WEIGHTED),
    aten.addmm.default: Role(Kind.WEIGHTED, axis=1, weight=2, weight_input=1, bias=0),
    aten.mm.default: Role(Kind.WEIGHTED, axis=1),
    aten.relu.default: Role(Kind.CLAMP),
    aten.relu6.default: Role(Kind.CLAMP),
    aten.hardtanh.default: Role(Kind.CLAMP),
    aten.clamp.default: Role(Kind.CLAMP),
    aten.max_pool1d.default: _SAME,
    aten.max_pool2d.default: _SAME,
    aten.max_pool3d.default: _SAME,
    aten.flatten.using_ints: _SAME,
    aten.view.default: _SAME,
    aten.reshape.default: _SAME,
    aten.permute.default: _SAME,
    aten.transpose.int: _SAME,
    aten.squeeze.dim: _SAME,
    aten.squeeze.dims: _SAME,
    aten.squeeze.default: _SAME,
    aten.unsqueeze.default: _SAME,
    aten.expand.default: _SAME,
    aten.upsample_nearest2d.vec: _SAME,
    aten.pixel_shuffle.default: _SAME,
    aten.clone.default: _SAME,
    aten.contiguous.default: _SAME,
    aten.slice.Tensor: _SAME,
    aten.select.int: _SAME,
    operator.getitem: _SAME,
    aten.avg_pool1d.default: _OWN,
    aten.avg_pool2d.default: _OWN,
    aten.adaptive_avg_pool1d.default: _OWN,
    aten.adaptive_avg_pool2d.default: _OWN,
    aten.leaky_relu.default: _OWN,
    aten.mean.dim: Role(Kind.OWN, refuses=_mean),
    aten.add.Tensor: Role(Kind.BINARY),
    aten.mul.Tensor: Role(Kind.BINARY),
    aten.cat.default: Role(Kind.JOIN),
    aten.batch_norm.default: Role(Kind.FLOAT, reason="no convolution or linear layer before it"),
    aten.conv_transpose1d.default: _NO_KERNEL,
    aten.conv_transpose2d.input: _NO_KERNEL,
    aten.lstm.input: _STORED,
    aten.gru.input: _STORED,
    aten.rnn_tanh.input: _STORED,
    aten.rnn_relu.input: _STORED,
    aten.embedding.default: _LOOKUP,
    aten.matmul.default: _PRODUCT,
    aten.bmm.default: _PRODUCT,
    aten.scaled_dot_product_attention.default: _PRODUCT,
    aten.softmax.int: _SENSITIVE,
    aten.layer_norm.default: _SENSITIVE,
    aten.group_norm.default: _SENSITIVE,
    aten.instance_norm.default: _SENSITIVE,
    aten.silu.default: _NO_KERNEL,
    aten.hardswish.default: _NO_KERNEL,
    aten.hardsigmoid.default: _NO_KERNEL,
    aten.gelu.default: _NO_KERNEL,
    aten.sigmoid.default: _NO_KERNEL,
    aten.tanh.default: _NO_KERNEL,
}
# Operators whose pieces `operator.getitem` picks.
_SPLITS = {
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
}
_LOGARITHMS = {aten.log.default, aten.log10.default, aten.log2.default, aten.log1p.default}
# Whose logarithms are about linear in what they read.
_SATURATING = {aten.softmax.int, aten.sigmoid.default}
# Bounds of activation functions that take none as arguments.
_BOUNDS = {aten.relu.default: (0.0, float("inf")), aten.relu6.default: (0.0, 6.0)}


@dataclass
class Placement:
    """What to quantize in a folded graph.

    Attributes:
        values: activation node → the nodes that read it quantized; empty for all that read it.
        weights: parameter name → (dimension of its channels, the nodes that use it).
        shares: activation node → the node that stands for all that share its scale.
        bounds: activation node that is a clamp's output → (low, high) of the clamp.
        before: such a node → the integer operator that the clamp fuses with where the range stays within the bounds.
        skipped: (node, operator, reason) of each operator that stays float.
    """

    values: dict[str, tuple[str, ...]] = field(default_factory=dict)
    weights: dict[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    shares: dict[str, str] = field(default_factory=dict)
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)

    def observed(self) -> list[str]:
        """The activations whose ranges must be known, in the order of the graph."""
        return list(self.values)


def place(module: fx.GraphModule, keep: Callable[[str], bool] = lambda name: False) -> Placement:
    """Decide what is quantized.

    A convolution's output is always quantized, after the activation function that it fuses with; a linear layer's where an
    integer operator reads it, because runtimes have integer matrix products with float results. Other operators run in
    integers where their inputs are integers already.

    Args:
        module: a graph from `fold`.
        keep: whether layers with a parameter of this name stay float.

    Cost:
        One pass over the graph.
    """
    return _Placer(module, keep).run()


class _Placer:
    def __init__(self, module: fx.GraphModule, keep: Callable[[str], bool]) -> None:
        self.module, self.keep = module, keep
        self.reads: dict[fx.Node, list[fx.Node]] = {}
        self.integer: set[fx.Node] = set()
        self.root: dict[fx.Node, fx.Node] = {}
        self.logged = _logged(module)
        self.result = Placement()

    def run(self) -> Placement:
        act = {
            Kind.WEIGHTED: self.weighted,
            Kind.SAME: self.same,
            Kind.OWN: self.own,
            Kind.BINARY: self.binary,
            Kind.JOIN: self.join,
        }
        for node in self.module.graph.nodes:
            if node.op != "call_function" or node.target in _SPLITS or not _is_float(node):
                continue
            role = _role(node)
            reason: str | None = role.reason or None
            if role.kind in act:
                reason = role.refuses(node) or act[role.kind](node, role)
            if reason:
                self.result.skipped.append((node.name, str(node.target), reason))
        for node in self.module.graph.nodes:
            if node in self.integer:
                self.result.values[node.name] = ()
            elif node in self.reads:
                readers = self.reads[node]
                # A matrix product with integer and float readers would stay float: all read the rounded values.
                everyone = set(node.users) <= set(readers) or _role(node).kind is Kind.WEIGHTED
                names = () if everyone else tuple(reader.name for reader in readers)
                self.result.values[node.name] = names
            if node in self.integer or node in self.reads:
                self.result.shares[node.name] = self.find(node).name
                if (clamp := clamp_bounds(node)) is not None:
                    self.result.bounds[node.name] = clamp
                    source = node.args[0]
                    if _role(source).kind is Kind.WEIGHTED and len(source.users) == 1:
                        self.result.before[node.name] = source.name
        return self.result

    def weighted(self, node: fx.Node, role: Role) -> str | None:
        name = parameter_of(node.args[role.weight])
        weight = None if name is None else read(self.module, name)
        if name is None or weight is None:
            return "its weight is computed, not a parameter"
        if weight.dtype != torch.float32:
            return f"its weight is {weight.dtype}, float32 is needed"
        if self.keep(name):
            return "it was asked to stay float"
        if node in self.logged:
            return "a logarithm of its result is taken, in which small values matter as much as large ones"
        axis, users = self.result.weights.get(name, (role.axis, ()))
        if axis != role.axis:
            return f"its weight {name} is shared with an operator that reads it the other way"
        self.result.weights[name] = (axis, (*users, node.name))
        self.read(node.args[role.weight_input], node)
        if role.emits:
            self.emit(node)
        return None

    def same(self, node: fx.Node, role: Role) -> str | None:
        source: object = node.args[0]
        reader = node
        if node.target is operator.getitem and isinstance(source, fx.Node):
            if source.target not in _SPLITS:
                return None
            reader = source
            source = reader.args[0]
        if source in self.integer:
            self.read(source, reader)
            self.integer.add(node)
            self.union(node, source)
        return None  # what only moves float values costs nothing worth listing

    def own(self, node: fx.Node, role: Role) -> str | None:
        if node.args[0] not in self.integer:
            return "its input is float"
        self.read(node.args[0], node)
        self.integer.add(node)
        return None

    def binary(self, node: fx.Node, role: Role) -> str | None:
        pair = node.args[:2]
        if not all(isinstance(value, fx.Node) and _is_activation(value) for value in pair):
            return "one side is a constant or parameter"
        if not any(value in self.integer for value in pair):
            return "its inputs are float"
        if node.kwargs.get("alpha", 1) != 1:
            return "one side is scaled by alpha"
        for value in pair:
            self.read(value, node)
        self.emit(node)
        return None

    def join(self, node: fx.Node, role: Role) -> str | None:
        sources = node.args[0]
        assert isinstance(sources, list | tuple)
        if not all(source in self.integer for source in sources):
            return "not all of its inputs are integers"
        for source in sources:
            self.read(source, node)
            self.union(node, source)
        self.integer.add(node)
        return None

    def read(self, value: object, reader: fx.Node) -> None:
        assert isinstance(value, fx.Node)
        readers = self.reads.setdefault(value, [])
        if reader not in readers:
            readers.append(reader)

    def emit(self, node: fx.Node) -> None:
        """Quantize an operator's output, after the activation function if one alone reads it."""
        users = list(node.users)
        if len(users) == 1 and clamp_bounds(users[0]) is not None:
            self.integer.add(users[0])
            self.result.before[users[0].name] = node.name
        else:
            self.integer.add(node)

    def find(self, node: fx.Node) -> fx.Node:
        while node in self.root:
            node = self.root[node]
        return node

    def union(self, node: fx.Node, other: object) -> None:
        assert isinstance(other, fx.Node)
        first, second = self.find(node), self.find(other)
        if first is not second:
            self.root[first] = second


def _logged(module: fx.GraphModule) -> set[fx.Node]:
    """What logarithms are taken of, back to the operators with weights: spectra, whose quiet parts steps of one size would lose."""
    found: set[fx.Node] = set()
    waiting = [n for n in module.graph.nodes if n.target in _LOGARITHMS]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source in found or source.target in _SATURATING:
                continue
            found.add(source)
            if _role(source).kind is not Kind.WEIGHTED:
                waiting.append(source)
    return found


def _role(node: fx.Node) -> Role:
    return ROLES.get(node.target, Role(Kind.FLOAT, reason="unknown to tinier's table"))


def clamp_bounds(node: fx.Node) -> tuple[float, float] | None:
    """(low, high) of an activation function that only clamps and keeps 0; None for other nodes."""
    role = ROLES.get(node.target) if node.op == "call_function" else None
    if role is None or role.kind is not Kind.CLAMP:
        return None
    if node.target in _BOUNDS:
        return _BOUNDS[node.target]
    defaults = (-1.0, 1.0) if node.target is aten.hardtanh.default else (None, None)
    low, high = (node.args[i] if len(node.args) > i else defaults[i - 1] for i in (1, 2))
    low = float("-inf") if low is None else low
    high = float("inf") if high is None else high
    if (
        not isinstance(low, int | float)
        or not isinstance(high, int | float)
        or not low <= 0 <= high
    ):
        return None
    return float(low), float(high)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _is_activation(node: fx.Node) -> bool:
    """Whether a value depends on the network's inputs."""
    waiting, seen = [node], set()
    while waiting:
        current = waiting.pop()
        if current.op == "placeholder":
            return True
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return False
