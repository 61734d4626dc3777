"""Factorize: a linear layer or convolution becomes two or three smaller ones."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from tinier.edits.base import Edit, Values
from tinier.edits.proof import TOLERANCE, difference, random_inputs
from tinier.errors import RefusedError
from tinier.graph.fold import parameter_of, pruned, read, write
from tinier.network import Network

aten = torch.ops.aten
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
OPERATORS = {aten.linear.default, aten.conv1d.default, aten.conv2d.default}


@dataclass(frozen=True)
class Factorize(Edit):
    """Replace the weight W of a layer by a product, each factor a layer of its own.

    Attributes:
        tensor: name of W.
        factors: weights of the layers, in the order in which they run: of a linear layer (r, inputs) and (outputs, r); of a convolution
            (r, inputs, *kernel) and (outputs, r, 1…), or, as Tucker-2, (r₂, inputs, 1…), (r₁, r₂, *kernel) and (outputs, r₁, 1…).
    """

    kind: ClassVar[str] = "factorize"

    tensor: str
    factors: tuple[Values, ...]

    def row(self) -> tuple[str, str]:
        """The weight, and the shapes of its factors."""
        shapes = " · ".join("×".join(map(str, f.tensor.shape)) for f in reversed(self.factors))
        return self.tensor, shapes

    @property
    def product(self) -> Tensor:
        """The weight that the factors make together, of the type of the factors."""
        first, *others = (factor.tensor.double() for factor in self.factors)
        spatial = max((f.shape[2:] for f in (first, *others)), key=lambda shape: shape.numel())
        whole = first.flatten(2) if first.ndim > 2 else first[:, :, None]  # (r, inputs, places)
        for other in others:
            flat = other.flatten(2) if other.ndim > 2 else other[:, :, None]
            # One of the two has a single place.
            whole = torch.einsum("orp,riq->oipq", flat, whole).flatten(2)
        return whole.reshape(*whole.shape[:2], *spatial).to(self.factors[0].tensor.dtype)

    @classmethod
    def apply_all(cls, edits: list[Edit], network: Network) -> Network:
        """A network with more and smaller layers, equal to the original with the products as weights; of its class where it has modules.

        Raises:
            RefusedError: there is no such layer, factors do not fit it, or the two differ.

        Cost:
            Two copies of the network and a few runs.
        """
        own = [edit for edit in edits if isinstance(edit, Factorize)]
        graph = isinstance(network.module, fx.GraphModule)
        # A graph of somebody else's has operators of its own: the traced one has those of torch.
        origin = network.traced.module if graph else network.module
        module, dense = copy.deepcopy(origin), copy.deepcopy(origin)
        for edit in own:
            weight = read(dense, edit.tensor)
            product = edit.product
            if weight is None or weight.shape != product.shape:
                found = "no such weight" if weight is None else f"one of {tuple(weight.shape)}"
                raise RefusedError(
                    f"factorize {edit.tensor}: factors of a weight of {tuple(product.shape)}, {network.name} has {found}"
                )
            with torch.no_grad():
                weight.copy_(product)
            if isinstance(module, fx.GraphModule):
                _rewrite(module, edit)
            else:
                _replace(module, edit)
        if isinstance(module, fx.GraphModule):
            module = pruned(module)
        made = Network(module, network.example, network.name, network.folder, network.notes)
        _prove(made, Network(dense, network.example, network.name), own)
        return made


def layers(edit: Factorize, layer: nn.Module) -> nn.Sequential:
    """The layers in place of one, trainable where it is."""
    parts: list[nn.Module] = []
    *first, last = [factor.tensor for factor in edit.factors]
    given: Any = layer
    bias = given.bias
    for number, weight in enumerate((*first, last)):
        own = bias if number == len(first) else None
        if isinstance(layer, nn.Linear):
            part: Any = nn.Linear(weight.shape[1], weight.shape[0], own is not None)
        else:
            kernel = weight.shape[2:]
            whole = kernel == given.weight.shape[2:] and (max(kernel) > 1 or number == 0)
            options = (
                {"stride": given.stride, "padding": given.padding, "dilation": given.dilation}
                if whole
                else {}
            )
            part = type(layer)(
                weight.shape[1], weight.shape[0], kernel, bias=own is not None, **options
            )
        part.weight = nn.Parameter(weight.to(given.weight), given.weight.requires_grad)
        if own is not None:
            part.bias = own
        parts.append(part)
    return nn.Sequential(*parts).train(layer.training)


def _replace(module: nn.Module, edit: Factorize) -> None:
    path = edit.tensor.rpartition(".")[0]
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        layer = nn.Identity()
    if type(layer) not in LAYERS or not path:
        raise RefusedError(
            f"factorize {edit.tensor}: it is no weight of a linear layer or convolution"
        )
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layers(edit, layer))


def _rewrite(module: fx.GraphModule, edit: Factorize) -> None:
    """The operators of the factors in place of the one that reads the weight."""
    graph = module.graph
    readers = [
        node
        for node in graph.nodes
        if node.target in OPERATORS and parameter_of(node.args[1]) == edit.tensor
    ]
    if not readers:
        raise RefusedError(f"factorize {edit.tensor}: no linear layer or convolution reads it")
    old = read(module, edit.tensor)
    assert old is not None
    stem = edit.tensor.removesuffix(".weight").replace(".", "_")
    names = [f"{stem}_factor_{number}" for number in range(len(edit.factors))]
    for name, factor in zip(names, edit.factors, strict=True):
        write(module, name, nn.Parameter(factor.tensor.to(old), old.requires_grad))
    for node in readers:
        value, bias = node.args[0], node.args[2] if len(node.args) > 2 else None
        more = tuple(node.args[3:])
        with graph.inserting_before(node):
            for number, (name, factor) in enumerate(zip(names, edit.factors, strict=True)):
                kernel = factor.tensor.shape[2:]
                whole = kernel == old.shape[2:] and ((max(kernel, default=1) > 1) or number == 0)
                last = number == len(names) - 1
                arguments = (value, graph.get_attr(name), bias if last else None)
                value = graph.call_function(node.target, (*arguments, *(more if whole else ())))
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    graph.lint()
    module.recompile()


def _prove(made: Network, dense: Network, edits: list[Factorize]) -> None:
    """Compare with the network whose weights are the products."""
    inputs = random_inputs(dense, seed=0)
    what = f"{made.name} with {len(edits)} layers factorized"
    try:
        gap = difference(made(inputs), dense(inputs))
        if gap > TOLERANCE:  # what is rounding vanishes in float64
            gap = difference(*(_double(one)(_doubled(inputs)) for one in (made, dense)))
    except Exception as error:  # the user's code with other modules inside: anything may be raised
        raise RefusedError(
            f"{what} does not run ({error}); its code reads a layer's weight itself: exclude that layer"
        ) from error
    if not gap <= TOLERANCE:
        raise RefusedError(
            f"{what} differs by {gap:.1g} (relative) from the network with the products as weights"
        )


def _double(network: Network) -> Callable[[dict[str, Tensor]], tuple[Tensor, ...]]:
    return Network(copy.deepcopy(network.module).double(), _doubled(network.example), network.name)


def _doubled(inputs: Any) -> dict[str, Tensor]:
    return {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
