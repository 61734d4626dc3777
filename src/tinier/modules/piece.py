"""A piece: one module's part of the traced graph in the module's place, for classes whose ``forward`` cannot take smaller weights."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from tinier.errors import InputError
from tinier.modules.attention import NarrowAttention

PLAIN = (int, float, bool, str, tuple, type(None))
VALUES = (int, float, bool, str, type(None), torch.dtype, torch.device)  # compared by value
Place = tuple[str, int]  # an argument, and which of its leaves
Leaves = dict[str, tuple[list[Any], pytree.TreeSpec]]  # argument → its leaves and how they go
ABSENT = pytree.tree_flatten(None)


class Form:
    """The one call that was recorded, as far as it is no tensor; shared by copies, as it never changes.

    Args:
        source: whose call it was.
        leaves: of (args, kwargs); tensors are kept as their shapes.
        spec: how they are put together.
        result: how the leaves of the result are put together.
    """

    def __init__(
        self,
        source: nn.Module,
        leaves: Sequence[Any],
        spec: pytree.TreeSpec,
        result: pytree.TreeSpec,
    ) -> None:
        self.result = result
        self.signature = _signature(source, *pytree.tree_unflatten(leaves, spec))
        marks = [object() for _ in leaves]
        places = {
            id(mark): (name, index)
            for name, (found, _) in self.bound(*pytree.tree_unflatten(marks, spec)).items()
            for index, mark in enumerate(found)
        }
        self.places: tuple[Place, ...] = tuple(places[id(mark)] for mark in marks)
        bound = self.bound(*pytree.tree_unflatten(leaves, spec))
        self.same: dict[Place, Place] = {}  # one tensor given twice
        self.sizes: dict[int, list[tuple[Place, int]]] = {}  # a number → dimensions as long
        first: dict[int, Place] = {}
        for place, tensor in _tensors(bound):
            self.same[place] = first.setdefault(id(tensor), place)
            for dim, length in enumerate(tensor.shape):
                self.sizes.setdefault(length, []).append((place, dim))
        self.given: Leaves = {
            name: ([x.to("meta") if isinstance(x, Tensor) else x for x in found], how)
            for name, (found, how) in bound.items()
        }

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Leaves:
        """The leaves of each argument, however it was given."""
        found = self.signature.bind(*args, **kwargs)
        found.apply_defaults()
        values = dict(found.arguments)
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                values |= values.pop(name)
        return {name: pytree.tree_flatten(value) for name, value in values.items()}

    def check(self, where: str, given: Leaves) -> None:
        """Refuse a call that the graph would not follow.

        Raises:
            InputError: an argument that is not what it was when the graph was recorded; "training" may be, and None for a cache.
        """
        for name in {**self.given, **given}:
            old, new = self.given.get(name, ABSENT), given.get(name, ABSENT)
            if name == "training" or (new == ABSENT and not _known(old[0])):
                continue
            if old[1] != new[1] or not all(
                self._like(a, b, given) for a, b in zip(old[0], new[0], strict=True)
            ):
                self._refuse(where, name, _text(new), _text(old))
        for place, first in self.same.items():
            if _at(given, place) is not _at(given, first):
                name, other = place[0], first[0]
                self._refuse(where, name, f"another tensor than {other}", "the same tensor")

    def _like(self, old: Any, new: Any, given: Leaves) -> bool:
        if isinstance(old, Tensor) or isinstance(new, Tensor):
            return isinstance(old, Tensor) and isinstance(new, Tensor) and old.dim() == new.dim()
        if isinstance(new, torch.SymInt):
            return isinstance(old, int)
        if not isinstance(old, VALUES):
            return new is None or type(new) is type(old)
        if not isinstance(new, VALUES):
            return False
        # A length that the example had: the graph takes it from the tensor.
        lengths = self.sizes.get(old, ()) if type(old) is type(new) is int else ()
        return bool(old == new) or any(
            _at(given, place).shape[dim] == new for place, dim in lengths
        )

    @staticmethod
    def _refuse(where: str, name: str, got: str, wanted: str) -> None:
        raise InputError(
            f"{where}: its argument {name} is {got}; in the example with which it was cut it was {wanted}, and the traced graph that "
            "stands there can take nothing else. Leave it as it was, or cut again with an example that has it (caches: use_cache=False)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Form":
        return self


def _signature(source: nn.Module, args: Any, kwargs: Any) -> inspect.Signature:
    found = (
        source._form.signature if isinstance(source, Piece) else inspect.signature(source.forward)
    )
    try:
        found.bind(*args, **kwargs)
    except TypeError:  # a wrapper that says less than it takes
        return inspect.signature(lambda *args, **kwargs: None)
    # Annotations may be anything, which copies and files of a module cannot.
    plain = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    return inspect.Signature(plain)


def _tensors(given: Leaves) -> Iterator[tuple[Place, Tensor]]:
    for name, (leaves, _) in given.items():
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                yield (name, index), leaf


def _known(leaves: Sequence[Any]) -> bool:
    return any(isinstance(leaf, (*VALUES, Tensor)) for leaf in leaves)


def _at(given: Leaves, place: Place) -> Any:
    return given[place[0]][0][place[1]]


def _text(given: tuple[list[Any], pytree.TreeSpec]) -> str:
    leaves = given[0]
    if len(leaves) != 1 or given[1] != ABSENT[1]:
        return f"a {getattr(given[1].type, '__name__', 'structure')} of {len(leaves)}"
    (leaf,) = leaves
    if isinstance(leaf, Tensor):
        return f"a tensor of {leaf.dim()} dimensions"
    return repr(leaf) if isinstance(leaf, VALUES) else f"a {type(leaf).__name__}"


class _Run(fx.Interpreter):
    """Dropout is recorded as a layer that does nothing in evaluation: in training it is on again."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.dropout.default and self.module.training:
            args = (*args[:2], True)
        return super().call_function(target, args, kwargs)


