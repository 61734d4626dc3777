"""Networks computed in more digits than they have: a proof to 1e-5 needs more than float16, now and then more than float32."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tinier.graph.groups import Channels
from tinier.graph.trace import Traced

HALF = (torch.float16, torch.bfloat16)


def is_half(module: fx.GraphModule, inputs: Mapping[str, Tensor]) -> bool:
    """Whether a network has parameters, buffers or inputs of half precision."""
    tensors = (*module.parameters(), *module.buffers(), *inputs.values())
    return any(tensor.dtype in HALF for tensor in tensors)


def single(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph that computes in float32 wherever it computed in half precision; see ``recast``."""
    return recast(module, HALF, torch.float32)


def recast(
    module: fx.GraphModule, old: tuple[torch.dtype, ...], new: torch.dtype
) -> fx.GraphModule:
    """A copy of a graph that computes in one type wherever it computed in others, node for node.

    Args:
        module: left as it is.
        old: types of parameters, buffers and conversions.
        new: the type that takes their place.

    Cost:
        A copy of the parameters in the new type.
    """
    result = copy.deepcopy(module)
    result._apply(lambda tensor: tensor.to(new) if tensor.dtype in old else tensor)
    for node in result.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = pytree.tree_map_only(
                torch.dtype, lambda d: new if d in old else d, (node.args, node.kwargs)
            )
    result.recompile()
    return result


def recast_inputs(
    inputs: Mapping[str, Tensor], old: tuple[torch.dtype, ...], new: torch.dtype
) -> dict[str, Tensor]:
    """Inputs of some types in another, with the same values."""
    return {name: t.to(new) if t.dtype in old else t for name, t in inputs.items()}


def recast_traced(
    traced: Traced, channels: Channels, old: tuple[torch.dtype, ...], new: torch.dtype
) -> tuple[Traced, Channels]:
    """A trace and its axes in another type; the axes are those of the nodes of the copy."""
    module = recast(traced.module, old, new)
    nodes = dict(zip(traced.module.graph.nodes, module.graph.nodes, strict=True))
    return replace(traced, module=module), replace(
        channels,
        axes={nodes[node]: axes for node, axes in channels.axes.items()},
        heads={nodes[node]: axes for node, axes in channels.heads.items()},
        outer={nodes[node]: axis for node, axis in channels.outer.items()},
    )
