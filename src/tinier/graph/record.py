"""The graph of a network from runs without values: a few recordings at other sizes say which numbers follow the batch and the sequence.

The network runs on the meta device, where operators only compute shapes, and every ATen operator is written down above autograd, so that
linear layers and attention stay whole. A number that changes between the recordings is a size, c + k · n of one free size n (or k · n · m),
and is computed from the inputs. Whatever is not clear beyond doubt is left to torch.export: ``Unclear``.
"""

import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.nn.modules import module as hooks
from torch.utils import _pytree as pytree

from tinier.graph.capture import register

META = torch.device("meta")
aten = torch.ops.aten


class Unclear(Exception):
    """The recordings do not say what the graph is."""


class Ref(NamedTuple):
    """A tensor of a recording: result ``item`` of a step, or by name an input, parameter, buffer or constant."""

    step: int
    item: int | str


class Shape(NamedTuple):
    """What is known of a tensor without its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass
class Step:
    """One operator: its arguments with ``Ref`` for tensors, the shapes of its results, and the modules that it ran in."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Shape | None]
    several: bool
    stack: tuple[tuple[str, tuple[str, str]], ...]


class Size(NamedTuple):
    """A number that follows the free sizes: constant + factor · the product of some of them, by position."""

    constant: int
    factor: int
    of: tuple[int, ...]


@dataclass
class Recording:
    """What one run wrote down; ``result`` has shapes only."""

    steps: list[Step] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    result: Any = None
    outputs: list[Ref] = field(default_factory=list)