class Piece(nn.Module):
    """Computes what a module did, by its traced graph; parameters and attributes have the names they had.

    Args:
        source: the module whose place it takes, with the parameters that the graph reads.
        where: its path, for errors.
        graph: its placeholders are tensors, its output is a tuple; ``get_attr`` targets are names in ``source``.
        constants: name → tensor that the graph reads and ``source`` does not have.
        inputs: for each placeholder, which leaf of (args, kwargs) it is.
        outputs: leaves of the result: (True, position in the graph's output) or (False, a value).
        form: the call that was recorded.
        sizes: for each placeholder the sizes that the graph was made for; None where it takes any.
    """

    def __init__(
        self,
        source: nn.Module,
        where: str,
        graph: fx.Graph,
        constants: Mapping[str, Tensor],
        inputs: Sequence[int],
        outputs: Sequence[tuple[bool, Any]],
        form: Form,
        sizes: Sequence[tuple[int | None, ...]],
    ) -> None:
        super().__init__()
        self.replaced: str = type(source).__name__
        for name, value in vars(source).items():
            if isinstance(value, PLAIN):
                setattr(self, name, value)
        if isinstance(source, nn.MultiheadAttention):
            # Torch's encoder layers would read its weights past it.
            self._qkv_same_embed_dim = False
        read = {str(node.target) for node in graph.find_nodes(op="get_attr")}
        held = (*source.named_parameters(), *source.named_buffers())
        for name, tensor in (*held, *constants.items()):
            if name in read:
                self._hold(name, tensor, name in source.state_dict())
        self._piece, self._form, self._where = graph, form, f"{where} ({self.replaced})"
        self._inputs, self._outputs = tuple(form.places[i] for i in inputs), tuple(outputs)
        self._sizes = tuple(sizes)
        self.training = source.training

    def _hold(self, name: str, tensor: Tensor, persistent: bool) -> None:
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for step in path:
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor, persistent=persistent)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the replaced module returns for these arguments, in evaluation mode but for layers of dropout.

        Raises:
            InputError: the arguments are put together otherwise than in the recorded call, such as a mask or a cache where there was none,
                a value among them that is no tensor is another one, or a tensor has a size that the graph was not made for.
        """
        given = self._form.bound(args, kwargs)
        self._form.check(self._where, given)
        tensors = [_at(given, place) for place in self._inputs]
        for place, tensor, sizes in zip(self._inputs, tensors, self._sizes, strict=True):
            self._check_sizes(place[0], tensor, sizes)
        found = _Run(self, graph=self._piece).run(*tensors)
        values = [found[value] if computed else value for computed, value in self._outputs]
        return pytree.tree_unflatten(values, self._form.result)

    def _check_sizes(self, name: str, tensor: Tensor, sizes: tuple[int | None, ...]) -> None:
        # A size of 1 is spread over any.
        if any(
            size not in (None, 1, length) for size, length in zip(sizes, tensor.shape, strict=True)
        ):
            wanted = " × ".join("free" if size is None else str(size) for size in sizes)
            raise InputError(
                f"{self._where}: its argument {name} is {' × '.join(map(str, tensor.shape))}, {wanted} is needed: the traced graph that "
                "stands there has these sizes from the example; cut again with an example of the sizes that you need"
            )

    def extra_repr(self) -> str:
        """The class that it stands for."""
        return f"the traced graph of {self.replaced}"


def replaced(module: nn.Module) -> tuple[str, ...]:
    """A sentence on the pieces in a module and one on the attentions, or nothing where it has none."""
    result = []
    pieces = [(p, m.replaced) for p, m in module.named_modules() if isinstance(m, Piece)]
    if pieces:
        result.append(
            f"the class is kept, but for {_first(pieces)}: its forward cannot take the smaller weights; its traced graph stands there, "
            "in evaluation mode but for layers of dropout, and refuses masks, caches and other arguments that the example did not have"
        )
    narrow = [
        (p, "MultiheadAttention")
        for p, m in module.named_modules()
        if isinstance(m, NarrowAttention)
    ]
    if narrow:
        result.append(
            f"NarrowAttention stands for {_first(narrow)}, which needs heads that together are as wide as its input; parameters, masks and "
            "dropout are the same"
        )
    return tuple(result)


def _first(found: Sequence[tuple[str, str]]) -> str:
    (path, name), more = found[0], len(found) - 1
    return f"{path} ({name})" + (f" and {more} more" if more else "")
