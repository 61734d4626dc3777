"""Which parameters can be stored as integers and dequantized where they are read: those of linear maps, recurrent layers and embeddings."""

from dataclasses import dataclass

import torch
from torch import fx

from tinier.graph.fold import read
from tinier.graph.layers import linear_layer
from tinier.graph.rules import operator_name

LAYERS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
RECURRENT = (*LAYERS, *(f"{name}_cell" for name in LAYERS))


@dataclass(frozen=True)
class Store:
    """A parameter that can be integers.

    Attributes:
        name: of the parameter.
        kind: "linear", "convolution", "transposed", "recurrent" or "embedding".
        axis: dimension of its channels, each of which has scales of its own.
        readers: the nodes that read it.
    """

    name: str
    kind: str
    axis: int
    readers: tuple[str, ...]


def stored(module: fx.GraphModule) -> dict[str, Store]:
    """The parameters of a folded graph that can be integers, in its order.

    Args:
        module: a graph from `fold`.

    Returns:
        Name → how it is read. Left out are parameters that anything else reads too, or that two read along different channels.

    Cost:
        One pass over the graph.
    """
    found: dict[str, Store | None] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        weight = read(module, name)
        if weight is None or weight.ndim < 2 or weight.dtype != torch.float32:
            continue
        for reader in node.users:
            role = _role(reader, name)
            known = found.get(name, Store(name, *role, ()) if role else None)
            if role is None or known is None or known.axis != role[1]:
                found[name] = None
            else:
                found[name] = Store(name, known.kind, known.axis, (*known.readers, reader.name))
    return {name: store for name, store in found.items() if store is not None}


def _role(reader: fx.Node, name: str) -> tuple[str, int] | None:
    """(kind, channels) in which a node reads a parameter of two or more dimensions; None for any other use."""
    operator = operator_name(reader)
    if operator in RECURRENT:
        return "recurrent", 0
    if operator == "embedding":
        return "embedding", 0
    layer = linear_layer(reader)
    if layer is None or layer.weight != name:
        return None
    if layer.kind == "transposed":
        return ("transposed", 1) if layer.groups == 1 else None
    if layer.kind == "matmul":
        return ("linear", 1) if layer.groups == 1 else None
    return layer.kind, 0
