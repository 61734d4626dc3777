"""Layers with parameters, of an imported graph in which weights are constants."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

# The least exponent, Resize's scales and the like are no weights, and statistics of a batch norm are no parameters.
NO_WEIGHTS = (
    "_resize",
    "_upsample",
    "clamp",
    "pow",
    "where",
    "eq",
    "maximum",
    "minimum",
    "_pad_impl",
)


def linear_layers(module: fx.GraphModule) -> None:
    """Products with a constant matrix, and the constant vector that is added, as linear layers."""
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is torch.matmul:
            (x, matrix), bias, transposed = node.args[:2], None, False
        elif node_name(node) == "_gemm":
            x, matrix, bias, alpha, beta, flip, transposed = node.args
            vector = _constant(module, bias)
            if flip or alpha != 1 or beta != 1 or (bias is not None and vector is None):
                continue
            if vector is not None and vector.ndim != 1:
                continue
        else:
            continue
        weight = _constant(module, matrix)
        if weight is None or weight.ndim != 2 or len(matrix.users) != 1:
            continue
        weight = weight if transposed else weight.t()
        last = node
        if bias is None and len(node.users) == 1:
            user = next(iter(node.users))
            other = [argument for argument in user.args if argument is not node]
            vector = _constant(module, other[0]) if len(other) == 1 else None
            adds = user.target in (torch.add, operator.add) and not user.kwargs
            if adds and vector is not None and vector.shape == weight.shape[:1]:
                last, bias = user, other[0]
        vector = _constant(module, bias)
        if vector is not None and vector.shape != weight.shape[:1]:
            continue
        setattr(module, str(matrix.target), weight.contiguous())
        with module.graph.inserting_before(last):
            if isinstance(bias, fx.Node):
                # The vector may be read after the product: read it again here.
                bias = module.graph.get_attr(str(bias.target))
            linear = module.graph.call_function(F.linear, (x, matrix, bias))
        linear.meta.update(node.meta)
        last.replace_all_uses_with(linear)
        module.graph.erase_node(last)
        if last is not node:
            module.graph.erase_node(node)


def embeddings(module: fx.GraphModule) -> None:
    """Rows of a constant float matrix, chosen by data, as an embedding."""
    for node in module.graph.nodes:
        if node_name(node) != "_gather" or node.args[2] != 0:
            continue
        table, indices = node.args[:2]
        weight = _constant(module, table)
        if weight is None or weight.ndim != 2 or indices.op == "get_attr":
            continue
        node.args, node.target = (indices, table), F.embedding


def _constant(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The float constant that a node reads, or None."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = module.get_buffer(str(node.target))
    return value if value.is_floating_point() else None


def parameters(module: fx.GraphModule) -> None:
    """Make parameters of the weights: finite float tensors of more than one value that layers read."""
    weights: set[str] = set()
    others: set[str] = set()
    for node in module.graph.nodes:
        name = node_name(node)
        for index, argument in enumerate(node.args):
            if not isinstance(argument, fx.Node) or argument.op != "get_attr":
                continue
            statistic = name == "_batch_norm" and index in (3, 4)
            layer = name in ("linear", "_conv", "_conv_transpose", "_gemm", "_batch_norm")
            value = getattr(module, str(argument.target))
            fits = value.is_floating_point() and bool(value.isfinite().all())
            if fits and not statistic and name not in NO_WEIGHTS and (layer or value.numel() > 1):
                weights.add(str(argument.target))
            else:
                others.add(str(argument.target))
        for argument in node.all_input_nodes:
            if argument.op == "get_attr" and argument not in node.args:
                others.add(str(argument.target))
    for name in sorted(weights - others):
        value = getattr(module, name)
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(value.detach().clone()))


def node_name(node: fx.Node) -> str:
    """The name of the function that a node calls; of other nodes nothing."""
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""
