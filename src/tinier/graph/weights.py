"""Which parameters are weights of linear maps, and which of their dimensions reads the input."""

from dataclasses import dataclass

from torch import Tensor, fx

from tinier.graph.groups import named_tensors
from tinier.graph.rules import operator_name
from tinier.graph.trace import Traced

LINEAR = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm")
CONVOLUTION = ("conv1d", "conv2d", "conv3d", "convolution", "_convolution")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@dataclass(frozen=True)
class Weight:
    """A parameter that multiplies an activation.

    Attributes:
        name: of the parameter.
        kind: "linear", "convolution" or "recurrent".
        inputs: the dimension that the sum runs over.
        outputs: the dimension of the results.
        shared: whether something else reads it as well, as an embedding whose table is the weight of the last layer.
    """

    name: str
    kind: str
    inputs: int
    outputs: int
    shared: bool


def weights(traced: Traced) -> dict[str, Weight]:
    """The weights of the linear maps of a network, in the order of the graph.

    Args:
        traced: the network.

    Returns:
        Name → weight; a tied tensor under the name that the graph reads first.

    Cost:
        One pass over the operators.
    """
    tensors = named_tensors(traced.module)
    trainable = {id(p) for p in traced.module.parameters()}
    readers: dict[int, list[tuple[str, int, int] | None]] = {}
    names: dict[int, str] = {}
    for node in traced.module.graph.nodes:
        for source in node.all_input_nodes:
            tensor = tensors.get(str(source.target)) if source.op == "get_attr" else None
            if tensor is not None and id(tensor) in trainable and tensor.ndim > 1:
                names.setdefault(id(tensor), str(source.target))
                readers.setdefault(id(tensor), []).append(_role(node, source, tensor))
    found = {}
    for key, roles in readers.items():
        known = [role for role in roles if role is not None]
        if known:
            shared = len(set(roles)) > 1
            found[names[key]] = Weight(names[key], *known[0], shared)
    return found


def _role(node: fx.Node, source: fx.Node, tensor: Tensor) -> tuple[str, int, int] | None:
    """(kind, input dimension, output dimension) in which a node uses a parameter; None for any other use."""
    name = operator_name(node)
    if name in RECURRENT:
        return ("recurrent", 1, 0) if tensor.ndim == 2 else None
    place = next((i for i, argument in enumerate(node.args) if argument is source), None)
    if name in ("linear", *CONVOLUTION, *TRANSPOSED):
        if place != 1:
            return None
        transposed = name in TRANSPOSED or (name in CONVOLUTION[3:] and bool(node.args[6]))
        if transposed:
            return ("convolution", 0, 1)
        return ("linear" if name == "linear" else "convolution", 1, 0)
    if name in LINEAR and place == (2 if name in ("addmm", "baddbmm") else 1):
        return ("linear", tensor.ndim - 2, tensor.ndim - 1)
    return None


def tables(traced: Traced) -> tuple[str, ...]:
    """The tables of embeddings: parameters whose rows are looked up.

    Args:
        traced: the network.

    Returns:
        Names, in the order of the graph; a tied tensor under the name that the graph reads first.
    """
    tensors = named_tensors(traced.module)
    found: dict[int, str] = {}
    for node in traced.module.graph.nodes:
        source = node.args[0] if operator_name(node) in ("embedding", "embedding_bag") else None
        if isinstance(source, fx.Node) and source.op == "get_attr":
            found.setdefault(id(tensors[str(source.target)]), str(source.target))
    return tuple(found.values())
