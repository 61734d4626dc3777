"""Give parameters of the folded graph new values: corrections before quantization, and the weights that training found."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from tinier.edits.base import Edit, Values
from tinier.edits.pairs import name_outputs
from tinier.errors import RefusedError
from tinier.graph.fold import fold, parameter_of, pruned, read, write
from tinier.graph.placement import ROLES, Kind
from tinier.network import Network

STAGE = "fold"


@dataclass(frozen=True)
class Fold(Edit):
    """The traced graph with its batch norms folded into the layers before them, whose parameters `Assign` and `Quantize` name."""

    kind: ClassVar[str] = "fold"
    stage: ClassVar[str] = STAGE
    of_artifact: ClassVar[bool] = True

    def row(self) -> tuple[str, str]:
        return "batch norms", "folded into the layers before them"

    @classmethod
    def apply_all(cls, edits: list[Edit], network: Network) -> Network:
        """See `folded`."""
        return folded(edits, network)


@dataclass(frozen=True)
class Assign(Edit):
    """Give a parameter new values, or a layer without a bias one.

    Attributes:
        tensor: the parameter's name in the folded graph.
        values: of its shape and type.
        reader: for a parameter that does not exist: the layer that reads it as its bias, by its node of the folded graph, or by the weight
            that it alone reads.
        reason: what the values are, for the plan's table.
    """

    kind: ClassVar[str] = "assign"
    stage: ClassVar[str] = STAGE
    of_artifact: ClassVar[bool] = True

    tensor: str
    values: Values
    reader: str = ""
    reason: str = ""

    def row(self) -> tuple[str, str]:
        return self.tensor, self.reason or "new values"

    @classmethod
    def apply_all(cls, edits: list[Edit], network: Network) -> Network:
        """See `folded`."""
        return folded(edits, network)


def folded(edits: list[Edit], network: Network) -> Network:
    """The folded graph as a network, with the values of the `Assign` edits.

    Raises:
        RefusedError: no such parameter or layer, or values of another shape.
    """
    traced = network.traced
    module = fold(traced.module)
    for edit in edits:
        if isinstance(edit, Assign):
            _assign(module, edit, network.name)
    name_outputs(module, traced)
    return Network(pruned(module), network.example, network.name, network.folder, network.notes)


def _assign(module: fx.GraphModule, edit: Assign, name: str) -> None:
    values, old = edit.values.tensor, read(module, edit.tensor)
    if old is None:
        _give_bias(module, edit, name)
    elif old.shape != values.shape or old.dtype != values.dtype:
        raise RefusedError(
            f"{edit.tensor}: values of {values.dtype} {tuple(values.shape)}, "
            f"{old.dtype} {tuple(old.shape)} is needed"
        )
    fresh: torch.Tensor = values.clone()
    if old is None or isinstance(old, nn.Parameter):
        fresh = nn.Parameter(fresh, old is None or old.requires_grad)
    for other, _ in [*module.named_parameters(remove_duplicate=False)]:
        if old is not None and read(module, other) is old:
            write(module, other, fresh)  # tied tensors stay tied
    write(module, edit.tensor, fresh)


def _give_bias(module: fx.GraphModule, edit: Assign, name: str) -> None:
    nodes = {node.name: node for node in module.graph.nodes}
    weight = next((n for n in nodes.values() if parameter_of(n) == edit.reader), None)
    readers = [] if weight is None else list(weight.users)
    node = readers[0] if len(readers) == 1 else nodes.get(edit.reader)
    role = None if node is None or node.op != "call_function" else ROLES.get(node.target)
    if node is None or role is None or role.kind is not Kind.WEIGHTED or role.bias != 2:
        raise RefusedError(f"{name} has no parameter {edit.tensor}")
    if len(node.args) > 2 and node.args[2] is not None:
        raise RefusedError(f"{edit.reader} has the bias {parameter_of(node.args[2])} already")
    write(module, edit.tensor, edit.values.tensor)  # the graph warns of names that are not there
    with module.graph.inserting_before(node):
        bias = module.graph.get_attr(edit.tensor)
    bias.meta["val"] = edit.values.tensor
    node.args = (*node.args[:2], bias, *node.args[3:])