class _Recorder(ProxyTorchDispatchMode):
    """Writes every operator down. (Modes above autograd must be of this class; nothing of it is used.)"""

    def __init__(self, known: Mapping[int, tuple[Tensor, str]]) -> None:
        super().__init__(None, "real", pre_dispatch=True)  # type: ignore[arg-type]
        self.record = Recording()
        self.known = known  # id of a tensor → its stand-in on the meta device and its name
        self.refs: dict[int, Ref] = {id(t): Ref(-1, name) for t, name in known.values()}
        self.stores = {t.untyped_storage()._cdata for t, _ in known.values()}
        self.made: dict[int, Ref] = {}  # storage → the step that made it of nothing
        self.alive: list[Any] = []  # so that no id is given twice
        self.stack: list[tuple[str, tuple[str, str]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.is_autocast_enabled("cpu"):
            raise Unclear("types change inside")
        kwargs = kwargs or {}
        used: list[Tensor] = []
        new_args, new_kwargs = self._noted(args, used), self._noted(kwargs, used)
        if any(tensor.is_meta or id(tensor) in self.known for tensor in used):
            args, kwargs = self._on_meta(args), self._on_meta(kwargs)
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._check_own(value)
        quick = _QUICK.get(func)
        with torch._C._DisablePythonDispatcher():
            out = quick(*args, **kwargs) if quick is not None else None
            out = func(*args, **kwargs) if out is None else out
        several = isinstance(out, list | tuple)
        items = list(out) if several else [out]
        if any(isinstance(item, Tensor) for item in items):
            step = len(self.record.steps)
            shapes = []
            for index, item in enumerate(items):
                if isinstance(item, Tensor):
                    self.refs[id(item)] = Ref(step, index)
                    self.alive.append(item)
                    if not used:  # torch.arange returns another tensor with the same storage
                        self.made[item.untyped_storage()._cdata] = self.refs[id(item)]
                    shapes.append(_shape(item))
                else:
                    shapes.append(None)
            found = Step(func, new_args, new_kwargs, shapes, several, tuple(self.stack))
            self.record.steps.append(found)
        elif func._schema.is_mutable:
            raise Unclear(f"{func} writes and returns nothing")
        return out

    def ref(self, tensor: Tensor) -> Ref:
        """Where a tensor comes from; one that nothing here made is a constant."""
        found = self.refs.get(id(tensor))
        if found is not None:
            return found
        if id(tensor) in self.known:
            return Ref(-1, self.known[id(tensor)][1])
        made = self.made.get(tensor.untyped_storage()._cdata)
        if made is not None:
            shape = self.record.steps[made.step].results[0]
            if shape != _shape(tensor):
                raise Unclear("a view that no operator shows")
            self.refs[id(tensor)] = made
            self.alive.append(tensor)
            return made
        if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):
            raise Unclear("a tensor of unknown origin")
        name = f"captured_constant_{len(self.record.constants)}"
        self.record.constants[name] = tensor
        self.alive.append(tensor)
        self.stores.add(tensor.untyped_storage()._cdata)
        self.refs[id(tensor)] = Ref(-1, name)
        return self.refs[id(tensor)]

    def _noted(self, value: Any, used: list[Tensor]) -> Any:
        if isinstance(value, Tensor):
            used.append(value)
            return self.ref(value)
        if isinstance(value, list | tuple):
            return type(value)([self._noted(item, used) for item in value])
        if isinstance(value, dict):
            return {key: self._noted(item, used) for key, item in value.items()}
        return value

    def _on_meta(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.is_meta:
                return value
            if id(value) in self.known:
                return self.known[id(value)][0]
            stand_in = value.to(META)
            self.alive.append(stand_in)
            return stand_in
        if isinstance(value, list | tuple):
            return type(value)([self._on_meta(item) for item in value])
        if isinstance(value, dict):
            return {key: self._on_meta(item) for key, item in value.items()}
        return value

    def _check_own(self, value: Any) -> None:
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if isinstance(tensor, Tensor) and (
                id(tensor) in self.known or tensor.untyped_storage()._cdata in self.stores
            ):
                raise Unclear("it writes to its inputs, buffers or constants")


def _like(source: Any, *_: Any, **__: Any) -> Tensor | None:
    if not source.is_meta:
        return None
    return torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device=META)


def _contiguous(source: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return source.new_empty(source.shape) if source.is_meta else None


def _linear(source: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if not source.is_meta or source.ndim < 2 or weight.ndim != 2 or source.dtype != weight.dtype:
        return None
    if source.shape[-1] != weight.shape[1]:
        return None
    return source.new_empty((*source.shape[:-1], weight.shape[0]))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor | None:
    same = query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and query.is_meta
    fits = query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]
    if not same or not fits or not query.dtype == key.dtype == value.dtype:
        return None
    if mask is not None:
        wanted = (*query.shape[:-1], key.shape[-2])
        if mask.ndim > len(wanted) or any(
            m not in (1, n) for m, n in zip(mask.shape[::-1], wanted[::-1], strict=False)
        ):
            return None
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _pointwise(source: Any, other: Any, *rest: Any, **__: Any) -> Tensor | None:
    """Of operands of one shape and type, or with a number that leaves the type."""
    if isinstance(other, Tensor):
        if source.shape != other.shape or source.dtype != other.dtype or not other.is_meta:
            return None
    elif not source.is_floating_point() or not isinstance(other, int | float):
        return None
    return _like(source) if source.is_floating_point() else None


# Operators that torch works out the shapes of in Python, at length.
_QUICK: dict[Any, Callable[..., Tensor | None]] = {
    aten.batch_norm.default: _like,
    aten.linear.default: _linear,
    aten.layer_norm.default: _contiguous,
    aten.scaled_dot_product_attention.default: _attention,
    aten.dropout.default: _like,
    aten.gelu.default: _like,
    aten.silu.default: _like,
    aten.relu.default: _like,
    aten.add.Tensor: _pointwise,
    aten.mul.Tensor: _pointwise,
}


def _shape(tensor: Tensor) -> Shape:
    if type(tensor) is not Tensor or tensor.layout is not torch.strided:
        raise Unclear("a tensor of another kind")
    return Shape(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


@contextmanager
def _exporting() -> Iterator[None]:
    """What models ask to know whether they are traced, as torch.export answers it."""
    compiler: Any = sys.modules["torch.compiler"]
    before = compiler._is_compiling_flag, compiler._is_exporting_flag
    compiler._is_compiling_flag = compiler._is_exporting_flag = True
    try:
        yield
    finally:
        compiler._is_compiling_flag, compiler._is_exporting_flag = before


@contextmanager
def _stacked(module: nn.Module, stack: list[tuple[str, tuple[str, str]]]) -> Iterator[None]:
    """Inside, ``stack`` says which modules are running, as torch.export writes it to its nodes."""
    names: dict[int, tuple[str, tuple[str, str]]] = {}
    for path, part in module.named_modules():
        kind = f"{type(part).__module__}.{type(part).__qualname__}"
        names[id(part)] = ("L__self__" + path, (path, kind))

    def enter(part: nn.Module, _: Any) -> None:
        if id(part) in names:
            stack.append(names[id(part)])

    def leave(part: nn.Module, _: Any, __: Any) -> None:
        if id(part) in names:
            stack.pop()

    first = hooks.register_module_forward_pre_hook(enter)
    last = hooks.register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        first.remove()
        last.remove()


@contextmanager
def _swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Other tensors in the place of parameters and buffers; what modules keep of the run in attributes is forgotten afterwards."""
    before: list[tuple[Any, Any]] = []
    for part in module.modules():
        for value in (part.__dict__, *part.__dict__.values()):
            if type(value) in (dict, list):
                before.append((value, value.copy()))
    try:
        for path, part in module.named_modules():
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = tensors[f"{path}.{name}" if path else name]
        yield
    finally:
        for value, old in before:
            value.clear()
            value.extend(old) if isinstance(value, list) else value.update(old)


class _Runner:
    """Records a network at any sizes of its inputs."""

    def __init__(self, module: nn.Module, example: Mapping[str, Tensor]) -> None:
        self.module, self.example = module, example
        self.own: dict[str, Tensor] = {}
        self.known: dict[int, tuple[Tensor, str]] = {}
        devices = {tensor.device for tensor in example.values()}
        for name, tensor in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ):
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
                raise Unclear(f"{name} is a tensor of another kind")
            devices.add(tensor.device)
            if id(tensor) not in self.known:
                stand_in = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META
                )
                self.known[id(tensor)] = self.known[id(stand_in)] = stand_in, name
            self.own[name] = self.known[id(tensor)][0]
        if len(devices - {META}) > 1:
            raise Unclear("tensors on several devices")
        self.device = META if META in devices else next(iter(devices))

    def __call__(self, moved: Mapping[tuple[str, int], int]) -> Recording:
        """One run, with some sizes of the inputs changed."""
        known, inputs = dict(self.known), {}
        for name, tensor in self.example.items():
            size = [moved.get((name, dim), length) for dim, length in enumerate(tensor.shape)]
            inputs[name] = torch.empty(size, dtype=tensor.dtype, device=META)
            known[id(inputs[name])] = inputs[name], name
        recorder = _Recorder(known)
        with (
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            _exporting(),
            _swapped(self.module, self.own),
            _stacked(self.module, recorder.stack),
            enable_python_dispatcher(),
            recorder,
        ):
            result = self.module(**inputs)
        record = recorder.record
        record.result = result
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                record.outputs.append(recorder.ref(leaf))
        return record


def record(
    module: nn.Module,
    example: Mapping[str, Tensor],
    free: Callable[[Tensor], range],
) -> tuple[fx.GraphModule, Any]:
    """The graph of a network from runs without values.

    Args:
        module: in evaluation mode; left as it is.
        example: input name → tensor.
        free: the dimensions of an input whose size should stay free.

    Returns:
        A module that takes inputs by name and returns a flat tuple, with the parameters of ``module`` under their names (in the same
        memory) and copies of its buffers; and what the network returned, without values.

    Raises:
        Unclear: the recordings differ in more than sizes, or it writes to inputs or buffers.
        Exception: whatever the network raises where it needs values.

    Cost:
        Three runs without values, and one more for each further free size: milliseconds for a hundred operators.
    """
    run = _Runner(module, example)
    base = run({})
    sizes = _free_sizes(run, base, example, free)
    recordings = [base, *(other for _, other in sizes)]
    groups = [dims for dims, _ in sizes]
    if groups:
        moved = {place: _other(example, place, 3) for dims in groups for place in dims}
        recordings.append(run(moved))
    return _Builder(run, groups, recordings).build(), base.result


def _other(example: Mapping[str, Tensor], place: tuple[str, int], by: int) -> int:
    """Another size: longer batches; shorter sequences, for many models only have so many positions."""
    name, dim = place
    size = example[name].shape[dim]
    return size - by if dim and size > 2 * by + 2 else size + by


def _free_sizes(
    run: _Runner, base: Recording, example: Mapping[str, Tensor], free: Callable[[Tensor], range]
) -> list[tuple[tuple[tuple[str, int], ...], Recording]]:
    """Places (input, dimension) that have one free size, and the recording with that size changed."""
    ties: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for name, tensor in example.items():
        for dim in free(tensor):
            if tensor.shape[dim] > 1:
                ties.setdefault((dim, tensor.shape[dim]), []).append((name, dim))
    result = []
    for (dim, _), places in ties.items():
        together = list(places)
        for place in places if dim and len(places) > 1 else ():
            try:
                alone = run({place: _other(example, place, 1)})
            # The user's code, with an input that does not fit the others: their sizes are one.
            except Exception:
                continue
            together.remove(place)
            result.append(((place,), alone))
        if together:
            moved = {place: _other(example, place, 1) for place in together}
            result.append((tuple(together), run(moved)))
    return result


class _Builder:
    """Makes one graph of recordings: the first as given, one for each free size, and one with all of them changed."""

    def __init__(
        self,
        run: _Runner,
        groups: Sequence[tuple[tuple[str, int], ...]],
        recordings: Sequence[Recording],
    ) -> None:
        self.run, self.groups, self.recordings = run, groups, recordings
        example = run.example
        self.old = [example[dims[0][0]].shape[dims[0][1]] for dims in groups]
        self.new = [_other(example, dims[0], 1) for dims in groups]
        self.last = [_other(example, dims[0], 3) for dims in groups]
        self.graph = fx.Graph()
        self.fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.sizes: dict[tuple[Any, ...], int | Size] = {}
        self.numbers: dict[Size, tuple[Any, fx.Node]] = {}
        self.vals: dict[tuple[Any, ...], FakeTensor] = {}
        self.names: dict[str, fx.Node] = {}
        self.nodes: dict[tuple[int, int], fx.Node] = {}
        self.symbols = [
            self._symbol(value, f"{dims[0][0]}_{dims[0][1]}")
            for value, dims in zip(self.old, groups, strict=True)
        ]
        self.sym_nodes: list[fx.Node] = []

    def build(self) -> fx.GraphModule:
        base, others = self.recordings[0], self.recordings[1:]
        if any(len(other.steps) != len(base.steps) for other in others):
            raise Unclear("the number of operators follows a size")
        if any(other.outputs != base.outputs for other in others):
            raise Unclear("the outputs follow a size")
        for name, constant in base.constants.items():
            for other in others:
                found = other.constants.get(name)
                if found is None or found.dtype != constant.dtype or not torch.equal(found, constant):
                    raise Unclear("a constant follows a size")
        root = self._root()
        self._inputs()
        for number, steps in enumerate(zip(*(r.steps for r in self.recordings), strict=True)):
            self._step(number, steps)
        self.graph.output(tuple(self._node(ref) for ref in base.outputs))
        self.graph.eliminate_dead_code()
        return fx.GraphModule(root, self.graph).eval()

    def _root(self) -> nn.Module:
        """Parameters in the module's memory, copies of its buffers, and the constants; a node for each that is used."""
        root, module = nn.Module(), self.run.module
        own: dict[int, Tensor] = {}
        used = _used(self.recordings[0])
        for name, p in module.named_parameters(remove_duplicate=False):
            register(root, name, own.setdefault(id(p), nn.Parameter(p.detach(), p.requires_grad)))
        for name, tensor in module.named_buffers(remove_duplicate=False):
            register(root, name, own.setdefault(id(tensor), tensor.detach().clone()))
        for name, tensor in self.recordings[0].constants.items():
            if hasattr(root, name):
                raise Unclear(f"{name} is a name of the network's")
            register(root, name, tensor.detach().clone())
        shapes = {name: _shape(t) for name, t in self.run.own.items()}
        shapes |= {name: _shape(t.to(META)) for name, t in self.recordings[0].constants.items()}
        for name, shape in shapes.items():
            if name in used:
                self.names[name] = node = self.graph.create_node("get_attr", name)
                node.meta["val"] = self._val(shape.size, shape.stride, shape.dtype)
        return root

    def _inputs(self) -> None:
        places = {place: index for index, dims in enumerate(self.groups) for place in dims}
        for name, tensor in self.run.example.items():
            node = self.names[name] = self.graph.placeholder(name)
            size: list[Any] = list(tensor.shape)
            for dim in range(tensor.ndim):
                if (name, dim) in places:
                    index = places[name, dim]
                    size[dim] = Size(0, 1, (index,))
            node.meta["val"] = self._val(tuple(size), None, tensor.dtype)
        for index, dims in enumerate(self.groups):
            name, dim = dims[0]
            given = (self.names[name], dim)
            node = self.graph.create_node("call_function", aten.sym_size.int, given, {}, "sym_size_int")
            node.meta["val"] = self.symbols[index]
            self.sym_nodes.append(node)
            self.numbers[Size(0, 1, (index,))] = self.symbols[index], node

    def _step(self, number: int, steps: Sequence[Step]) -> None:
        first = steps[0]
        if any(
            step.func is not first.func
            or step.several != first.several
            or len(step.results) != len(first.results)
            for step in steps
        ):
            raise Unclear(f"{first.func} is not there at other sizes")
        args = self._merged([step.args for step in steps])
        kwargs = self._merged([step.kwargs for step in steps])
        kind = getattr(first.func, "overloadpacket", first.func).__name__
        node = self.graph.create_node("call_function", first.func, args, kwargs, kind)
        if first.stack:
            node.meta["nn_module_stack"] = dict(first.stack)
        vals = [
            None if shape is None else self._result([step.results[i] for step in steps])
            for i, shape in enumerate(first.results)
        ]
        if not first.several:
            node.meta["val"] = vals[0]
            self.nodes[number, 0] = node
            return
        node.meta["val"] = vals
        used = self._items.get(number, ())
        for index in sorted(used):
            part = self.graph.call_function(operator.getitem, (node, index))
            part.meta = {**node.meta, "val": vals[index]}
            self.nodes[number, index] = part

    @property
    def _items(self) -> dict[int, set[int]]:
        """Step → those of its results that are used."""
        if not hasattr(self, "_found_items"):
            self._found_items: dict[int, set[int]] = {}
            for ref in _refs(self.recordings[0]):
                if isinstance(ref.item, int):
                    self._found_items.setdefault(ref.step, set()).add(ref.item)
        return self._found_items

    def _node(self, ref: Ref) -> fx.Node:
        return self.names[ref.item] if isinstance(ref.item, str) else self.nodes[ref.step, ref.item]

    def _merged(self, values: Sequence[Any]) -> Any:
        """One argument of what the recordings have there."""
        first = values[0]
        if isinstance(first, Ref):
            if any(value != first for value in values):
                raise Unclear("other operands at other sizes")
            return self._node(first)
        if isinstance(first, list | tuple):
            if any(len(value) != len(first) for value in values):
                raise Unclear("an argument has another length at other sizes")
            return type(first)([self._merged(items) for items in zip(*values, strict=True)])
        if isinstance(first, dict):
            if any(value.keys() != first.keys() for value in values):
                raise Unclear("other arguments at other sizes")
            return {key: self._merged([value[key] for value in values]) for key in first}
        if type(first) is int:
            size = self._size(tuple(values))
            return size if isinstance(size, int) else self._number(size)
        if any(value != first for value in values):
            raise Unclear("a number that is not an integer follows a size")
        if isinstance(first, torch.device) and first == META:
            return self.run.device
        return first

    def _size(self, values: tuple[Any, ...]) -> int | Size:
        """The number as it follows the free sizes."""
        first, *moved, last = values if len(values) > 1 else (values[0], values[0])
        if all(value == first for value in values):
            return int(first)
        found = self.sizes.get(values)
        if found is not None:
            return found
        if any(type(value) is not int for value in values):
            raise Unclear("a number is not one at other sizes")
        of = tuple(index for index, value in enumerate(moved) if value != first)
        if len(of) == 1:
            (index,) = of
            factor, rest = divmod(moved[index] - first, self.new[index] - self.old[index])
            size = Size(first - factor * self.old[index], factor, of)
        else:
            whole = 1
            for index in of:
                whole *= self.old[index]
            factor, rest = divmod(first, whole)
            size = Size(0, factor, of)
        if rest or not of or not self._holds(size, values):
            raise Unclear("a number follows a size, but not in proportion")
        self.sizes[values] = size
        return size

    def _holds(self, size: Size, values: tuple[int, ...]) -> bool:
        points = [list(self.old) for _ in values]
        for index in range(len(self.groups)):
            points[index + 1][index] = self.new[index]
        points[-1] = list(self.last)
        for point, value in zip(points, values, strict=True):
            product = size.factor
            for index in size.of:
                product *= point[index]
            if size.constant + product != value:
                return False
        return True

    def _symbolic(self, size: int | Size) -> Any:
        if isinstance(size, int):
            return size
        if size in self.numbers:
            return self.numbers[size][0]
        product: Any = size.factor
        for index in size.of:
            product = self.symbols[index] * product
        return product + size.constant if size.constant else product

    def _number(self, size: Size) -> fx.Node:
        """The node that computes a size."""
        if size not in self.numbers:
            node: Any = self.sym_nodes[size.of[0]]
            value: Any = self.symbols[size.of[0]]
            for index in size.of[1:]:
                node, value = self._computed(operator.mul, node, value, self.sym_nodes[index], self.symbols[index])
            if size.factor != 1:
                node, value = self._computed(operator.mul, node, value, size.factor, size.factor)
            if size.constant:
                node, value = self._computed(operator.add, node, value, size.constant, size.constant)
            self.numbers[size] = value, node
        return self.numbers[size][1]

    def _computed(
        self, function: Any, node: fx.Node, value: Any, other: Any, number: Any
    ) -> tuple[fx.Node, Any]:
        result = self.graph.call_function(function, (node, other))
        result.meta["val"] = value = function(value, number)
        return result, value

    def _result(self, shapes: Sequence[Shape | None]) -> FakeTensor:
        first = shapes[0]
        if first is None or any(
            s is None or len(s.size) != len(first.size) or s.dtype != first.dtype for s in shapes
        ):
            raise Unclear("a result has other dimensions at other sizes")
        size = tuple(self._size(row) for row in zip(*(s.size for s in shapes if s), strict=True))
        try:
            stride = tuple(
                self._size(row) for row in zip(*(s.stride for s in shapes if s), strict=True)
            )
        except Unclear:
            stride = None
        return self._val(size, stride, first.dtype)

    def _val(self, size: Any, stride: Any, dtype: torch.dtype) -> FakeTensor:
        key = (size, stride, dtype)
        if key not in self.vals:
            sizes = [self._symbolic(number) for number in size]
            strides = None if stride is None else [self._symbolic(number) for number in stride]
            empty = (
                torch.empty(sizes, dtype=dtype, device=META)
                if strides is None
                else torch.empty_strided(sizes, strides, dtype=dtype, device=META)
            )
            self.vals[key] = FakeTensor(self.fake, empty, self.run.device)
        return self.vals[key]

    def _symbol(self, value: int, name: str) -> Any:
        from torch._dynamo.source import ConstantSource

        env = self.fake.shape_env
        assert env is not None
        source = ConstantSource(name)
        symbol = env.create_symbol(value, source, DimDynamic.DYNAMIC)
        return env.create_symintnode(symbol, hint=value, source=source)


def _refs(recording: Recording) -> Iterator[Ref]:
    for step in recording.steps:
        yield from _refs_in((step.args, step.kwargs))
    yield from recording.outputs


def _refs_in(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _refs_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _refs_in(item)


def _used(recording: Recording) -> set[str]:
    return {ref.item for ref in _refs(recording) if isinstance(ref.item, str)}
