"""What a network computes: one graph of ATen operators, with free batch size."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from tinier.errors import ModelError


@dataclass(frozen=True)
class Traced:
    """The graph of a network in evaluation mode.

    Attributes:
        module: runs the graph; parameters and buffers have the names of the traced module, and are copies.
        inputs: names of the placeholders, in the order of the example.
        outputs: name of each tensor that the network returns.
        batched: whether the batch size (dimension 0 of every input) is free in the graph.
    """

    module: fx.GraphModule
    exported: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batched: bool


def trace(module: nn.Module, example: Mapping[str, Tensor]) -> Traced:
    """Trace a network with ``torch.export`` in evaluation mode.

    Dimension 0 of each input is the batch and stays free where the model allows it; of integer inputs (token ids and masks)
    every dimension does.

    Args:
        module: the network; its mode and its parameters are left as they are.
        example: input name → tensor with batch size 2 or more (1 fixes the batch size).

    Returns:
        The traced network; its parameters are copies.

    Raises:
        ModelError: the network cannot be traced; the message has the line of the model that stopped it.

    Cost:
        One run of the network, plus seconds for large graphs; one copy of the parameters.
    """
    dynamic = {
        name: {
            dim: Dim.AUTO
            for dim in range(tensor.ndim)
            if tensor.shape[dim] > 1 and (dim == 0 or not tensor.is_floating_point())
        }
        for name, tensor in example.items()
    }
    training = module.training
    module.eval()
    try:
        with quiet(), torch.no_grad():
            exported = torch.export.export(
                module, (), dict(example), dynamic_shapes=dynamic, strict=False
            )
            graph_module = exported.module(check_guards=False)
    except Exception as error:
        raise ModelError(
            f"the network cannot be traced by torch.export: {_first_lines(error)}"
        ) from error
    finally:
        module.train(training)
    names = tuple(example)
    plain = _plain(graph_module, names)
    batched = all(
        # A symbol may have been found to have one value only: ``len(x)`` in a model fixes it.
        not isinstance(size := node.meta["val"].shape[0], int) and size.node.maybe_as_int() is None
        for node in plain.graph.find_nodes(op="placeholder")
        if node.meta["val"].ndim
    )
    return Traced(plain, exported, names, output_names(module, example), batched)


def _plain(exported: nn.Module, names: tuple[str, ...]) -> fx.GraphModule:
    """The exported graph with ordinary arguments, a flat tuple as result and tensors of its own.

    torch.export's module checks its inputs and packs its outputs by a fixed call form; edited graphs outlive that form.
    """
    assert isinstance(exported, fx.GraphModule)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs = iter(names)
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            copies[node] = graph.placeholder(next(inputs))
            copies[node].meta = dict(node.meta)
        elif node.op == "output":
            leaves = [leaf for leaf in pytree.tree_leaves(node.args[0]) if leaf is not None]
            graph.output(tuple(copies[leaf] for leaf in leaves if isinstance(leaf, fx.Node)))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.eliminate_dead_code()
    # Tied tensors stay tied: one copy for each tensor, under every name that it has.
    own: dict[int, Tensor] = {}
    root = nn.Module()
    tensor: Tensor
    for name, tensor in exported.named_parameters(remove_duplicate=False):
        parameter = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
        _register(root, name, own.setdefault(id(tensor), parameter))
    for name, tensor in exported.named_buffers(remove_duplicate=False):
        _register(root, name, own.setdefault(id(tensor), tensor.detach().clone()))
    for node in graph.find_nodes(op="get_attr"):
        value = _attribute(exported, node.target)
        if not isinstance(value, Tensor):
            raise ModelError(f"the traced graph holds {node.target}, which is not a tensor")
        if _attribute(root, node.target) is None:
            _register(root, node.target, value.detach().clone())
    module = fx.GraphModule(root, graph)
    return module.eval()


def output_names(module: nn.Module, example: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the tensors that a network returns: the keys of a dict or Hugging Face output, else output_0, output_1, …"""
    with evaluating(module), torch.no_grad():
        result = module(**example)
    if isinstance(result, Mapping):
        names = []
        for key, value in result.items():
            count = sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
            names += [key] if count == 1 else [f"{key}_{index}" for index in range(count)]
        return tuple(names)
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return ("output",) if len(leaves) == 1 else tuple(f"output_{i}" for i in range(len(leaves)))


def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Run a network and flatten what it returns to a tuple of tensors."""
    return tuple(leaf for leaf in pytree.tree_leaves(module(**inputs)) if isinstance(leaf, Tensor))


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each submodule's own mode again afterwards."""
    modes = {name: part.training for name, part in module.named_modules()}
    module.eval()
    try:
        yield
    finally:
        for name, part in module.named_modules():
            part.training = modes[name]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch says to its own developers while it traces and exports."""
    loggers = [
        logging.getLogger(name) for name in ("torch.export", "torch.onnx", "torch.fx", "onnxscript")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _register(root: nn.Module, name: str, value: Tensor) -> None:
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)


def _attribute(root: object, name: str) -> object:
    for part in name.split("."):
        root = getattr(root, part, None)
    return root


def _first_lines(error: Exception, count: int = 6) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return "\n  ".join(lines[:count]) or type(error).__name__
