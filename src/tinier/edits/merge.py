"""Merge: two layers with nothing but straight lines between them become one."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from tinier.edits.base import Edit
from tinier.edits.proof import EXACT, ROUNDING, TOLERANCE, difference, random_inputs
from tinier.edits.slice import named
from tinier.edits.stock_keras_layers import merged_dense
from tinier.errors import RefusedError
from tinier.graph.macs import module_path
from tinier.graph.neighbours import Neighbours, merged_tensors, neighbours
from tinier.graph.single import HALF, is_half, recast, recast_inputs
from tinier.graph.trace import call
from tinier.modules.keras import KerasModule
from tinier.network import Network

GRAPH = "what is left is the traced graph: the layers that became one are no modules of torch of their own"


@dataclass(frozen=True)
class Merge(Edit):
    """Multiply two layers that are neighbours.

    Attributes:
        first: weight of the layer that comes first.
        second: weight of the one behind it.
    """

    kind: ClassVar[str] = "merge"

    first: str
    second: str

    def row(self) -> tuple[str, str]:
        """The layers, and what becomes of them."""
        return f"{self.first} · {self.second}", "one layer"

    @classmethod
    def apply_all(cls, edits: list[Edit], network: Network) -> Network:
        """A network with fewer layers that computes the same, to rounding; the user's class where it can be kept.

        Raises:
            RefusedError: two layers are no neighbours, or the merged network differs.

        Cost:
            A trace and some copies of the network for each pair.
        """
        for edit in edits:
            assert isinstance(edit, Merge)
            network = _merged(network, edit)
        return network


def _merged(network: Network, edit: Merge) -> Network:
    pair = next(
        (
            pair
            for pair in neighbours(network.traced)
            if (pair.first.weight, pair.second.weight) == (edit.first, edit.second)
        ),
        None,
    )
    if pair is None:
        raise RefusedError(f"merge {edit.first} and {edit.second}: no neighbours in this network")
    exact = merged_tensors(network.traced.module, pair)
    made = _parameters(network.traced.module, pair, exact)
    for module in _candidates(network, pair, *made):
        candidate = Network(module, network.example, network.name, network.folder)
        if _same(network, candidate, exact):
            lost = isinstance(module, fx.GraphModule) > isinstance(network.module, fx.GraphModule)
            return candidate.noted(*network.notes, *([GRAPH] if lost else []))
    raise RefusedError(
        f"{network.name}: with {edit.first} and {edit.second} as one layer it differs by more than {TOLERANCE:g} (relative)"
    )


def _parameters(
    module: fx.GraphModule, pair: Neighbours, exact: tuple[Tensor, Tensor]
) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of the one layer in the type of the first weight, frozen where all that they are made of is."""
    names = (one for layer in (pair.first, pair.second) for one in (layer.weight, layer.bias))
    trainable = any(module.get_parameter(name).requires_grad for name in names if name)
    kind = module.get_parameter(pair.first.weight).dtype
    weight, bias = (nn.Parameter(tensor.to(kind), trainable) for tensor in exact)
    return weight, bias


def _same(original: Network, candidate: Network, exact: tuple[Tensor, Tensor]) -> bool:
    for inputs in (random_inputs(original, seed=0), dict(original.example)):
        half = is_half(original.traced.module, inputs)
        try:
            with torch.no_grad():
                own, traced = candidate(inputs), call(candidate.traced.module, inputs)
                wanted = original(inputs)
                if len(own) != len(wanted) or difference(own, traced) > TOLERANCE:
                    return False
                gap = difference(own, wanted)
                if half:  # nothing is equal to 1e-5 there
                    gap = _in_more_digits(original, candidate, exact, inputs, HALF, torch.float32)
                elif TOLERANCE < gap <= ROUNDING:
                    # What is rounding vanishes in float64, and what is wrong stays.
                    old, new = (torch.float32,), torch.float64
                    more = _in_more_digits(original, candidate, exact, inputs, old, new)
                    gap = gap if more > EXACT else 0.0
        except Exception:  # the user's code with another module inside: anything may be raised
            return False
        if gap > TOLERANCE:
            return False
    return candidate.traced.batched == original.traced.batched


def _in_more_digits(
    original: Network,
    candidate: Network,
    exact: tuple[Tensor, Tensor],
    inputs: Mapping[str, Tensor],
    old: tuple[torch.dtype, ...],
    new: torch.dtype,
) -> float:
    """The difference of the graphs in another type, where the merged tensors have the digits that rounding takes from them."""
    graph = recast(candidate.traced.module, old, new)
    rounded = dict(candidate.traced.module.named_parameters())
    for name, parameter in graph.named_parameters():
        for tensor in exact:
            if torch.equal(rounded[name], tensor.to(rounded[name])):
                parameter.data.copy_(tensor)
    wide = recast_inputs(inputs, old, new)
    return difference(call(graph, wide), call(recast(original.traced.module, old, new), wide))


