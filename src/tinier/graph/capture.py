"""A run of the example inputs, operator by operator: the graph of networks that torch.export cannot take.

The network runs on real tensors and every ATen operator is written down as it comes by, above autograd, so that linear layers and
attention stay whole. Which numbers follow the batch and the sequence is found by running again with other sizes. Values that depend
on the inputs must stay tensors: where the network turns one into a Python number, or a shape, there is no graph, and the line is named.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils import _pytree as pytree

from tinier.errors import ModelError
from tinier.graph.around import unsaid
from tinier.graph.states import unchanged

# Operators that make numbers, or sizes, of values.
_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# These are made of such operators and have no tag themselves.
_COMPOSITE = {"aten.where.default", "aten.argwhere.default", "aten.nonzero_numpy.default"}


class DependsOnData(ModelError):
    """The network's path, or a shape in it, depends on the values of its inputs."""


@dataclass
class _Recording:
    """What one run wrote down.

    Attributes:
        graph: the operators, with the sizes of this run as constants.
        constants: name → tensor that is neither an input nor of the module.
        result: what the network returned.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    constants: dict[str, Tensor] = field(default_factory=dict)
    result: Any = None


class _Recorder(ProxyTorchDispatchMode):
    """Writes every operator down. (Modes above autograd must be of this class; nothing of it is used.)"""

    def __init__(self, inputs: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        super().__init__(None, "real", pre_dispatch=True)  # type: ignore[arg-type]
        self.record = _Recording()
        self.nodes: dict[int, fx.Node] = {}
        self.follows: set[int] = set()  # ids of tensors that depend on the inputs
        self.alive: list[Tensor] = []  # so that no id, and no memory, is given twice
        self.memory: dict[tuple[Any, ...], tuple[fx.Node, bool]] = {}
        self.owned = {id(tensor): name for name, tensor in tensors.items()}
        for name, tensor in inputs.items():
            self._made(tensor, self.record.graph.placeholder(name))
            self.follows.add(id(tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        used = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        depends = any(id(tensor) in self.follows for tensor in used)
        if depends and _makes_values(func, args):
            raise DependsOnData(f"{func} turns values of the inputs into numbers or sizes")
        new_args, new_kwargs = pytree.tree_map_only(Tensor, self.node_of, (args, kwargs))
        if func._schema.is_mutable:
            self._check_own(func, args)
        out = func(*args, **kwargs)
        if depends and isinstance(out, bool | int | float | complex):
            raise DependsOnData(f"{func} turns values of the inputs into a number")
        node = self.record.graph.call_function(func, new_args, new_kwargs)
        if isinstance(out, Tensor):
            self._made(out, node, depends)
        elif isinstance(out, list | tuple):
            for index, item in enumerate(out):
                if isinstance(item, Tensor):
                    part = self.record.graph.call_function(operator.getitem, (node, index))
                    self._made(item, part, depends)
        return out

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor; parameters, buffers and constants get theirs at their first use."""
        if id(tensor) not in self.nodes:
            # Some operators, torch.zeros_like among them, hand out another tensor with the same memory.
            made = self.memory.get(_memory(tensor))
            if made is not None and id(tensor) not in self.owned:
                node, depends = made
                self._made(tensor, node, depends)
                return node
            name = self.owned.get(id(tensor))
            if name is None:
                name = f"captured_constant_{len(self.record.constants)}"
                self.record.constants[name] = tensor.detach().clone()
            self._made(tensor, self.record.graph.create_node("get_attr", name))
        return self.nodes[id(tensor)]

    def _made(self, tensor: Tensor, node: fx.Node, depends: bool = False) -> None:
        self.nodes[id(tensor)] = node
        node.meta["val"] = tensor
        self.alive.append(tensor)
        self.memory[_memory(tensor)] = node, depends
        if depends:
            self.follows.add(id(tensor))

    def _check_own(self, func: Any, args: tuple[Any, ...]) -> None:
        """Refuse to write into constants: what one run leaves there would be there in the next."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            node = self.nodes.get(id(value))
            if node is not None and node.target in self.record.constants:
                raise ModelError(f"{func} writes into a tensor of unknown origin")


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Which memory a tensor shows, and how."""
    place = tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size()
    return place, tuple(tensor.shape), tensor.stride(), tensor.dtype


