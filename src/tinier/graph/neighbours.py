"""Layers that became neighbours: nothing but straight lines lies between them, so that they are one layer."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from tinier.graph.activations import Activation
from tinier.graph.layers import Layer, linear_layer
from tinier.graph.rules import operator_name
from tinier.graph.trace import Traced

BETWEEN = (
    "mul",
    "add",
    "addcmul",
    "sub",
    "div",
    "batch_norm",
    "dropout",
    "feature_dropout",
    "view",
    "reshape",
)
# What leaves the values of a parameter or constant as they are.
_KEEPING = "view reshape to _to_copy lift_fresh lift_fresh_copy alias detach clone contiguous"
KEEPING = _KEEPING.split()
FLAT = ("linear", "matmul")
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Two layers with only lines between them.

    Attributes:
        first, second: in the order of the graph.
        between: the nodes of the chain from the first layer's result to the second's input.
        macs: of both, for one position of the second's result per example.
        merged: MACs of the one layer that takes their place.
    """

    first: Layer
    second: Layer
    between: tuple[fx.Node, ...]
    macs: float
    merged: float

    @property
    def name(self) -> str:
        """Weight and weight."""
        return f"{self.first.weight} · {self.second.weight}"


def neighbours(traced: Traced, lines: Iterable[Activation] = ()) -> Iterator[Neighbours]:
    """Pairs that can be merged exactly, in the order of the graph.

    Args:
        traced: the network.
        lines: activations that are taken for straight lines: pairs that there would be without them.

    Linear layers always can. Convolutions without groups and dilation can where the second does not pad; a second one that pads would see
    zeros where the first one's result goes on.
    """
    users: dict[str, int] = {}
    for node in traced.module.graph.find_nodes(op="get_attr"):
        users[str(node.target)] = users.get(str(node.target), 0) + len(node.users)
    straight = {one.node: one for one in lines}
    for node in traced.module.graph.nodes:
        second = linear_layer(node)
        if second is None or users[second.weight] > 1:
            continue
        chain: list[fx.Node] = []
        at: Any = second.source
        within: frozenset[fx.Node] = frozenset([node])  # what may use the next one
        while isinstance(at, fx.Node) and at.op == "call_function" and set(at.users) <= within:
            first = linear_layer(at)
            if first is not None:
                if users[first.weight] == 1:
                    pair = _pair(first, second, tuple(reversed(chain)))
                    if pair is not None:
                        yield pair
                break
            chain.append(at)
            if at in straight:
                within, at = straight[at].inside, straight[at].source
                continue
            rows = second.kind in FLAT and _is_rows(at)
            if operator_name(at) not in BETWEEN or not (rows or _line(at)):
                break
            within, at = frozenset([at]), at.args[0]


def _is_rows(node: fx.Node) -> bool:
    """Whether a node only arranges rows anew, as the linear layers of GPT-2 do before and behind their product."""
    source: Any = node.args[0]
    sizes = [node.meta["val"].shape[-1:], source.meta["val"].shape[-1:]]
    same = all(isinstance(n, int) for size in sizes for n in size) and sizes[0] == sizes[1]
    return operator_name(node) in ("view", "reshape") and same


def _line(node: fx.Node) -> bool:
    """Whether a node does the same to each position: its other operands are parameters or numbers."""
    source, value = node.args[0], node.meta.get("val")
    others: list[Any] = [item for item in node.args[1:] if isinstance(item, fx.Node)]
    if not isinstance(source, fx.Node) or source.meta["val"].shape != value.shape:  # type: ignore[union-attr]
        return False
    while others:
        item = others.pop()
        if item.op == "get_attr":
            continue
        if item.op != "call_function" or operator_name(item) not in KEEPING:
            return False
        others += [a for a in item.args if isinstance(a, fx.Node)]
    return True


