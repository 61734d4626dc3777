"""Runs of a network without values, operator by operator.

The network runs on the meta device, where operators only compute shapes, and every ATen operator is written down above autograd, so that
linear layers and attention stay whole.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.nn.modules import module as hooks
from torch.utils import _pytree as pytree

from tinier.graph.around import exporting, forget, located, opened, unsaid, without_values
from tinier.graph.shapes import META, QUICK
from tinier.graph.states import forgotten, unchanged


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


@dataclass
class Step:
    """One operator: its arguments with ``Ref`` for tensors, the shapes of its results, and the modules that it ran in."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Shape | None]
    several: bool
    stack: tuple[tuple[str, tuple[str, str]], ...]


@dataclass
class Recording:
    """What one run wrote down; ``result`` has shapes only."""

    steps: list[Step] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    result: Any = None
    outputs: list[Ref] = field(default_factory=list)


class _Recorder(ProxyTorchDispatchMode):
    """Writes every operator down. (Modes above autograd must be of this class; nothing of it is used.)"""

    def __init__(self, known: Mapping[int, tuple[Tensor, str]], device: torch.device) -> None:
        super().__init__(None, "real", pre_dispatch=True)  # type: ignore[arg-type]
        self.record, self.device, self.inside = Recording(), device, False
        self.known = known  # id of a tensor → its stand-in on the meta device and its name
        self.refs: dict[int, Ref] = {id(t): Ref(-1, name) for t, name in known.values()}
        self.stores = {t.untyped_storage()._cdata for t, _ in known.values()}
        self.made: dict[tuple[Any, ...], Ref] = {}  # the memory that a tensor shows → its step
        self.alive: list[Any] = []  # so that no id is given twice
        self.stack: list[tuple[str, tuple[str, str]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.inside = True
        try:
            return self._run(func, args, kwargs or {})
        finally:
            self.inside = False

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_autocast_enabled("cpu"):
            raise Unclear("types change inside")
        used: list[Tensor] = []
        new_args, new_kwargs = self._noted(args, used), self._noted(kwargs, used)
        # With no tensor at all it makes one of nothing, there where the network is.
        if not used or any(tensor.is_meta or id(tensor) in self.known for tensor in used):
            args, kwargs = self._on_meta(args), self._on_meta(kwargs)
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    named = kwargs.get(argument.name)
                    self._check_own(args[place] if place < len(args) else named)
        quick = QUICK.get(func)
        with torch._C._DisablePythonDispatcher():
            out = quick(*args, **kwargs) if quick is not None else None
            out = func(*args, **kwargs) if out is None else out
        several = isinstance(out, list | tuple)
        items = list(out) if several else [out]
        if any(isinstance(item, Tensor) for item in items):
            step = len(self.record.steps)
            shapes: list[Shape | None] = []
            for index, item in enumerate(items):
                if isinstance(item, Tensor):
                    self.refs[id(item)] = Ref(step, index)
                    self.alive.append(item)
                    shapes.append(shape_of(item))
                    self.made[_memory(item)] = self.refs[id(item)]
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
        # Some operators, torch.arange and zeros_like among them, hand out another tensor with the same memory.
        made = self.made.get(_memory(tensor))
        if made is not None:
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
        return META if isinstance(value, torch.device) and value == self.device else value

    def _on_meta(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.is_meta:
                return value
            if id(value) in self.known:
                return self.known[id(value)][0]
            stand_in = value.to(META)
            self.alive.append(stand_in)
            return stand_in
        if isinstance(value, torch.device) and value == self.device:
            return META
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


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), shape_of(tensor)


def shape_of(tensor: Tensor) -> Shape:
    if type(tensor) is not Tensor or tensor.layout is not torch.strided:
        raise Unclear("a tensor of another kind")
    return Shape(tuple(tensor.shape), tensor.stride(), tensor.dtype)


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
    with unchanged(module):
        forgotten(module)
        for path, part in module.named_modules():
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = tensors[f"{path}.{name}" if path else name]
        yield


class Runner:
    """Records a network at any sizes of its inputs."""

    def __init__(self, module: nn.Module, example: Mapping[str, Tensor]) -> None:
        self.module, self.example = module, example
        self.results: list[Any] = []
        self.asked = False  # whether the network wanted values for checks or messages
        self.without_values: list[weakref.ref[Tensor]] = []  # what recordings made
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
        record = self._record(moved)
        self.results.append(record.result)
        self.forget()
        return record

    def forget(self) -> None:
        """Leave no tensors without values in caches outside of the network; the next run makes what is cached itself."""
        forget(self.without_values, (self.results, self.own))

    def _record(self, moved: Mapping[tuple[str, int], int]) -> Recording:
        known, inputs = dict(self.known), {}
        for name, tensor in self.example.items():
            size = [moved.get((name, dim), length) for dim, length in enumerate(tensor.shape)]
            inputs[name] = torch.empty(size, dtype=tensor.dtype, device=META)
            known[id(inputs[name])] = inputs[name], name
        recorder = _Recorder(known, self.device)
        try:
            return self._recorded(recorder, inputs, bool(moved))
        finally:
            self.without_values += [weakref.ref(t) for t in recorder.alive if t.is_meta]

    def _recorded(self, recorder: _Recorder, inputs: dict[str, Tensor], moved: bool) -> Recording:
        with (
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            exporting(),
            unsaid(without_values) as asked,
            opened(),
            _swapped(self.module, self.own),
            # Which modules ran is the same at every size.
            nullcontext() if moved else _stacked(self.module, recorder.stack),
            enable_python_dispatcher(),
            recorder,
            nullcontext() if self.device == META else located(self.device, lambda: recorder.inside),
        ):
            result = self.module(**inputs)
        self.asked |= bool(asked)
        record = recorder.record
        record.result = result
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                record.outputs.append(recorder.ref(leaf))
        return record


def refs(recording: Recording) -> Iterator[Ref]:
    for step in recording.steps:
        yield from refs_in((step.args, step.kwargs))
    yield from recording.outputs


def refs_in(value: Any) -> Iterator[Ref]:
    """The references to tensors in an argument."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from refs_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from refs_in(item)


def map_refs(value: Any, moved: Mapping[Ref, Ref]) -> Any:
    """An argument with other references in the place of some."""
    if isinstance(value, Ref):
        return moved.get(value, value)
    if isinstance(value, list | tuple):
        return type(value)([map_refs(item, moved) for item in value])
    if isinstance(value, dict):
        return {key: map_refs(item, moved) for key, item in value.items()}
    return value


def used(recording: Recording) -> set[str]:
    return {ref.item for ref in refs(recording) if isinstance(ref.item, str)}
