"""One module at a time: which modules of a class take their smaller weights, and the traced graph in the place of those that do not."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from tinier.edits.rewrite import REWRITES, Rewriter
from tinier.edits.stock_sizes import Size, choices, sizes_of_modules
from tinier.graph.macs import module_path
from tinier.graph.rules import operator_name
from tinier.graph.states import evaluating, repeatable
from tinier.graph.trace import Traced, is_free, isolated
from tinier.modules.attention import NarrowAttention
from tinier.modules.piece import Form, Piece

MOST, FEW = 128, 16  # choices of numbers that are tried for one module, and for the whole network
SAME = 1e-6  # relative to the largest value
Attributes = Mapping[str, Mapping[str, Any]]  # path of a module → name → number, or several


def attributes(module: nn.Module) -> Attributes:
    """The numbers that modules keep, themselves or in a config of their own: all that candidates differ in."""
    return {
        path: {
            name: value
            for name, value in vars(layer).items()
            if not name.startswith("_")
            and (type(value) in (int, tuple, list) or (path and hasattr(value, "to_dict")))
        }
        for path, layer in module.named_modules()
    }


@dataclass
class Call:
    """The one call of a module: leaves of its arguments and its result, and the nodes of the graph that compute them."""

    arguments: list[Any]
    arguments_spec: pytree.TreeSpec
    results: list[Any]
    results_spec: pytree.TreeSpec
    inputs: dict[int, list[fx.Node]] = field(default_factory=dict)
    outputs: dict[int, fx.Node] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        """Whether every tensor has its node."""
        return _tensors(self.results) == set(self.outputs) and bool(self.outputs)


def mend(
    module: nn.Module,
    others: Sequence[Attributes],
    original: nn.Module,
    traced: Traced,
    graph: fx.GraphModule,
    run: Rewriter,
    inputs: Mapping[str, Tensor],
) -> bool:
    """Make every module compute its part of the smaller graph, in place: with other sizes, or as the graph itself.

    Args:
        module: a copy with smaller parameters.
        others: attributes that copies of it had; those that fit are taken over.
        original: the user's module.
        traced: its graph.
        graph: the smaller graph.
        run: axes of the original and what is kept of them.
        inputs: name → tensor, random.

    Returns:
        Whether anything changed.

    Cost:
        Three runs, memory for their arguments and results, and for each suspected module a run for each of ``others`` and of at most
        128 choices of its numbers; for the network itself of 16.
    """
    paths = _suspects(traced, run) | {""}
    calls = _calls(original, paths, inputs)
    wanted = _match(calls, traced, inputs)
    small = {node.name: node for node in graph.graph.nodes}
    values = _values(graph, {node.name for node in wanted}, inputs)
    sizes = sizes_of_modules(run)
    changed, settled = False, set[str]()
    for path in sorted(calls, key=lambda p: (p == "", -p.count("."))):
        call = calls[path]
        if not call.known or not _has(module, path):
            continue
        layer = module.get_submodule(path)
        arguments = list(call.arguments)
        for index, nodes in call.inputs.items():
            arguments[index] = values[nodes[0].name]
        results = {index: values[node.name] for index, node in call.outputs.items()}
        if _computes(layer, call, arguments, results):
            settled.add(path)
            continue
        # Parts whose own results are no nodes, as what is written in place, are looked at with the module that they are in.
        inside = {
            p: part
            for p, part in layer.named_modules(prefix=path)
            if p == path or not (p in settled or _is_plain(part))
        }
        before = {p: dict(vars(part)) for p, part in inside.items()}
        old = {p: original.get_submodule(p) for p in inside}
        for numbers in (*others, *choices(old, sizes, FEW if not path else MOST)):
            for p, part in inside.items():
                vars(part).update(numbers.get(p, {}))
            if _computes(layer, call, arguments, results):
                changed = True
                settled.update(inside)
                break
            for p, part in inside.items():
                vars(part).update(before[p])
        else:
            held = set(module.state_dict())
            stand_ins: Iterator[nn.Module | None] = iter(())
            if path:
                stand_ins = chain(
                    _narrow(layer, old[path], sizes.get(path, set())),
                    (_piece(path, layer, call, small, graph, held, run) for _ in range(1)),
                )
            for part in stand_ins:
                if part is not None and _computes(part, call, arguments, results):
                    module.set_submodule(path, part)
                    changed = True
                    break
    _without_shortcuts(module)
    return changed


def _narrow(layer: nn.Module, old: nn.Module, sizes: set[Size]) -> Iterator[NarrowAttention]:
    """Torch's attention with fewer or narrower heads, which takes any mask."""
    if type(layer) is not nn.MultiheadAttention or not isinstance(old, nn.MultiheadAttention):
        return  # others may do more in their forward, or compute their weights
    if layer.bias_k is None and not layer.add_zero_attn:
        for heads in sorted({old.num_heads, *(s.new for s in sizes if s.old == old.num_heads)}):
            yield NarrowAttention(layer, heads, old.head_dim**-0.5)


