"""Split linear layers in two: inputs with outliers, multiplied in float, and all others, that integers are enough for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from tinier.edits.base import Edit
from tinier.edits.pairs import name_outputs
from tinier.errors import RefusedError
from tinier.graph.fold import fold, parameter_of, pruned, read, write
from tinier.graph.placement import ROLES
from tinier.network import Network

aten = torch.ops.aten
PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default)


@dataclass(frozen=True)
class SplitOutliers(Edit):
    """Compute W x + b as W' (x ⊙ m) + b + W_O x_O, where W' and m are 0 for the channels in O: the same function, to rounding.

    Attributes:
        tensor: x, a node of the traced graph, batch norms folded.
        channels: O, positions along the last axis of x.
        weights: the parameters of the linear layers that read x. Each gets a second one beside it, called ``…_outliers``.
    """

    kind: ClassVar[str] = "split_outliers"
    stage: ClassVar[str] = "outliers"
    of_artifact: ClassVar[bool] = True

    tensor: str
    channels: tuple[int, ...]
    weights: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters of the float products."""
        return tuple(f"{weight}_outliers" for weight in self.weights)

    def row(self) -> tuple[str, str]:
        count = len(self.channels)
        layers = ", ".join(self.weights)
        return self.tensor, f"{count} channel{'s' * (count != 1)} in float for {layers}"

    @classmethod
    def apply_all(cls, edits: list[Edit], network: Network) -> Network:
        """See `split_outliers`."""
        return split_outliers([edit for edit in edits if isinstance(edit, cls)], network)


def split_outliers(edits: Sequence[SplitOutliers], network: Network) -> Network:
    """The folded graph with two products in place of one, for each layer that an edit names.

    Raises:
        RefusedError: no such value or layer, channels that it has not, or a weight that others read, too.
    """
    traced = network.traced
    module = fold(traced.module)
    nodes = {node.name: node for node in module.graph.nodes}
    for edit in edits:
        if edit.tensor not in nodes:
            raise RefusedError(f"{network.name} has no value {edit.tensor} to split")
        _split(module, nodes[edit.tensor], edit)
    name_outputs(module, traced)
    module.graph.lint()
    return Network(pruned(module), network.example, network.name, network.folder, network.notes)


def _split(module: fx.GraphModule, source: fx.Node, edit: SplitOutliers) -> None:
    size = int(source.meta["val"].shape[-1])
    index = torch.tensor(edit.channels, dtype=torch.int64)  # (k,)
    if (
        not len(index)
        or len(index.unique()) != len(index)
        or not 0 <= min(index) <= max(index) < size
    ):
        raise RefusedError(f"{edit.tensor}: channels {edit.channels} of {size} cannot be split off")
    mask = torch.ones(size)
    mask[index] = 0
    graph, stem = module.graph, f"{edit.tensor}_outliers"
    write(module, f"{stem}_mask", mask)
    write(module, f"{stem}_index", index)
    with graph.inserting_after(source):
        chosen = graph.get_attr(f"{stem}_index")
    with graph.inserting_after(chosen):
        outliers = graph.call_function(aten.index_select.default, (source, -1, chosen))
    with graph.inserting_after(outliers):
        kept = graph.get_attr(f"{stem}_mask")
    with graph.inserting_after(kept):
        rest = graph.call_function(aten.mul.Tensor, (source, kept))
    rest.meta["val"] = source.meta["val"]
    for name in edit.weights:
        _layer(module, source, (rest, outliers), name, index)


def _layer(
    module: fx.GraphModule,
    source: fx.Node,
    parts: tuple[fx.Node, fx.Node],
    name: str,
    index: Tensor,
) -> None:
    places = [node for node in module.graph.find_nodes(op="get_attr") if node.target == name]
    readers = [reader for place in places for reader in place.users]
    weight = read(module, name)
    if weight is None or len(readers) != 1 or readers[0].target not in PRODUCTS:
        raise RefusedError(
            f"{name}: one linear layer alone must read it for its inputs to be split"
        )
    (reader,) = readers
    role = ROLES[reader.target]
    if (
        reader.args[role.weight_input] is not source
        or parameter_of(reader.args[role.weight]) != name
    ):
        raise RefusedError(f"{name}: it is not multiplied with {source.name}")
    dim = 1 - role.axis  # of the inputs
    rest, outliers = weight.detach().clone(), weight.detach().index_select(dim, index)
    rest.index_fill_(dim, index, 0.0)
    write(module, name, nn.Parameter(rest, weight.requires_grad))
    write(module, f"{name}_outliers", nn.Parameter(outliers, weight.requires_grad))
    graph = module.graph
    reader.replace_input_with(source, parts[0])
    target = aten.linear.default if reader.target is aten.linear.default else aten.mm.default
    with graph.inserting_after(reader):
        second = graph.get_attr(f"{name}_outliers")
    with graph.inserting_after(second):
        product = graph.call_function(target, (parts[1], second))
    with graph.inserting_after(product):
        both = graph.call_function(aten.add.Tensor, (reader, product))
    both.meta = dict(reader.meta)
    reader.replace_all_uses_with(both, delete_user_cb=lambda user: user is not both)
