"""Patterns of a user's layers in the names of the folded graph, where some layers are part of others."""

from collections.abc import Sequence

from torch import fx

from tinier.errors import InputError
from tinier.graph.fold import fold, layer_before, parameter_of, read
from tinier.graph.rules import operator_name
from tinier.methods.base import covers, must_exist
from tinier.network import Network


def resolved(
    patterns: Sequence[str], network: Network, argument: str
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """What each pattern means in the folded graph.

    Args:
        patterns: of modules or parameters of the network.
        network: the float network, as its owner knows it.
        argument: "exclude" or "layers", for the error.

    Returns:
        For each pattern those that fit the weights of the folded graph: itself, or the weights of the layers that what it names is folded
        into; and a sentence for each of the latter.

    Raises:
        InputError: a pattern is of nothing, or of what has no weights.

    Cost:
        A copy of the parameters.
    """
    if not patterns:
        return (), ()
    module = fold(network.traced.module)
    names = [str(node.target) for node in module.graph.find_nodes(op="get_attr")]
    weights = [name for name in names if (value := read(module, name)) is not None and value.ndim > 1]  # fmt: skip
    merged = _merged(network.traced.module, module, set(names))
    others = [*dict.fromkeys((*weights, *names, *merged))]
    found: list[tuple[str, ...]] = []
    notes: list[str] = []
    for pattern in patterns:
        must_exist((pattern,), network, others, argument)
        if any(covers((pattern,), name) for name in weights):
            found.append((pattern,))
            continue
        layers = tuple(dict.fromkeys(w for name, w in merged.items() if covers((pattern,), name)))
        if layers:
            notes.append(
                f"{argument}: {pattern} is folded into {', '.join(layers)}, which is meant by it"
            )
        elif argument != "exclude" or not any(covers((pattern,), name) for name in names):
            raise InputError(
                f"{argument}: {pattern} has no weights that become integers; leave it out, or name a layer with weights: "
                f"{', '.join(weights[:20])}"
            )
        found.append(layers or (pattern,))
    return tuple(found), tuple(notes)


def _merged(before: fx.GraphModule, after: fx.GraphModule, left: set[str]) -> dict[str, str]:
    """Parameter of a batch norm that folding made part of another layer → the weight of that layer in the folded graph."""
    nodes = {node.name: node for node in after.graph.nodes}
    result = {}
    for norm in before.graph.nodes:
        if norm.op != "call_function" or operator_name(norm) != "batch_norm":
            continue
        own = [name for name in map(parameter_of, norm.args[1:5]) if name and name not in left]
        source = layer_before(norm, nodes)
        layer = None if source is None else nodes[source.name]
        weight = parameter_of(layer.args[1]) if layer is not None and len(layer.args) > 1 else None
        result.update(dict.fromkeys(own, weight) if weight else {})
    return result