def _without_shortcuts(module: nn.Module) -> None:
    """Models of transformers that hold a piece keep no keys and values from step to step; torch's encoders give no nested tensors."""
    for part in module.modules():
        inside = {type(inner) for inner in part.modules()}
        for name in ("config", "generation_config") if Piece in inside else ():
            config: Any = getattr(part, name, None)
            if hasattr(config, "to_dict") and getattr(config, "use_cache", None):
                config.use_cache = False
        if isinstance(part, nn.TransformerEncoder) and inside & {Piece, NarrowAttention}:
            part.use_nested_tensor = False


def _is_plain(part: nn.Module) -> bool:
    return type(part).__module__.startswith("torch.nn.") or isinstance(
        part, Piece | NarrowAttention
    )


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _suspects(traced: Traced, run: Rewriter) -> set[str]:
    """Modules in whose own code an operator works with a size that changes."""
    result = set()
    for node in traced.module.graph.nodes:
        sized = operator_name(node) in REWRITES or operator_name(node) == "getitem"
        if node.op == "call_function" and sized and run.touches(node):
            result.add(module_path(node))
    return result


def _calls(module: nn.Module, paths: set[str], inputs: Mapping[str, Tensor]) -> dict[str, Call]:
    found: dict[str, list[Call]] = {}
    hooks = []

    def remember(path: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            call = Call(*pytree.tree_flatten((args, kwargs)), *pytree.tree_flatten(result))
            found.setdefault(path, []).append(call)

        return hook

    for path, layer in module.named_modules():
        if path in paths:
            hooks.append(layer.register_forward_hook(remember(path), with_kwargs=True))
    try:
        with evaluating(module), torch.no_grad(), repeatable():
            isolated(module, inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return {path: calls[0] for path, calls in found.items() if len(calls) == 1}


def _match(calls: dict[str, Call], traced: Traced, inputs: Mapping[str, Tensor]) -> set[fx.Node]:
    """Give every argument and result the nodes that compute it, by value; arguments from outside the module."""
    by_shape: dict[Any, list[tuple[str, Call, bool, int]]] = {}
    for path, call in calls.items():
        for leaves, result in ((call.arguments, False), (call.results, True)):
            for index in _tensors(leaves):
                key = (leaves[index].shape, leaves[index].dtype)
                by_shape.setdefault(key, []).append((path, call, result, index))
    for node, value in _run(traced.module, inputs):
        if not isinstance(value, Tensor) or node.op == "get_attr":
            continue
        stack = _stack(node)
        for path, call, result, index in by_shape.get((value.shape, value.dtype), []):
            leaf = (call.results if result else call.arguments)[index]
            if (result == (path in stack)) and _near(value, leaf):
                if result:
                    call.outputs[index] = node
                else:
                    call.inputs.setdefault(index, []).append(node)
    wanted = {node for call in calls.values() for node in call.outputs.values()}
    return wanted | {nodes[0] for call in calls.values() for nodes in call.inputs.values()}


def _run(graph: fx.GraphModule, inputs: Mapping[str, Tensor]) -> Iterator[tuple[fx.Node, Any]]:
    interpreter = fx.Interpreter(graph)
    interpreter.env = {}
    with torch.no_grad(), repeatable():
        for node in graph.graph.nodes:
            if node.op == "output":
                return
            if node.op == "placeholder":
                interpreter.env[node] = inputs[str(node.target)].clone()
            else:
                interpreter.env[node] = interpreter.run_node(node)
            yield node, interpreter.env[node]
            for done in interpreter.user_to_last_uses.get(node, []):
                interpreter.env.pop(done, None)


def _values(
    graph: fx.GraphModule, names: set[str], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return {node.name: value.clone() for node, value in _run(graph, inputs) if node.name in names}


def _tensors(leaves: Sequence[Any]) -> set[int]:
    return {index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}


def _near(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if not found.is_floating_point():
        return torch.equal(found, wanted)
    scale = wanted.abs().max().clamp(min=1e-6) if wanted.numel() else 1
    return bool(((found - wanted).abs() <= SAME * scale).all())


def _computes(
    layer: nn.Module, call: Call, arguments: list[Any], results: Mapping[int, Tensor]
) -> bool:
    # One tensor given twice stays one.
    clones = {id(a): a.clone() for a in arguments if isinstance(a, Tensor)}
    given = [clones.get(id(a), a) for a in arguments]
    args, kwargs = pytree.tree_unflatten(given, call.arguments_spec)
    try:
        with evaluating(layer), torch.no_grad(), repeatable():
            found = pytree.tree_leaves(layer(*args, **kwargs))
    except Exception:  # the user's code on other sizes than it was written for
        return False
    return all(
        index < len(found) and isinstance(found[index], Tensor) and _near(found[index], value)
        for index, value in results.items()
    )


def _piece(
    path: str,
    layer: nn.Module,
    call: Call,
    small: Mapping[str, fx.Node],
    whole: fx.GraphModule,
    held: set[str],
    run: Rewriter,
) -> Piece | None:
    """The part of the smaller graph from the arguments of a call to its results; None where it needs more than those."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    lengths: list[tuple[Any, fx.Node, int]] = []  # free ones, and where a placeholder has them
    order = sorted(call.inputs)
    sizes: list[tuple[int | None, ...]] = []
    for index in order:
        fixed: list[int | None] = []
        holder = graph.placeholder(f"argument_{index}")
        made |= dict.fromkeys((small[old.name] for old in call.inputs[index]), holder)
        source = call.inputs[index][0]
        for dim, axis in enumerate(run.of(source)):
            length: Any = source.meta["val"].shape[dim]
            fixed.append(None if is_free(length) or run.changed(axis) else int(length))
            if not isinstance(length, int) and not run.changed(axis):
                lengths.append((length.node.expr, holder, dim))
        sizes.append(tuple(fixed))
    ends = [small[node.name] for node in call.outputs.values()]
    # What writes into tensors in place may matter without being read.
    writes = [node for node in whole.graph.nodes if _writes(node) and path in _stack(node)]
    needed, rest = set[fx.Node](), [*ends, *writes]
    while rest:
        node = rest.pop()
        if node in made or node in needed:
            continue
        if (size := _length(graph, node, lengths)) is not None:
            made[node] = size
        elif node.op == "placeholder":
            return None
        else:
            needed.add(node)
            rest += node.all_input_nodes
    known = {*dict(layer.named_parameters()), *dict(layer.named_buffers())}
    constants: dict[str, Tensor] = {}
    for node in whole.graph.nodes:
        if node in needed and node.op == "get_attr":
            target = str(node.target)
            name = target.removeprefix(f"{path}.")
            if not target.startswith(f"{path}.") or name not in known:
                value = _attribute(whole, target)
                if isinstance(value, nn.Parameter) or target in held:
                    return None  # of another module, with which it would no longer be shared
                name = "constant_" + target.replace(".", "_")
                constants[name] = value
            made[node] = graph.get_attr(name)
        elif node in needed:
            made[node] = graph.node_copy(node, lambda source: made[source])
            made[node].meta.clear()
    graph.output(tuple(made[node] for node in ends))
    places = {index: place for place, index in enumerate(call.outputs)}
    outputs = [
        (True, places[index]) if index in places else (False, leaf)
        for index, leaf in enumerate(call.results)
    ]
    form = Form(layer, call.arguments, call.arguments_spec, call.results_spec)
    return Piece(layer, path, graph, constants, order, outputs, form, sizes)


def _length(
    graph: fx.Graph, node: fx.Node, lengths: Sequence[tuple[Any, fx.Node, int]]
) -> fx.Node | None:
    """A free length, read from an argument that has it or a multiple of it."""
    value: Any = node.meta.get("val")
    for whole, holder, dim in lengths if isinstance(value, torch.SymInt) else ():
        times = whole / value.node.expr
        if times.is_Integer:
            size = graph.call_function(torch.ops.aten.sym_size.int, (holder, dim))
            if times == 1:
                return size
            return graph.call_function(operator.floordiv, (size, int(times)))
    return None


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _stack(node: fx.Node) -> set[str]:
    return {str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()}


def _attribute(module: nn.Module, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)
