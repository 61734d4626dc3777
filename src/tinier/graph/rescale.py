"""Where the scale of channels can move: from the layer or norm that makes them to the layers that read them."""

import heapq
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tinier.graph.fold import parameter_of, read
from tinier.graph.layers import Layer, linear_layer
from tinier.graph.placement import clamp_bounds
from tinier.graph.rules import argument, operator_name
from tinier.graph.rules.base import hint

# f(s · x) = s · f(x) for every s > 0, each value by itself.
_POINTWISE = {"relu", "leaky_relu", "abs", "neg", "clone", "contiguous", "detach", "alias"}
# Only moves or repeats values.
_MOVES = (
    "view reshape _unsafe_view flatten unflatten permute transpose t squeeze unsqueeze expand slice select "
    "split split_with_sizes chunk unbind pixel_shuffle pixel_unshuffle repeat_interleave"
)
_MOVES_SET = set(_MOVES.split())
# Pools the positions of each channel, or interpolates between them.
_SPATIAL = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_")
_NORMS = {
    "layer_norm": (2, 3),
    "rms_norm": (2, None),
    "group_norm": (2, 3),
    "batch_norm": (1, 2),
    "instance_norm": (1, 2),
}
Ids = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads rescaled channels.

    Attributes:
        layer: which one.
        channels: (inputs,) int64: for each input of the layer, the channel whose factor it has.
    """

    layer: Layer
    channels: Tensor

    def multiplied(self, weight: Tensor, factors: Tensor) -> Tensor:
        """The weight for inputs that were divided by ``factors``, (size,)."""
        matrix = self.layer.matrix(weight)  # (g, m, n · kernel)
        own = factors[self.channels].reshape(self.layer.groups, 1, -1)
        each = matrix.shape[2] // own.shape[2]
        return self.layer.parameter(matrix * own.repeat_interleave(each, 2), weight.shape)

    def largest(self, weight: Tensor, size: int) -> Tensor:
        """(size,) largest |w| that each channel is multiplied with; 0 where there is none."""
        matrix = self.layer.matrix(weight).abs().amax(1)  # (g, n · kernel)
        inputs = matrix.reshape(len(self.channels), -1).amax(1)
        return inputs.new_zeros(size).scatter_reduce(0, self.channels, inputs, "amax")


@dataclass(frozen=True, eq=False)
class Site:
    """Channels whose scale can move without changing what the network computes.

    For s > 0: the maker's weight and bias are divided by s, the weights of all readers are multiplied with it.

    Attributes:
        node: what makes the channels.
        parameters: its weight and bias, each with one slice for each channel.
        layer: the maker as a layer; None for norms and products with a parameter.
        size: number of channels.
        readers: the layers that read them; there is at least one.
        clamp: bounds of a clamp behind the maker that are neither 0 nor infinite: where values reach them, s must be 1. None without one.
        plain: whether only activations that are linear above 0, and moves, lie between.
    """

    node: fx.Node
    parameters: tuple[str, ...]
    layer: Layer | None
    size: int
    readers: tuple[Reader, ...]
    clamp: tuple[float, float] | None
    plain: bool

    @property
    def name(self) -> str:
        """The maker's weight."""
        return self.parameters[0]

    def rescale(self, tensors: dict[str, Tensor], factors: Tensor) -> None:
        """Move factors in a dict of parameters.

        Args:
            tensors: parameter → values; entries of this site are replaced.
            factors: (size,) positive.
        """
        for name in self.parameters:
            tensors[name] = self._divided(name, tensors[name], factors)
        for reader in self.readers:
            name = reader.layer.weight
            tensors[name] = reader.multiplied(tensors[name], factors)

    def _divided(self, name: str, value: Tensor, factors: Tensor) -> Tensor:
        if self.layer is None or name != self.layer.weight:
            return value / factors.reshape(value.shape)
        matrix = self.layer.matrix(value)
        return self.layer.parameter(matrix / factors.reshape(*matrix.shape[:2], 1), value.shape)

    def made(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(size,) largest |w| of the maker for each channel."""
        weight = tensors[self.name]
        if self.layer is None:
            return weight.abs().flatten()
        return self.layer.matrix(weight).abs().amax(2).flatten()

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(size,) largest |w| that each channel is multiplied with."""
        each = [r.largest(tensors[r.layer.weight], self.size) for r in self.readers]
        return torch.stack(each).amax(0)

    def allowed(self, tensors: Mapping[str, Tensor], factors: Tensor) -> Tensor:
        """The factors, with which no value that the clamp let through reaches its bounds.

        The bound is over all inputs within the bounds of the clamp that the maker reads: z ≤ b + Σ max(w · low, w · high).

        Args:
            tensors: parameter → values.
            factors: (size,) positive.

        Returns:
            (size,): 1 for channels that the clamp may cut, and elsewhere as near to the factor as the bounds let.
        """
        if self.clamp is None:
            return factors
        source = None if self.layer is None else clamp_bounds(_before_moves(self.layer.source))
        if source is None or self.layer is None or max(map(abs, source)) == float("inf"):
            return torch.ones_like(factors)
        matrix = self.layer.matrix(tensors[self.layer.weight])
        bias = tensors[self.layer.bias] if self.layer.bias else 0
        ends = torch.stack([matrix * source[0], matrix * source[1]])
        result, inert = factors, torch.ones_like(factors, dtype=torch.bool)
        for value, bound in zip((ends.amin(0), ends.amax(0)), self.clamp, strict=True):
            reached = value.sum(2).flatten() + bias
            if bound in (0.0, float("inf"), float("-inf")):
                continue
            part = reached / bound  # of the bound; negative where the values are on the other side
            inert &= part <= 1
            result = torch.maximum(result, part)
        return torch.where(inert, result, 1.0)


def sites(module: fx.GraphModule) -> list[Site]:
    """All sites of a folded graph, in its order.

    Followed are operators with f(s · x) = s · f(x), pooling, moves, products with what does not depend on the channels, and the values of
    attention. Sums are not, unless both sides have the same factors. Parameters that are tied or read twice stay out.

    Args:
        module: a graph from `fold`.

    Cost:
        A pass over the operators between each maker and its readers, on integers of the example's shapes.
    """
    order = {node: number for number, node in enumerate(module.graph.nodes)}
    once = _read_once(module)
    result: list[Site] = []
    taken: set[str] = set()
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        for layer, names, dim in _maker(node):
            if not all(name in once for name in names):
                continue
            found = _followed(node, dim, order)
            if found is None:
                continue
            readers, clamp, plain = found
            weights = [reader.layer.weight for reader in readers]
            if not all(name in once for name in weights) or taken & set(weights):
                continue
            taken |= set(weights)
            size = hint(node.meta["val"].shape[dim])
            result.append(Site(node, names, layer, size, tuple(readers), clamp, plain))
    return result


def _read_once(module: fx.GraphModule) -> set[str]:
    """Parameters of float32 with one reader and one name."""
    count: dict[int, int] = {}
    nodes = list(module.graph.find_nodes(op="get_attr"))
    for node in nodes:
        key = id(read(module, str(node.target)))
        count[key] = count.get(key, 0) + len(node.users)
    tensors = {str(node.target): read(module, str(node.target)) for node in nodes}
    return {
        name
        for name, tensor in tensors.items()
        if tensor is not None and count[id(tensor)] == 1 and tensor.dtype == torch.float32
    }


def _maker(node: fx.Node) -> Iterator[tuple[Layer | None, tuple[str, ...], int]]:
    """(layer, parameters, dimension of the channels) of a node that makes channels with factors of its own."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return
    layer, name = linear_layer(node), operator_name(node)
    if layer is not None:
        if layer.kind == "matmul" and layer.groups > 1:
            return
        spatial = layer.kind in ("convolution", "transposed")
        names = (layer.weight, *([layer.bias] if layer.bias else []))
        yield layer, names, 1 if spatial else value.ndim - 1
    elif name in _NORMS:
        tensors = [None if i is None else argument(node, i, "") for i in _NORMS[name]]
        given = [tensor for tensor in tensors if tensor is not None]
        named = [parameter_of(tensor) for tensor in given]
        last = name in ("layer_norm", "rms_norm")
        if tensors[0] is None or None in named or (last and len(node.args[1]) != 1):  # type: ignore[arg-type]
            return
        yield None, tuple(str(one) for one in named), value.ndim - 1 if last else 1
    elif name == "mul":
        for item, other in (node.args[:2], node.args[1::-1]):
            parameter, shape = parameter_of(item), list(value.shape)
            if parameter is None or not isinstance(other, fx.Node) or parameter_of(other):
                continue
            sizes = [hint(n) for n in item.meta["val"].shape]  # type: ignore[union-attr]
            wide = [dim - len(sizes) for dim, n in enumerate(sizes) if n > 1]
            if len(wide) == 1 and len(sizes) <= len(shape) and isinstance(shape[wide[0]], int):
                yield None, (parameter,), wide[0] % len(shape)


def _before_moves(node: fx.Node) -> fx.Node:
    while operator_name(node) in _MOVES_SET and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _followed(
    maker: fx.Node, dim: int, order: Mapping[fx.Node, int]
) -> tuple[list[Reader], tuple[float, float] | None, bool] | None:
    """The readers of a maker's channels; None where their scale cannot move."""
    shape = [hint(n) for n in maker.meta["val"].shape]
    line = torch.arange(shape[dim]).reshape([-1 if d == dim else 1 for d in range(len(shape))])
    ids: dict[fx.Node, Ids] = {maker: line.expand(shape)}
    waiting = [(order[user], user) for user in maker.users]
    heapq.heapify(waiting)
    seen: set[fx.Node] = set()
    readers: list[Reader] = []
    clamp, plain = None, True
    while waiting:
        _, node = heapq.heappop(waiting)
        if node in seen:
            continue
        seen.add(node)
        reader = _reader(node, ids)
        if reader is not None:
            readers.append(reader)
            continue
        bounds = clamp_bounds(node) if node.op == "call_function" else None
        if bounds is not None and any(b not in (0.0, float("inf"), float("-inf")) for b in bounds):
            if node.args[0] is not maker or clamp is not None:
                return None
            clamp, found = bounds, ids[maker]
        elif bounds is not None:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            found = ids[source]
        else:
            next_ids = _passed(node, ids)
            if next_ids is None:
                return None
            found = next_ids
        name = operator_name(node)
        plain &= bounds is not None or name == "getitem" or name in _MOVES_SET
        ids[node] = found
        for user in node.users:
            heapq.heappush(waiting, (order[user], user))
    return (readers, clamp, plain) if readers else None


def _reader(node: fx.Node, ids: Mapping[fx.Node, Ids]) -> Reader | None:
    layer = linear_layer(node)
    if layer is None or (layer.kind == "matmul" and layer.groups > 1):
        return None
    found = ids.get(layer.source)
    if not isinstance(found, Tensor) or sum(n in ids for n in node.all_input_nodes) != 1:
        return None
    dim = 1 if layer.kind in ("convolution", "transposed") else found.ndim - 1
    rest = [d for d in range(found.ndim) if d != dim]
    if not _constant(found, rest):
        return None
    return Reader(layer, found.movedim(dim, 0).flatten(1)[:, 0].clone())


def _passed(node: fx.Node, ids: Mapping[fx.Node, Ids]) -> Ids | None:
    """Channel of each value of a node's result; None where it does not scale with its input."""
    if node.op != "call_function" or node.kwargs.get("out") is not None:
        return None
    tracked = [source for source in node.all_input_nodes if source in ids]
    name, value = operator_name(node), node.meta.get("val")
    if node.target is operator.getitem:
        pieces = ids[tracked[0]]
        return pieces[node.args[1]] if isinstance(pieces, tuple) else None  # type: ignore[index]
    each = [ids[source] for source in tracked]
    first = each[0]
    if not isinstance(first, Tensor):
        return None
    if name in _MOVES_SET:
        return _moved(node, ids)
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return None
    shape = [hint(n) for n in value.shape]
    if name in ("add", "sub") and len(each) == 2:
        same = all(isinstance(one, Tensor) and torch.equal(one, first) for one in each)
        return first if same and list(first.shape) == shape else None
    if len(tracked) != 1:
        return None
    if name in _POINTWISE and node.args[0] is tracked[0]:
        return first
    if name == "prelu" and node.args[0] is tracked[0]:
        return first
    if name == "mul" or (name == "div" and node.args[0] is tracked[0] and not node.kwargs):
        twice = name == "mul" and node.args[0] is node.args[1]
        return None if twice else first.broadcast_to(shape)
    if name.startswith(_SPATIAL) and node.args[0] is tracked[0] and first.ndim == len(shape):
        rest = list(range(2, first.ndim))
        if not _constant(first, rest):
            return None
        for dim in rest:
            first = first.narrow(dim, 0, 1)
        return first.expand(shape)
    if name in ("mean", "sum") and len(node.args) > 1 and isinstance(node.args[1], list | tuple):
        dims = [int(d) % first.ndim for d in node.args[1]]  # type: ignore[arg-type]
        keep = bool(argument(node, 2, "keepdim", False))
        return first.amax(dims, keep) if dims and _constant(first, dims) else None
    if name in ("matmul", "bmm") and node.args[1] is tracked[0] and first.ndim == len(shape) > 2:
        return first[..., :1, :].expand(shape) if _constant(first, [first.ndim - 2]) else None
    if name == "scaled_dot_product_attention" and argument(node, 2, "value") is tracked[0]:
        fits = list(first.shape[:-2]) == shape[:-2] and _constant(first, [first.ndim - 2])
        return first[..., :1, :].expand(shape) if fits else None
    return None


def _moved(node: fx.Node, ids: Mapping[fx.Node, Ids]) -> Ids | None:
    def known(item: fx.Node) -> Any:
        if item in ids:
            return ids[item]
        value = item.meta.get("val")
        return None if isinstance(value, Tensor) else hint(value)

    assert callable(node.target)
    args = fx.map_arg(node.args, known)
    try:
        found = node.target(*args, **fx.map_arg(node.kwargs, known))
    except (RuntimeError, TypeError, ValueError):
        return None  # sizes that only data decide
    return tuple(found) if isinstance(found, list | tuple) else found


def _constant(ids: Tensor, dims: list[int]) -> bool:
    """Whether the channel does not change along these dimensions."""
    first = ids
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    return torch.equal(first.expand_as(ids), ids)