def _makes_values(func: Any, args: tuple[Any, ...]) -> bool:
    if not _VALUES & set(func.tags):
        return str(func) in _COMPOSITE
    if func._schema.name == "aten::one_hot":  # how many classes there are is given, or looked for
        return len(args) < 2 or args[1] == -1
    if func._schema.name == "aten::index":  # positions have the shape of the result; a mask has not
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return True


def capture(
    module: nn.Module, example: Mapping[str, Tensor], free: Sequence[Mapping[str, int]]
) -> tuple[fx.GraphModule, Any]:
    """The graph of a network from runs of it.

    Args:
        module: in evaluation mode; left as it is, its buffers too.
        example: input name → tensor.
        free: sizes that should stay free, each as input name → dimension, of equal size: the batch, the sequence.

    Returns:
        A module that takes inputs by name and returns a flat tuple, with the parameters of ``module`` under their names; and what
        the network returned.

    Raises:
        DependsOnData: a Python number or a shape depends on the values of the inputs.
        ModelError: the network does something that no operator shows.

    Cost:
        One run of the network for the example and one for each free size, and two to check.
    """
    base = _record(module, example)
    others: list[tuple[Mapping[str, int], _Recording]] = []
    for dims in free:
        try:
            other = _record(module, _resized(example, dims, 1))
        # The user's code with a size that it may not be made for: then the size is fixed.
        except Exception:
            continue
        if _aligned(base, other):
            others.append((dims, other))
    constants = _constants(module, base)
    while True:
        graph = _with_free_sizes(base, others, example)
        if graph is not None:
            captured = fx.GraphModule(_root(module, base, constants), graph)
            changed = {name: _fresh(tensor) for name, tensor in example.items()}
            for dims, _ in others:
                changed = _resized(changed, dims, 2)
            if same_values(module, captured, changed):
                return captured.eval(), base.result
        if not others:
            raise ModelError(
                "it computes something on other inputs than its operators do: values that leave torch "
                "(.numpy(), .tolist(), .data_ptr()) or random numbers; write that part with torch operators"
            )
        others.pop()


def _record(module: nn.Module, inputs: Mapping[str, Tensor]) -> _Recording:
    inputs = {name: tensor.clone() for name, tensor in inputs.items()}
    buffers = {name: t.clone() for name, t in module.named_buffers(remove_duplicate=False)}
    tensors = dict(module.named_parameters(remove_duplicate=False)) | buffers
    recorder = _Recorder(inputs, tensors)
    with (
        torch.no_grad(),
        unsaid(lambda tensor: id(tensor) in recorder.follows),
        enable_python_dispatcher(),
        recorder,
    ):
        result = torch.func.functional_call(module, buffers, (), inputs)
    record = recorder.record
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    record.graph.output(tuple(recorder.node_of(leaf) for leaf in leaves))
    record.result = result
    return record


def _resized(
    example: Mapping[str, Tensor], dims: Mapping[str, int], more: int
) -> dict[str, Tensor]:
    """The example with ``more`` positions along some dimensions, repeating those that it has."""
    result = dict(example)
    for name, dim in dims.items():
        size = result[name].shape[dim]
        index = torch.arange(size + more, device=result[name].device) % size
        result[name] = result[name].index_select(dim, index)
    return result


def _fresh(tensor: Tensor) -> Tensor:
    """Other values of the same kind: floats scaled and shifted at random, integers in another order."""
    generator = torch.Generator().manual_seed(0)
    if tensor.is_floating_point():
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        return tensor.flip(0) + noise * (tensor.std() if tensor.numel() > 1 else 1.0)
    order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
    return tensor.flatten()[order].view(tensor.shape)


def _aligned(left: _Recording, right: _Recording) -> bool:
    a, b = left.graph.nodes, right.graph.nodes
    return len(a) == len(b) and all(
        x.op == y.op and (x.op == "get_attr" or x.target == y.target)
        for x, y in zip(a, b, strict=True)
    )