def _candidates(
    network: Network, pair: Neighbours, weight: nn.Parameter, bias: nn.Parameter
) -> Iterator[nn.Module]:
    if isinstance(network.module, KerasModule):
        keras = merged_dense(network.module, pair, weight, bias)
        if keras is not None:
            yield keras
    elif not isinstance(network.module, fx.GraphModule):
        module = copy.deepcopy(network.module)
        if _replaced(module, pair, weight, bias):
            module.train(network.module.training)
            yield module
    yield _graph(network, pair, weight, bias)


def _replaced(
    module: nn.Module, pair: Neighbours, weight: nn.Parameter, bias: nn.Parameter
) -> bool:
    """Whether all layers of the chain are modules: the first one takes everything, the others pass values on."""
    first, *rest = [
        module_path(node) for node in (pair.first.node, *pair.between, pair.second.node)
    ]
    leaves: list[Any] = []
    for path in (first, *rest):
        try:
            leaf = module.get_submodule(path)
        except AttributeError:
            return False
        if not path or next(leaf.children(), None) is not None:
            return False
        leaves.append(leaf)
    made = _layer(leaves[0], leaves[-1], weight, bias)
    if made is None:
        return False
    for path in dict.fromkeys(rest):
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, nn.Identity())
    parent, _, name = first.rpartition(".")
    setattr(module.get_submodule(parent), name, made)
    return True


def _layer(
    first: nn.Module, second: nn.Module, weight: nn.Parameter, bias: nn.Parameter
) -> nn.Module | None:
    """One layer of torch.nn for two."""
    made: Any
    if isinstance(first, nn.Linear):
        made = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    elif isinstance(first, nn.modules.conv._ConvNd) and isinstance(second, nn.modules.conv._ConvNd):
        kind: Any = type(first)
        made = kind(
            weight.shape[1],
            weight.shape[0],
            tuple(weight.shape[2:]),
            tuple(a * b for a, b in zip(first.stride, second.stride, strict=True)),
            first.padding,
            device=weight.device,
            dtype=weight.dtype,
        )
    elif type(first).__name__ == "Conv1D" and weight.ndim == 2:  # GPT-2's linear layer
        kind = type(first)
        made = kind(weight.shape[1], weight.shape[0])
    else:
        return None
    made.weight, made.bias = weight, bias
    return made  # type: ignore[no-any-return]


def _graph(
    network: Network, pair: Neighbours, weight: nn.Parameter, bias: nn.Parameter
) -> fx.GraphModule:
    traced = network.traced
    module = copy.deepcopy(traced.module)
    nodes = dict(zip(traced.module.graph.nodes, module.graph.nodes, strict=True))
    first, second = nodes[pair.first.node], nodes[pair.second.node]
    path, _, leaf = pair.first.weight.rpartition(".")
    owner = module.get_submodule(path)
    names = {}
    for kind, parameter in (("weight", weight), ("bias", bias)):
        name = f"{leaf}_merged_{kind}"
        owner.register_parameter(name, parameter)
        names[kind] = f"{path}.{name}" if path else name
    with module.graph.inserting_before(second):
        made = [module.graph.get_attr(names[kind]) for kind in ("weight", "bias")]
        source = nodes[pair.first.source]
        rest: tuple[Any, ...] = ()
        if pair.first.kind == "convolution":
            strides = [a * b for a, b in zip(pair.first.stride, pair.second.stride, strict=True)]
            rest = (strides, [before for before, _ in pair.first.padding])
        target: Any = first.target
        if pair.first.kind == "convolution":
            target = getattr(torch.ops.aten, f"conv{weight.ndim - 2}d").default
        if pair.first.kind == "matmul":
            product = module.graph.call_function(torch.ops.aten.matmul.default, (source, made[0]))
            product.meta = dict(second.meta)
            target, source, made = torch.ops.aten.add.Tensor, product, made[1:]
        replacement = module.graph.call_function(target, (source, *made, *rest))
        replacement.meta = dict(second.meta)
    second.replace_all_uses_with(replacement)
    module.graph.eliminate_dead_code()
    used = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    for name in [*dict(module.named_parameters()), *dict(module.named_buffers())]:
        if name not in used:
            parent, _, last = name.rpartition(".")
            delattr(module.get_submodule(parent), last)
    module.graph.lint()
    module.recompile()
    result = named(module, traced)
    result.train(network.module.training)
    return result
