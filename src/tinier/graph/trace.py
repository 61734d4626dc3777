"""What a network computes: one graph of ATen operators, with free batch size."""

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree

from tinier.errors import ModelError
from tinier.graph.capture import DependsOnData, capture, has_values, register, same_values
from tinier.graph.fast import record
from tinier.graph.functional import without_writes
from tinier.graph.origin import line_of
from tinier.graph.states import evaluating, quiet, unchanged
from tinier.graph.unfuse import unfuse

MOST_BATCH = 2**16  # a batch size that is free up to here is free


@dataclass(frozen=True)
class Traced:
    """The graph of a network in evaluation mode.

    Attributes:
        module: runs the graph; parameters and buffers have the names of the traced module. Parameters share their memory with it:
            whoever trains or changes them works on a deep copy.
        inputs: names of the placeholders, in the order of the example.
        outputs: name of each tensor that the network returns.
        batched: whether the batch size (dimension 0 of every input) is free in the graph.
        export: makes ``exported``.
        named: whether it returns a dict or the like, whose keys are the names of the outputs.
        by_export: whether the graph is that of torch.export, because recordings did not give one.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batched: bool
    export: Callable[[], ExportedProgram]
    by_export: bool
    named: bool = False

    @cached_property
    def exported(self) -> ExportedProgram:
        """The same network as a program of torch.export, made when first asked for."""
        return self.export()


def trace(module: nn.Module, example: Mapping[str, Tensor]) -> Traced:
    """The graph of a network in evaluation mode: recorded runs without values, else ``torch.export``, else a recorded run.

    Dimension 0 of each input is the batch and stays free where the model allows it; so does every dimension of integer inputs (token
    ids and masks), and the length of float sequences and signals where all that follows it does so by a straight line. Dimensions of
    size 1 are fixed, and so are pictures' sides: many models compute sizes from them that only a run can tell.

    Args:
        module: the network; its mode, parameters, buffers and gradients are left as they are.
        example: input name → tensor with batch size 2 or more (1 fixes the batch size).

    Returns:
        The traced network. Its parameters share their memory with the module's, its buffers are copies.

    Raises:
        ModelError: the network cannot be traced; the message has the line of the model that stopped it.

    Cost:
        Tenths of a second for a hundred operators, seconds where torch.export is needed; no run of the network and no copy of its
        parameters, but where torch.export fails.
    """
    check(module)
    names = tuple(example)
    with evaluating(module):
        try:
            with quiet():
                graph, result = record(module, example, _free, _lengths)
        # The user's code runs inside. What stops it here may not stop torch.export, which says why where it does.
        except Exception:
            return by_export(module, example)
    unfuse(graph)
    without_writes(graph)
    dims = _dims(example)
    for node in graph.graph.find_nodes(op="placeholder"):
        dims[node.target] = [d for d, size in enumerate(node.meta["val"].shape) if is_free(size)]

    def export() -> ExportedProgram:
        with evaluating(module):
            try:
                found = _export(module, example, dims)
            except Exception:
                if dims == _dims(example):
                    raise
                found = _export(module, example)
            # Code that makes numbers of a size fixes it for torch.export; the recording is the same network, and has it free.
            with contextlib.suppress(Exception):
                other = found if _as_free(found, dims) else _export(graph, example, dims)
                return other if _as_free(other, dims) else found
            return found

    named = isinstance(result, Mapping)
    return Traced(graph, names, _names(result), _batched(graph), export, False, named)


def by_export(module: nn.Module, example: Mapping[str, Tensor]) -> Traced:
    """As ``trace``, by ``torch.export`` at once, else by a recorded run with values."""
    names = tuple(example)
    result: Any = None
    try:
        exported = _export(module, example)
        graph = plain(exported.module(check_guards=False), names)
        if has_values(module, example) and not same_values(module, graph, example):
            # It asks whether it is exported, and computes something else then.
            with contextlib.suppress(Exception):
                captured, ran = _captured(module, example, ModelError("another graph"))
                other = _export(captured, example)
                graph, exported, result = plain(other.module(check_guards=False), names), other, ran
    # The user's code runs inside, and torch.export has no common base for what stops it.
    except Exception as error:
        captured, result = _captured(module, example, error)
        try:
            exported = _export(captured, example)
            graph = plain(exported.module(check_guards=False), names)
        except Exception as second:
            raise _refusal(error, second) from error
    unfuse(graph)
    without_writes(graph)
    if result is None:
        spec = exported.call_spec.out_spec
        (output,) = exported.graph.find_nodes(op="output")
        returned = list(output.args[0])[-spec.num_leaves :] if spec.num_leaves else []  # type: ignore[arg-type, union-attr]
        values = [leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf for leaf in returned]
        result = pytree.tree_unflatten(values, spec)
    batched = _batched(graph) and not _bounded(exported)
    named = isinstance(result, Mapping)
    return Traced(graph, names, _names(result), batched, lambda: exported, True, named)


def _as_free(program: ExportedProgram, dims: Mapping[str, list[int]]) -> bool:
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    shapes = [nodes[str(name)].meta["val"].shape for name in program.graph_signature.user_inputs]
    pairs = zip(shapes, dims.values(), strict=True)
    return all(is_free(shape[d]) for shape, free in pairs for d in free)


def _bounded(exported: ExportedProgram) -> bool:
    """Whether the graph is right for small batches only: the network takes another way for large ones."""
    limits = exported.range_constraints
    for node in exported.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        size = value.shape[0] if isinstance(value, Tensor) and value.ndim else 0
        found = None if isinstance(size, int) else limits.get(size.node.expr)
        if found is not None and bool(found.upper < MOST_BATCH):
            return True
    return False


def _batched(graph: fx.GraphModule) -> bool:
    return all(
        is_free(node.meta["val"].shape[0])
        for node in graph.graph.find_nodes(op="placeholder")
        if node.meta["val"].ndim
    )


def is_free(size: Any) -> bool:
    """A symbol may have been found to have one value only: ``len(x)`` in a model fixes it."""
    return not isinstance(size, int) and size.node.maybe_as_int() is None


def check(module: nn.Module) -> None:
    """Refuse modules that nothing can trace, with a way out; nothing is run, which would give lazy layers their shapes.

    Raises:
        ModelError: TorchScript, lazy layers that were never run, or layers that are quantized already.
    """
    for path, part in module.named_modules():
        named = f"its module {path}" if path else "the network"
        if isinstance(part, torch.jit.ScriptModule) and (
            not path or next(part.parameters(), None) is not None
        ):
            raise ModelError(
                f"{named} is TorchScript, which hides its operators; give the nn.Module that it was made from, or export it to ONNX"
            )
        if type(part).__module__.startswith("torch.ao.nn.quantized"):
            raise ModelError(
                f"{named} is already quantized ({part._get_name()}); give the float model, and quantize the smaller one"
            )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise ModelError(
                f"{name} has no shape yet, for its layer is lazy; run it once on the example: model(*example)"
            )


def _export(
    module: nn.Module, example: Mapping[str, Tensor], dims: Mapping[str, list[int]] | None = None
) -> ExportedProgram:
    free = _dims(example) if dims is None else dims
    dynamic = {name: dict.fromkeys(free[name], Dim.AUTO) for name in example}
    # torch.export prints the graph so far of what it cannot take.
    with (
        quiet(),
        contextlib.redirect_stderr(io.StringIO()),
        torch.no_grad(),
        unchanged(module),
    ):
        found = torch.export.export(module, (), dict(example), dynamic_shapes=dynamic, strict=False)
        # Inside of torch.vmap tensors lack the dimension that it maps over; a run below it has the operators on whole tensors.
        mapped = any(
            getattr(node.target, "__name__", "") == "_add_batch_dim" for node in found.graph.nodes
        )
        return found.run_decompositions({}) if mapped else found


def _free(tensor: Tensor) -> range:
    """The dimensions whose size may change from call to call: the batch, and everything of token ids and masks."""
    return range(min(tensor.ndim, 1) if tensor.is_floating_point() else tensor.ndim)


def _dims(example: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: [d for d in _free(t) if t.shape[d] > 1] for name, t in example.items()}


def _lengths(tensor: Tensor) -> range:
    """The dimensions of signals and of sequences of vectors that may be their length."""
    return range(1, tensor.ndim if tensor.ndim <= 3 else 1)


def _captured(
    module: nn.Module, example: Mapping[str, Tensor], error: Exception
) -> tuple[nn.Module, Any]:
    """The network as a recorded run of it; raises ModelError, with what stopped torch.export, where there is none."""
    if not has_values(module, example):
        raise _refusal(error) from error  # there is nothing to run
    free = []
    for dim in range(max(tensor.ndim for tensor in example.values())):
        dims = {name: dim for name, tensor in example.items() if dim in _free(tensor)}
        sizes = {example[name].shape[dim] for name in dims}
        if len(sizes) == 1 and min(sizes) > 1:
            free.append(dims)
    try:
        with quiet():
            return capture(module, example, free)
    except Exception as second:
        raise _refusal(error, second) from error


def _refusal(error: Exception, second: Exception | None = None) -> ModelError:
    """Why there is no graph, with the line of the model; the second reason is that of the recorded run."""
    depends = isinstance(second, DependsOnData)
    line = line_of(second) if depends and second else line_of(error)
    where = f" at {line}" if line else ""
    if depends:
        return ModelError(
            f"the network cannot be traced: its path or a shape depends on the values of its inputs{where}; "
            f"write it with torch operators that keep the shape (torch.where, masks), or torch.cond. {second}"
        )
    also = f"\n  a recorded run failed, too: {_first_lines(second, 2)}" if second else ""
    return ModelError(f"the network cannot be traced{where}: {_first_lines(error)}{also}")


def plain(exported: nn.Module, names: tuple[str, ...]) -> fx.GraphModule:
    """The exported graph with ordinary arguments, a flat tuple as result and parameters of its own.

    torch.export's module checks its inputs and packs its outputs by a fixed call form; edited graphs outlive that form.
    """
    assert isinstance(exported, fx.GraphModule)
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    inputs = iter(names)
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            copies[node] = graph.placeholder(next(inputs))
            copies[node].meta = dict(node.meta)
        elif node.op == "output":
            found = pytree.tree_leaves(node.args[0])
            graph.output(tuple(copies[leaf] for leaf in found if isinstance(leaf, fx.Node)))
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            copies[node] = _inlined(graph, exported, node, copies)
        elif node.op == "get_attr" and isinstance(_attribute(exported, node.target), nn.Module):
            continue  # the body of a higher-order operator
        elif node.target is getitem and isinstance(copies[node.args[0]], tuple):
            copies[node] = copies[node.args[0]][node.args[1]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.eliminate_dead_code()
    # Tied tensors stay tied: one tensor under every name that it has. Parameters share their memory with the user's, for nothing
    # here writes to them, but gradients and requires_grad are their own; the graph may write to buffers, so they are copies.
    own: dict[int, Tensor] = {}
    root = nn.Module()
    tensor: Tensor
    changed = written(graph)
    for name, tensor in exported.named_parameters(remove_duplicate=False):
        data = tensor.detach().clone() if name in changed else tensor.detach()
        parameter = nn.Parameter(data, tensor.requires_grad)
        register(root, name, own.setdefault(id(tensor), parameter))
    for name, tensor in exported.named_buffers(remove_duplicate=False):
        register(root, name, own.setdefault(id(tensor), tensor.detach().clone()))
    for node in graph.find_nodes(op="get_attr"):
        value = _attribute(exported, node.target)
        if not isinstance(value, Tensor):
            raise ModelError(f"the traced graph holds {node.target}, which is not a tensor")
        if _attribute(root, node.target) is None:
            register(root, node.target, value.detach().clone())
    module = fx.GraphModule(root, graph)
    return module.eval()


def _inlined(
    graph: fx.Graph, owner: nn.Module, node: fx.Node, copies: Mapping[fx.Node, Any]
) -> Any:
    """The body of a context (no_grad, autocast) in place of the operator that stands for it: what it returns."""
    name = node.target.name()  # type: ignore[union-attr]
    if name == "wrap_with_set_grad_enabled":
        on, body, *given = node.args
    elif name == "wrap_with_autocast" and node.args[2] is False:
        on, (_, _, _, _, body, *given) = True, node.args
    else:
        raise ModelError(f"{name} has a graph of its own inside, which cannot be cut")
    inner = _attribute(owner, str(body.target))  # type: ignore[union-attr]
    assert isinstance(inner, fx.GraphModule)
    inside: dict[fx.Node, Any] = {}
    arguments = iter(given)
    result: Any = ()
    for part in inner.graph.nodes:
        if part.op == "placeholder":
            inside[part] = copies[next(arguments)]  # type: ignore[index]
        elif part.op == "output":
            result = tuple(inside[leaf] for leaf in part.args[0])
        else:
            inside[part] = graph.node_copy(part, inside.__getitem__)
    if on:
        return result
    blocked = []
    for value in result:  # no gradient goes through
        blocked.append(graph.call_function(torch.ops.aten.detach.default, (value,)))
        blocked[-1].meta = dict(value.meta)
    return tuple(blocked)


def written(graph: fx.Graph) -> set[str]:
    """Names of the parameters and buffers that an operator of the graph writes to."""
    return {
        str(source.target)
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for source in node.all_input_nodes
        if source.op == "get_attr"
    }


def _names(result: Any) -> tuple[str, ...]:
    if isinstance(result, Mapping):
        names = []
        for key, value in result.items():
            count = sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
            names += [key] if count == 1 else [f"{key}_{index}" for index in range(count)]
        return tuple(names)
    count = len(leaves(result))
    return ("output",) if count == 1 else tuple(f"output_{index}" for index in range(count))


def isolated(module: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Run a network; what it writes to its inputs and buffers is forgotten afterwards."""
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    buffers = {} if isinstance(module, torch.jit.ScriptModule) else dict(module.named_buffers())
    if not buffers:
        return module(**copies)
    kept = {name: buffer.clone() for name, buffer in buffers.items()}
    return torch.func.functional_call(module, kept, (), copies)


def call(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Run a network, as it does itself, and flatten what it returns to a tuple of tensors."""
    return leaves(module(**inputs))


def leaves(result: Any) -> tuple[Tensor, ...]:
    """The tensors of what a network returned, in order."""
    return tuple(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))


def _attribute(root: object, name: str) -> object:
    for part in name.split("."):
        root = getattr(root, part, None)
    return root


def _first_lines(error: BaseException, count: int = 6) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return "\n  ".join(lines[:count]) or type(error).__name__