def _with_free_sizes(
    base: _Recording,
    others: Sequence[tuple[Mapping[str, int], _Recording]],
    example: Mapping[str, Tensor],
) -> fx.Graph | None:
    """The recorded graph with the numbers that follow free sizes computed from the inputs; None where that is unclear."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    sizes: list[fx.Node] = []
    old_sizes = [example[name].shape[dim] for dims, _ in others for name, dim in [next(iter(dims.items()))]]  # fmt: skip
    rows = zip(base.graph.nodes, *(other.graph.nodes for _, other in others), strict=True)
    inputs = base.graph.find_nodes(op="placeholder")
    for node, *variants in rows:
        if node.op != "placeholder" and not sizes and others:
            placeholders = {str(n.target): copies[n] for n in inputs}
            for dims, _ in others:
                name, dim = next(iter(dims.items()))
                sizes.append(graph.call_function(torch.ops.aten.sym_size.int, (placeholders[name], dim)))  # fmt: skip
        copy = copies[node] = graph.node_copy(node, lambda n: copies[n])
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        varied = [pytree.tree_leaves((v.args, v.kwargs)) for v in variants]
        if any(len(other) != len(leaves) for other in varied):
            return None
        new = []
        for index, leaf in enumerate(leaves):
            found = [other[index] for other in varied]
            if isinstance(leaf, fx.Node):
                new.append(copies[leaf])
            elif type(leaf) is int and any(value != leaf for value in found):
                value = _follow(graph, copy, leaf, found, old_sizes, sizes)
                if value is None:
                    return None
                new.append(value)
            elif all(value == leaf for value in found):
                new.append(leaf)
            else:
                return None
        copy.args, copy.kwargs = pytree.tree_unflatten(new, spec)
    graph.eliminate_dead_code()
    graph.lint()
    return graph


def _follow(
    graph: fx.Graph,
    before: fx.Node,
    value: int,
    found: list[int],
    old: list[int],
    sizes: list[fx.Node],
) -> fx.Node | None:
    """a · n + b for one free size n, or a · n · m … for several; each was one larger in its own run."""
    slopes = [other - value for other in found]
    moved = [index for index, slope in enumerate(slopes) if slope]
    with graph.inserting_before(before):
        if len(moved) == 1:
            (index,) = moved
            scaled = graph.call_function(operator.mul, (sizes[index], slopes[index]))
            return graph.call_function(operator.add, (scaled, value - slopes[index] * old[index]))
        whole, result = value, None
        for index in moved:
            if whole % old[index]:
                return None
            whole //= old[index]
            pair = (sizes[index], result)
            result = pair[0] if result is None else graph.call_function(operator.mul, pair)
        exact = all(value // old[i] * (old[i] + 1) == found[i] for i in moved)
        return graph.call_function(operator.mul, (result, whole)) if exact else None


def _constants(module: nn.Module, base: _Recording) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in base.constants.items() if not hasattr(module, name)}


def _root(module: nn.Module, base: _Recording, constants: Mapping[str, Tensor]) -> nn.Module:
    """Parameters shared with the module, buffers copied, constants beside them."""
    root = nn.Module()
    own: dict[int, Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        register(root, name, own.setdefault(id(parameter), parameter))
    for name, tensor in module.named_buffers(remove_duplicate=False):
        register(root, name, own.setdefault(id(tensor), tensor.detach().clone()))
    for name, tensor in constants.items():
        register(root, name, tensor)
    return root


def register(root: nn.Module, name: str, value: Tensor) -> None:
    """Put a parameter or buffer at a dotted name, making the modules on the way."""
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]  # get_submodule takes longer than all else here
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)


def has_values(module: nn.Module, example: Mapping[str, Tensor]) -> bool:
    """Whether a network can be run: no parameter, buffer or input is on the meta device."""
    return not any(t.is_meta for t in (*module.parameters(), *module.buffers(), *example.values()))


def same_values(module: nn.Module, captured: fx.GraphModule, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the graph computes what the module does on other inputs."""

    def run(part: nn.Module) -> Any:
        buffers = {name: t.clone() for name, t in part.named_buffers(remove_duplicate=False)}
        copies = {name: tensor.clone() for name, tensor in inputs.items()}
        return torch.func.functional_call(part, buffers, (), copies)

    try:
        with torch.no_grad(), unchanged(module):
            wanted, found = run(module), run(captured)
    # The user's code on sizes that it may not be made for.
    except Exception:
        return False
    leaves = [leaf for leaf in pytree.tree_leaves(wanted) if isinstance(leaf, Tensor)]
    return len(leaves) == len(found) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b in zip(leaves, found, strict=True)
    )
