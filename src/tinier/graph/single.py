"""Networks in half precision, computed in float32: a proof to 1e-5 needs more digits than float16 and bfloat16 have."""

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
    """A copy of a graph that computes in float32 wherever it computed in half precision, node for node.

    Args:
        module: left as it is.

    Returns:
        The copy; conversions to a half type in the graph have become conversions to float32.

    Cost:
        A copy of the parameters in float32.
    """
    result = copy.deepcopy(module)
    result._apply(lambda tensor: tensor.float() if tensor.dtype in HALF else tensor)
    for node in result.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = pytree.tree_map_only(
                torch.dtype, lambda d: torch.float32 if d in HALF else d, (node.args, node.kwargs)
            )
    result.recompile()
    return result


def single_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of half precision as float32, with the same values."""
    return {name: t.float() if t.dtype in HALF else t for name, t in inputs.items()}


def single_traced(traced: Traced, channels: Channels) -> tuple[Traced, Channels]:
    """A trace and its axes in float32; the axes are those of the nodes of the copy."""
    module = single(traced.module)
    new = dict(zip(traced.module.graph.nodes, module.graph.nodes, strict=True))
    return replace(traced, module=module), replace(
        channels,
        axes={new[node]: axes for node, axes in channels.axes.items()},
        heads={new[node]: axes for node, axes in channels.heads.items()},
        outer={new[node]: axis for node, axis in channels.outer.items()},
    )
