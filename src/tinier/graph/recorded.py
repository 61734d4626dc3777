"""One graph of several recordings of a network: what differs between them follows the batch and the sequence.

A number that changes with the sizes of the inputs is c + k · n of one free size n, or k · n · m of several, and is computed from the
inputs in the graph. Whatever is not clear beyond doubt is left to torch.export: ``Unclear``.
"""

import operator
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._guards import GuardSource, Source
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from tinier.graph.capture import register
from tinier.graph.record import Recording, Ref, Runner, Shape, Step, Unclear, refs, shape_of, used
from tinier.graph.rejoined import rejoined
from tinier.graph.shapes import META

aten = torch.ops.aten


class Unconfirmed(Unclear):
    """Two recordings agree on a number that a third has to confirm."""


class Size(NamedTuple):
    """A number that follows the free sizes: constant + factor · the product of some of them, by position."""

    constant: int
    factor: int
    of: tuple[int, ...]


def other_size(example: Mapping[str, Tensor], place: tuple[str, int], by: int) -> int:
    """Another size: longer batches; shorter sequences, for many models only have so many positions."""
    name, dim = place
    size = example[name].shape[dim]
    return size - by if dim and size > 2 * by + 2 else size + by


class _Origin(Source):
    """Where a free size comes from, for torch's messages; torch's own classes of this kind take a second to import."""

    def __init__(self, name: str) -> None:
        self.origin = name

    @cached_property
    def guard_source(self) -> GuardSource:
        return GuardSource.CONSTANT

    @property
    def _name_template(self) -> str:
        return self.origin


class Builder:
    """Makes one graph of recordings.

    Args:
        run: what recorded them.
        groups: for each free size, the places (input, dimension) that have it.
        recordings: the first as given, one for each free size, and the last with all of them changed by much. With one free size, two
            recordings are enough where all that follows it is in proportion to it.
        far: place → its size in the last recording.
        checks: place → its size, for further recordings before the last, that only confirm.
    """

    def __init__(
        self,
        run: Runner,
        groups: Sequence[tuple[tuple[str, int], ...]],
        recordings: Sequence[Recording],
        far: Mapping[tuple[str, int], int] | None = None,
        checks: Sequence[Mapping[tuple[str, int], int]] = (),
    ) -> None:
        self.run, self.groups, self.recordings = run, groups, [rejoined(r) for r in recordings]
        example = run.example
        self.old = [example[dims[0][0]].shape[dims[0][1]] for dims in groups]
        self.far = [far[dims[0]] for dims in groups] if far else []
        self.checks = [
            [sizes.get(dims[0], old) for dims, old in zip(groups, self.old, strict=True)]
            for sizes in checks
        ]
        self.confirmed = len(recordings) != len(groups) + 1
        near = [other_size(example, dims[0], 1) for dims in groups]
        self.new = near if self.confirmed else self.far
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
                if (
                    found is None
                    or found.dtype != constant.dtype
                    or not torch.equal(found, constant)
                ):
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
        names = used(self.recordings[0])
        for name, p in module.named_parameters(remove_duplicate=False):
            register(root, name, own.setdefault(id(p), nn.Parameter(p.detach(), p.requires_grad)))
        for name, tensor in module.named_buffers(remove_duplicate=False):
            register(root, name, own.setdefault(id(tensor), tensor.detach().clone()))
        for name, tensor in self.recordings[0].constants.items():
            if hasattr(root, name):
                raise Unclear(f"{name} is a name of the network's")
            register(root, name, tensor.detach().clone())
        shapes = {name: shape_of(t) for name, t in self.run.own.items()}
        shapes |= {name: shape_of(t.to(META)) for name, t in self.recordings[0].constants.items()}
        for name, shape in shapes.items():
            if name in names:
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
            target = aten.sym_size.int
            node = self.graph.create_node("call_function", target, given, {}, "sym_size_int")
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
        for index in sorted(self._items.get(number, ())):
            part = self.graph.call_function(operator.getitem, (node, index))
            part.meta = {**node.meta, "val": vals[index]}
            self.nodes[number, index] = part

    @cached_property
    def _items(self) -> dict[int, set[int]]:
        """Step → those of its results that are used."""
        found: dict[int, set[int]] = {}
        for ref in refs(self.recordings[0]):
            if isinstance(ref.item, int):
                found.setdefault(ref.step, set()).add(ref.item)
        return found

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
        first, moved = values[0], values[1 : 1 + len(self.groups)]
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
            if size.constant and not self.confirmed:
                raise Unconfirmed("a number follows a size, but not in proportion")
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
        for index, check in enumerate(self.checks):
            points[len(self.groups) + 1 + index] = check
        points[-1] = list(self.far)
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
                other = self.sym_nodes[index], self.symbols[index]
                node, value = self._computed(operator.mul, node, value, *other)
            for function, n, nothing in (
                (operator.mul, size.factor, 1),
                (operator.add, size.constant, 0),
            ):
                if n != nothing:
                    node, value = self._computed(function, node, value, n, n)
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
        env = self.fake.shape_env
        assert env is not None
        source = _Origin(name)
        symbol = env.create_symbol(value, source, DimDynamic.DYNAMIC)
        return env.create_symintnode(symbol, hint=value, source=source)
