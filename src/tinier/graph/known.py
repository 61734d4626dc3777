"""What a network computes whatever its input: constants, followed through the graph entry by entry.

An entry of a tensor is *open* while it may depend on the input. Products with zeros close it: a filter of zeros makes a map that is its
bias, a batch norm makes another constant of that, ReLU perhaps zero. Rules only say an entry is closed where that is certain; for an
operator without a rule everything that it makes of open entries is open.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tinier.graph.rules import argument, dimension, operator_name
from tinier.graph.rules.pointwise import POINTWISE
from tinier.graph.trace import Traced
from tinier.graph.weights import CONVOLUTION, RECURRENT, TRANSPOSED

# Operators that move entries or add up a few: what they make of open entries is found by running them on the flags.
_MOVING = """
view reshape _unsafe_view view_copy flatten unflatten permute transpose t movedim swapaxes cat concat stack slice select narrow
split split_with_sizes chunk unsafe_split tensor_split unbind expand broadcast_to unsqueeze squeeze flip roll repeat tile
repeat_interleave pixel_shuffle pixel_unshuffle channel_shuffle index_select index upsample_nearest1d upsample_nearest2d
upsample_nearest3d upsample_bilinear2d upsample_linear1d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d
avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_max_pool2d mean sum amax clone contiguous expand_as view_as
reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d mT numpy_T
"""
MOVING = set(_MOVING.split())
CONSTANT = {"zeros_like", "ones_like", "full_like", "empty_like"}
RANDOM = {"bernoulli", "rand", "randn", "rand_like", "randn_like", "randperm"}
ENTRYWISE = set(POINTWISE.split()) - CONSTANT - RANDOM


class Known(fx.Interpreter):
    """Runs a traced graph on one input and says of each result which entries would be the same for any.

    Args:
        traced: the network.
        tensors: name → parameter or buffer to take instead of the network's own.
        inputs: input name → tensor.

    Attributes:
        values: node → result.
        open: node → bool tensors of the result's shapes (a list for several results).
        units: recurrent node → for each layer and direction, (hidden,) bool: the unit is zero at every step.
    """

    def __init__(
        self, traced: Traced, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
    ) -> None:
        super().__init__(traced.module, garbage_collect_values=False)
        self.tensors = tensors
        self.open: dict[fx.Node, Any] = {}
        self.units: dict[fx.Node, list[Tensor]] = {}
        self.env = {}
        with torch.no_grad():
            for node in traced.module.graph.nodes:
                if node.op == "placeholder":
                    value: Any = inputs[str(node.target)]
                    self.open[node] = torch.ones(value.shape, dtype=torch.bool)
                elif node.op == "get_attr":
                    value = tensors[str(node.target)]
                    self.open[node] = torch.zeros(value.shape, dtype=torch.bool)
                elif node.op == "output":
                    break
                else:
                    value = self.run_node(node)
                    self.open[node] = self._flags(node, value)
                self.env[node] = value
        self.values = self.env

    def flags(self, argument: Any, shape: torch.Size | None = None) -> Tensor:
        """Which entries of an argument are open; numbers have none."""
        found = (
            self.open[argument]
            if isinstance(argument, fx.Node)
            else torch.zeros((), dtype=torch.bool)
        )
        return found if shape is None else found.expand(shape)

    def not_zero(self, argument: Any) -> Tensor:
        """Which entries of an argument may be other than zero."""
        value = self.env[argument] if isinstance(argument, fx.Node) else argument
        return self.flags(argument) | (torch.as_tensor(value) != 0)

    def zeros(self, node: fx.Node) -> Tensor | None:
        """Which entries of a result are zero whatever the input; None where there is more than one result."""
        found = self.open.get(node)
        return ~found & (self.env[node] == 0) if isinstance(found, Tensor) else None

    def _flags(self, node: fx.Node, value: Any) -> Any:
        if not isinstance(value, Tensor):
            if isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value):
                several = self._several(node, value)
                return [
                    flag if flag is not None and flag.shape == item.shape else _all(item)
                    for flag, item in zip(several, value, strict=True)
                ]
            return None
        name = operator_name(node)
        if name == "getitem":
            return self.open[node.args[0]][node.args[1]]  # type: ignore[index]
        if name in RANDOM:
            return _all(value)
        if name in CONSTANT or not any(self._any(source) for source in node.all_input_nodes):
            return ~_all(value)
        rule = RULES.get(name)
        found = (
            rule(self, node, value)
            if rule is not None
            else self._moved(node)
            if name in MOVING
            else self._entrywise(node, value)
            if name in ENTRYWISE
            else None
        )
        return found if isinstance(found, Tensor) and found.shape == value.shape else _all(value)

    def _any(self, source: fx.Node) -> bool:
        found = self.open.get(source)
        if isinstance(found, list):
            return any(flag is not None and bool(flag.any()) for flag in found)
        return isinstance(found, Tensor) and bool(found.any())

    def _several(self, node: fx.Node, value: Any) -> list[Tensor | None]:
        name = operator_name(node)
        if not any(self._any(source) for source in node.all_input_nodes):
            return [~_all(item) for item in value]
        if name in MOVING:
            return list(self._moved(node))
        if name in RECURRENT:
            return _recurrent(self, node, value)
        return [None] * len(value)

    def _entrywise(self, node: fx.Node, value: Tensor) -> Tensor:
        result = ~_all(value)
        for source in node.all_input_nodes:
            if isinstance(self.open.get(source), Tensor):
                result = result | self.flags(source, value.shape)
        return result

    def _moved(self, node: fx.Node) -> Any:
        """The operator on the flags, as numbers: what is above zero has an open entry in it."""
        first = node.args[0]
        tensors = first if isinstance(first, list | tuple) else [first]
        if any(self._any(s) for s in node.all_input_nodes if s not in tensors):
            return None  # it is moved by what is open
        arguments = fx.map_arg(
            node.args, lambda n: self.flags(n).float() if n in tensors else self.env[n]
        )
        found: Any = node.target(*arguments, **fx.map_arg(node.kwargs, self.env.__getitem__))  # type: ignore[operator]
        if isinstance(found, Tensor):
            return found > 0
        return [flag > 0 for flag in found]


def _all(value: Any) -> Tensor:
    return torch.ones(getattr(value, "shape", ()), dtype=torch.bool)


def _product(run: Known, left: Any, right: Any, function: Callable[..., Tensor]) -> Tensor:
    """A sum of products is open where an open entry meets one that may not be zero."""
    a = function(run.flags(left).double(), run.not_zero(right).double())
    return (a + function(run.not_zero(left).double(), run.flags(right).double())) > 0


def _linear(run: Known, node: fx.Node, value: Tensor) -> Tensor:
    found = _product(run, node.args[0], node.args[1], torch.nn.functional.linear)
    return found | run.flags(argument(node, 2, "bias"))


def _matmul(run: Known, node: fx.Node, value: Tensor) -> Tensor:
    return _product(run, node.args[0], node.args[1], torch.matmul)


def _addmm(run: Known, node: fx.Node, value: Tensor) -> Tensor:
    found = _product(run, node.args[1], node.args[2], torch.matmul)
    return found | run.flags(node.args[0], value.shape)


def _einsum(run: Known, node: fx.Node, value: Tensor) -> Tensor | None:
    operands: Any = node.args[1]
    if len(operands) != 2:
        return None
    equation = str(node.args[0])
    left, right = operands
    return _product(run, left, right, lambda a, b: torch.einsum(equation, a, b))


def _convolution(run: Known, node: fx.Node, value: Tensor) -> Tensor:
    rest = fx.map_arg(node.args[3:], run.env.__getitem__)
    options = {k: v for k, v in node.kwargs.items() if k != "bias"}
    found = _product(
        run,
        node.args[0],
        node.args[1],
        lambda a, b: node.target(a, b, None, *rest, **options),  # type: ignore[operator]
    )
    bias = argument(node, 2, "bias")
    shape = [-1] + [1] * (node.args[1].meta["val"].ndim - 2)  # type: ignore[union-attr]
    return found if bias is None else found | run.flags(bias).view(shape)


def _multiply(run: Known, node: fx.Node, value: Tensor) -> Tensor:
    left, right = node.args[:2]
    return (run.flags(left) & run.not_zero(right)) | (run.flags(right) & run.not_zero(left))


def _divide(run: Known, node: fx.Node, value: Tensor) -> Tensor:
    left, right = node.args[:2]
    return run.flags(left, value.shape) | (run.flags(right) & run.not_zero(left))


def _scaled(run: Known, open_: Tensor, weight: Any, dim: int) -> Tensor:
    """After a norm: where its scale is zero only its shift is left."""
    if weight is None:
        return open_
    scale = run.not_zero(weight)
    if scale.ndim > 1:
        return open_ & scale
    return open_ & scale.view([-1 if d == dim % open_.ndim else 1 for d in range(open_.ndim)])


def _batch_norm(run: Known, node: fx.Node, value: Tensor) -> Tensor | None:
    if any(run._any(s) for s in node.all_input_nodes[1:]) or operator_name(node) == "instance_norm":
        return None
    return _scaled(run, run.flags(node.args[0]), node.args[1], 1)


def _layer_norm(run: Known, node: fx.Node, value: Tensor) -> Tensor:
    over = list(range(value.ndim - len(node.args[1]), value.ndim))  # type: ignore[arg-type]
    spread = run.flags(node.args[0]).any(dim=over[0], keepdim=True)
    for dim in over[1:]:
        spread = spread.any(dim=dim, keepdim=True)
    return _scaled(run, spread.expand(value.shape), argument(node, 2, "weight"), -1)


def _group_norm(run: Known, node: fx.Node, value: Tensor) -> Tensor:
    groups = int(node.args[1])  # type: ignore[arg-type]
    flags = run.flags(node.args[0])
    spread = flags.reshape(value.shape[0], groups, -1).any(2)
    spread = spread.repeat_interleave(value.shape[1] // groups, 1)
    spread = spread.view(*value.shape[:2], *[1] * (value.ndim - 2)).expand(value.shape)
    return _scaled(run, spread, argument(node, 2, "weight"), 1)


def _softmax(run: Known, node: fx.Node, value: Tensor) -> Tensor:
    dim = dimension(int(argument(node, 1, "dim")), value.ndim)
    return run.flags(node.args[0]).any(dim, keepdim=True).expand(value.shape)


def _attention(run: Known, node: fx.Node, value: Tensor) -> Tensor | None:
    """Means of values: zero where all values are."""
    values = node.args[2]
    alive = run.not_zero(values).any(-2, keepdim=True)
    if alive.ndim > 2 and alive.shape[-3] != value.shape[-3]:
        alive = alive.repeat_interleave(value.shape[-3] // alive.shape[-3], -3)
    return alive.expand(value.shape)


def _embedding(run: Known, node: fx.Node, value: Tensor) -> Tensor:
    table = run.env[node.args[0]]  # type: ignore[index]
    return (table != table[:1]).any(0).expand(value.shape)


def _pad(run: Known, node: fx.Node, value: Tensor) -> Tensor:
    mode = argument(node, 2, "mode", "constant")
    flags = run.flags(node.args[0]).float()
    if operator_name(node) == "constant_pad_nd" or mode == "constant":
        return torch.nn.functional.pad(flags, node.args[1]) > 0  # type: ignore[arg-type]
    return torch.nn.functional.pad(flags, node.args[1], mode=str(mode)) > 0  # type: ignore[arg-type]


def _recurrent(run: Known, node: fx.Node, value: Any) -> list[Tensor | None]:
    """Units whose candidate is zero at every step and that start at zero stay zero: h = o · tanh(c), c = f · c + i · 0.

    In a GRU likewise h = (1 − z) · 0 + z · h; in a plain recurrent layer the candidate is all that there is, tanh(0) or relu(0).
    """
    first, parameters, has_biases = node.args[1:4]
    layers, two_ways = int(node.args[4]), bool(node.args[7])  # type: ignore[arg-type]
    nothing: list[Tensor | None] = [None] * len(value)
    if not isinstance(parameters, list | tuple):
        return nothing
    names = [run.env[p] for p in parameters]  # type: ignore[index]
    ways = 2 if two_ways else 1
    each = 4 if has_biases else 2
    if len(names) != each * layers * ways:  # projections
        return nothing
    start: Any = first if isinstance(first, list | tuple) else [first]
    hidden = names[1].shape[1]
    # (features,) which inputs of the layer may be other than zero
    alive = run.not_zero(node.args[0]).flatten(0, -2).any(0)
    units: list[Tensor] = []
    for layer in range(layers):
        made = []
        for way in range(ways):
            number = layer * ways + way
            w_in, w_own, *biases = names[each * number : each * (number + 1)]
            # The candidate is in the third place of both LSTM and GRU.
            rows = slice(2 * hidden, 3 * hidden) if len(w_in) > hidden else slice(hidden)
            zero = ~(w_in[rows][:, alive] != 0).any(1)
            for bias in biases:
                zero &= bias[rows] == 0
            for state in start:
                zero &= ~run.not_zero(state)[number].flatten(0, -2).any(0)
            while bool((reads := (w_own[rows][:, ~zero] != 0).any(1) & zero).any()):
                zero &= ~reads
            units.append(zero)
            made.append(zero)
        alive = ~torch.cat(made)
    run.units[node] = units
    flags: list[Tensor | None] = [alive.expand(value[0].shape)]
    stacked = ~torch.stack(units)[:, None, :]
    if value[1].ndim == 2:
        stacked = stacked[:, 0]
    flags += [stacked.expand(item.shape) for item in value[1:]]
    return flags


RULES: dict[str, Callable[[Known, fx.Node, Tensor], Tensor | None]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _addmm),
    "einsum": _einsum,
    **dict.fromkeys((*CONVOLUTION[:3], *TRANSPOSED), _convolution),
    **dict.fromkeys(("mul", "multiply"), _multiply),
    **dict.fromkeys(("div", "divide", "true_divide"), _divide),
    **dict.fromkeys(("batch_norm", "cudnn_batch_norm", "instance_norm"), _batch_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "group_norm": _group_norm,
    **dict.fromkeys(("softmax", "_softmax", "log_softmax"), _softmax),
    "scaled_dot_product_attention": _attention,
    "embedding": _embedding,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
}
