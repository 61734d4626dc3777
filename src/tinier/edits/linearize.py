"""Linearize: an activation function becomes a straight line for each channel."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from tinier.edits.base import Edit
from tinier.edits.proof import NOT_PROVED, TOLERANCE, difference, on_meta, random_inputs
from tinier.edits.slice import named
from tinier.edits.stock_keras_layers import with_lines
from tinier.errors import RefusedError
from tinier.graph.activations import Activation, Line, activations, straightened
from tinier.graph.macs import module_path
from tinier.modules.affine import ChannelAffine
from tinier.modules.keras import KerasModule
from tinier.network import Network

Found = list[tuple[Activation, Line]]
GRAPH = "what is left is the traced graph: not every activation function is a module of its own, whose place a line could take"


@dataclass(frozen=True)
class Linearize(Edit):
    """Replace one use of an activation function by y = slope · x + intercept.

    Attributes:
        activation: its name, as ``graph.activations`` gives it.
        slope: of each channel.
        intercept: of each channel.
        score: by which it was chosen; None where it was not.
    """

    kind: ClassVar[str] = "linearize"

    activation: str
    slope: tuple[float, ...]
    intercept: tuple[float, ...]
    score: float | None = None

    def row(self) -> tuple[str, str]:
        """The activation, and what stands there now."""
        score = "" if self.score is None else f", score {self.score:.2g}"
        return self.activation, f"{len(self.slope)} lines{score}"

    @classmethod
    def apply_all(cls, edits: list[Edit], network: Network) -> Network:
        """A network with fewer activation functions, proved equal to the original with lines in their place.

        The user's class stays where each of the functions is a module of its own; else the traced graph takes its place.

        Raises:
            RefusedError: an activation is not there, or the proof fails.

        Cost:
            Copies of the network and a few runs.
        """
        names = {one.name: one for one in activations(network.traced)}
        found: Found = []
        for edit in edits:
            assert isinstance(edit, Linearize)
            one = names.get(edit.activation)
            if (
                one is None
                or one.channels != len(edit.slope)
                or len(edit.slope) != len(edit.intercept)
            ):
                raise RefusedError(
                    f"linearize {edit.activation} of {len(edit.slope)} channels: the network has no such activation function; "
                    f"there are {', '.join(names) or 'none'}"
                )
            slope, intercept = torch.tensor(edit.slope), torch.tensor(edit.intercept)
            found.append((one, Line(slope, intercept)))
        for module in _candidates(network, found):
            candidate = Network(module, network.example, network.name, network.folder)
            if on_meta(network):
                return candidate.noted(NOT_PROVED)
            if _equal(network, candidate, found):
                lost = isinstance(module, fx.GraphModule) > isinstance(
                    network.module, fx.GraphModule
                )
                return candidate.noted(*network.notes, *([GRAPH] if lost else []))
        raise RefusedError(
            f"{network.name}: with lines for {', '.join(one.name for one, _ in found)} it is not the original with lines there"
        )


def _equal(original: Network, candidate: Network, found: Found) -> bool:
    lines = dict(found)
    for inputs in (random_inputs(original, seed=0), dict(original.example)):
        wanted = straightened(original.traced, lines, inputs)
        try:
            got = candidate(inputs)
            with torch.no_grad():
                traced = tuple(candidate.traced.module(**inputs))
        except Exception:  # the user's code with another module inside: anything may be raised
            return False
        if (
            len(got) != len(wanted)
            or max(difference(got, wanted), difference(traced, wanted)) > TOLERANCE
        ):
            return False
    return candidate.traced.batched == original.traced.batched


def _candidates(network: Network, found: Found) -> Iterator[nn.Module]:
    if isinstance(network.module, KerasModule):
        keras = with_lines(network.module, found)
        if keras is not None:
            yield keras
    elif not isinstance(network.module, fx.GraphModule):
        module = copy.deepcopy(network.module)
        if all(_replaced(module, one, line) for one, line in found):
            module.train(network.module.training)
            yield module
    yield _graph(network, found)


def _replaced(module: nn.Module, one: Activation, line: Line) -> bool:
    """Whether the activation is a leaf module, which a line could take the place of."""
    path = module_path(one.node)
    try:
        leaf = module.get_submodule(path)
    except AttributeError:
        return False
    if not path or next(leaf.children(), None) is not None:
        return False
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, _affine(module, one, line))
    return True


def _affine(module: nn.Module, one: Activation, line: Line) -> ChannelAffine:
    """The line in the type of the network's parameters, frozen where all of them are."""
    parameters = list(module.parameters())
    made = ChannelAffine(line.slope, line.intercept, one.dim)
    if not parameters:
        return made
    return made.to(parameters[0]).requires_grad_(any(p.requires_grad for p in parameters))


def _graph(network: Network, found: Found) -> fx.GraphModule:
    traced = network.traced
    module = copy.deepcopy(traced.module)
    nodes = dict(zip(traced.module.graph.nodes, module.graph.nodes, strict=True))
    for number, (one, line) in enumerate(found):
        node = nodes[one.node]
        name = f"line_{number}"
        while hasattr(module, name):
            name += "_"
        module.add_module(name, _affine(module, one, line))
        rank = one.node.meta["val"].ndim
        shape = [1] * rank
        shape[one.dim] = one.channels
        aten = torch.ops.aten
        with module.graph.inserting_before(node):
            slope = module.graph.get_attr(f"{name}.slope")
            intercept = module.graph.get_attr(f"{name}.intercept")
            slope = module.graph.call_function(aten.view.default, (slope, shape))
            intercept = module.graph.call_function(aten.view.default, (intercept, shape))
            product = module.graph.call_function(aten.mul.Tensor, (nodes[one.source], slope))
            line_node = module.graph.call_function(aten.add.Tensor, (product, intercept))
        node.replace_all_uses_with(line_node)
    module.graph.eliminate_dead_code()
    for one, _ in found:  # an operator in place is never dead code
        if nodes[one.node] in module.graph.nodes:
            module.graph.erase_node(nodes[one.node])
    module.graph.lint()
    module.recompile()
    result = named(module, traced)
    result.train(network.module.training)
    return result
