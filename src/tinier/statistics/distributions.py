"""The distribution of every weight and every activation of a network."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tinier.graph.fold import fold, read
from tinier.graph.macs import module_path
from tinier.graph.rules import operator_name
from tinier.graph.stored import stored
from tinier.network import Network
from tinier.statistics.activations import collect, floating_activations
from tinier.statistics.chunks import Batch
from tinier.tensors.affine import Integers
from tinier.tensors.distribution import Distribution, distribution
from tinier.tensors.grid import choose
from tinier.tensors.histogram import Histogram


@dataclass(frozen=True)
class Described:
    """A tensor of a network and how its values are distributed.

    Attributes:
        name: of the parameter, or of the node in the folded graph.
        kind: "weight" or "activation".
        what: for activations, the operator and the module that it is in; for weights the operators that read them.
        shape: 0 for a free size.
        values: how they are distributed; None where they are not finite, or there are none.
    """

    name: str
    kind: str
    what: str
    shape: tuple[int, ...]
    values: Distribution | None


def describe_weights(network: Network) -> list[Described]:
    """Every floating-point parameter of two or more dimensions, with batch norms folded in, in the order of the graph.

    Noise is that of symmetric integers with one scale a channel that clip nothing.

    Cost:
        A dozen passes over the weights.
    """
    module = fold(network.traced.module)
    axes = {name: store.axis for name, store in stored(module).items()}
    found: dict[str, list[fx.Node]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        found.setdefault(str(node.target), []).extend(node.users)
    result = []
    for name, readers in found.items():
        weight = read(module, name)
        if weight is not None and weight.is_floating_point() and weight.ndim > 1 and weight.numel():
            what = ", ".join(dict.fromkeys(operator_name(reader) for reader in readers))
            values = _of_weight(weight.detach(), axes.get(name, 0))
            result.append(Described(name, "weight", what, tuple(weight.shape), values))
    return result


def describe_activations(network: Network, batches: Iterable[Batch]) -> list[Described]:
    """Every floating-point value that depends on the inputs, over data, in the order of the graph.

    Noise is that of unsigned integers with one range of least squared error. Views, which have the values of others, are left out.

    Args:
        network: left as it is.
        batches: as for ``collect``.

    Raises:
        DataError: as ``collect``, but for what is not finite inside the network.

    Cost:
        One run of the network; memory is flat in the number of examples.
    """
    nodes = {node.name: node for node in fold(network.traced.module).graph.nodes}
    watched = [name for name in floating_activations(network) if not _is_view(nodes[name])]
    histograms = collect(network, batches, watched).activations
    return [
        Described(
            name,
            "activation",
            _where(nodes[name]),
            tuple(size if isinstance(size, int) else 0 for size in nodes[name].meta["val"].shape),
            distribution(histogram) if histogram.finite else None,
        )
        for name, histogram in histograms.items()
    ]


def _of_weight(weight: Tensor, axis: int) -> Distribution | None:
    histogram = Histogram()
    histogram.add(weight)
    if not histogram.finite:
        return None
    matrix = weight.float().movedim(axis, 0).flatten(1)
    power = float(matrix.square().sum(dtype=torch.float64))

    def noise(bits: int) -> float:
        rounded = choose(matrix, Integers.signed(bits)).nearest(matrix)
        lost = (matrix - rounded).square().sum(dtype=torch.float64)
        return float(lost) / power if power else 0.0

    return distribution(histogram, symmetric=True, noise=noise)


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(
        result.alias_info is not None for result in target._schema.returns
    )


def _where(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    path = module_path(node)
    return f"{operator_name(node)} in {path}" if path else operator_name(node)