def _pair(first: Layer, second: Layer, between: tuple[fx.Node, ...]) -> Neighbours | None:
    flat = (first.kind in FLAT, second.kind in FLAT)
    if not all(flat) and (first.kind, second.kind) != ("convolution", "convolution"):
        return None
    if first.groups != 1 or second.groups != 1:
        return None
    one = [int(n) for n in first.node.args[1].meta["val"].shape]  # type: ignore[union-attr]
    two = [int(n) for n in second.node.args[1].meta["val"].shape]  # type: ignore[union-attr]
    if all(flat):
        leading = [str(layer.node.meta["val"].shape[:-1]) for layer in (first, second)]
        if leading[0] != leading[1]:
            return None
        inputs = one[1 if first.kind == "linear" else 0]
        outputs = two[0 if second.kind == "linear" else 1]
        return Neighbours(first, second, between, prod(one) + prod(two), outputs * inputs)
    if any(d != 1 for d in (*first.dilation, *second.dilation)) or any(
        sum(p) for p in second.padding
    ):
        return None
    if any(before != after for before, after in first.padding):
        return None
    kernel = _kernel(first, one, two)
    more = prod(second.stride)  # positions of the first layer's result for each of the second's
    macs = more * prod(one) + prod(two)
    return Neighbours(first, second, between, macs, two[0] * one[1] * prod(kernel))


def _kernel(first: Layer, one: list[int], two: list[int]) -> list[int]:
    return [a + (b - 1) * s for a, b, s in zip(one[2:], two[2:], first.stride, strict=True)]


def merged_tensors(module: fx.GraphModule, pair: Neighbours) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one layer, computed in float64.

    With z = d ⊙ y + t between them: W = W₂ · diag(d) · W₁ and b = W₂ (d ⊙ b₁ + t) + b₂; kernels are convolved.

    Args:
        module: the graph that the layers are in.
        pair: of it.

    Returns:
        (out, in, *kernel), or (in, out) where the first layer's weight is, and (out,); float64.
    """
    get = module.get_parameter
    one, two = get(pair.first.weight).detach(), get(pair.second.weight).detach()
    flat = pair.first.kind in FLAT
    w1, w2 = one.double(), two.double()
    if flat:
        w1, w2 = pair.first.matrix(w1)[0], pair.second.matrix(w2)[0]
    b1 = get(pair.first.bias).detach().double() if pair.first.bias else w1.new_zeros(len(w1))
    b2 = get(pair.second.bias).detach().double() if pair.second.bias else w2.new_zeros(len(w2))
    rank = pair.first.node.meta["val"].ndim
    probe = b1.new_zeros(2, len(b1))
    probe[1] = 1
    shape = [2, *[1] * (rank - 2), len(b1)] if flat else [2, len(b1), *[1] * (rank - 2)]
    ends = _run(module, pair.between, probe.view(shape)).reshape(2, len(b1))
    offset, scale = ends[0], ends[1] - ends[0]
    w1 = w1 * scale.view(-1, *[1] * (w1.ndim - 1))
    hidden = scale * b1 + offset
    if flat:
        weight, bias = w2 @ w1, w2 @ hidden + b2
        weight = weight.mT if pair.first.kind == "matmul" else weight
    else:
        spatial = w1.ndim - 2
        weight = CONVOLVE[spatial](
            w1.transpose(0, 1),
            w2.flip(list(range(2, w2.ndim))),
            padding=[(k - 1) * s for k, s in zip(w2.shape[2:], pair.first.stride, strict=True)],
            dilation=list(pair.first.stride),
        ).transpose(0, 1)
        bias = w2.flatten(2).sum(2) @ hidden + b2
    return weight.contiguous(), bias


def _run(module: fx.GraphModule, between: tuple[fx.Node, ...], x: Tensor) -> Tensor:
    """The chain on a tensor, in float64."""

    def value(item: Any, before: fx.Node | None) -> Any:
        if not isinstance(item, fx.Node):
            return item
        if item is before:
            return x
        if item.op == "get_attr":
            found: Any = module
            for part in str(item.target).split("."):
                found = getattr(found, part)
            return found.detach().double()
        args = [value(a, None) for a in item.args]
        assert callable(item.target)
        return item.target(*args)

    for node in between:
        if operator_name(node) in ("dropout", "feature_dropout") or _is_rows(node):
            continue
        source: Any = node.args[0]
        assert callable(node.target)
        x = node.target(*(value(a, source) for a in node.args), **node.kwargs)
    return x
