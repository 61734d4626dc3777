"""An algebra of axes: what one dimension of one tensor is made of, whole axes at a time.

    Axis = Atom(size) | Product(Axis, …) | Concat(Axis, …)

``Product`` is row-major regrouping: an axis of 12·64 that a view splits into 12 heads of 64 is ``Product(heads, head_dim)``.
``Concat`` is joining end to end. Two axes that an operator makes *the same* are unified: both are refined to one common form by
union-find on the atoms, so the cost grows with operators and never with channels.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import Union

import torch
from torch import Tensor

Axis = Union["Atom", "Product", "Concat"]
_numbers = count()


@dataclass(frozen=True)
class Pin:
    """Why an axis cannot be cut: the operator that holds it and the reason."""

    operator: str
    reason: str


class Atom:
    """An axis that nothing has taken apart.

    Attributes:
        size: number of positions.
        bound: the axis that this atom turned out to be, once it has been refined or unified.
        pins: why it must keep its size; empty for a free atom.
        roles: what operators use it for: "head", "head_dim", "hidden", "expert", "normalised", "repeated" (the same values at
            each position, as key heads that several query heads share).
        minimum: how many positions must stay: the k of a top-k over it.
        number: order of creation, which makes every listing deterministic.
    """

    __slots__ = ("bound", "minimum", "number", "pins", "roles", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.bound: Axis | None = None
        self.pins: list[Pin] = []
        self.roles: set[str] = set()
        self.minimum = 1
        self.number = next(_numbers)

    def __repr__(self) -> str:
        return f"a{self.number}:{self.size}" + ("!" if self.pins else "")


@dataclass(frozen=True)
class Product:
    """Row-major product: position = ((i₁ · n₂) + i₂) · n₃ + i₃ …; no factors make the axis of size 1."""

    factors: tuple[Axis, ...]


@dataclass(frozen=True)
class Concat:
    """Parts end to end."""

    parts: tuple[Axis, ...]


UNIT = Product(())


class Mismatch(Exception):
    """Two axes have no common form."""


def fresh(size: int) -> Axis:
    """A new axis of which nothing is known."""
    return UNIT if size == 1 else Atom(size)


def size(axis: Axis) -> int:
    """Number of positions."""
    if isinstance(axis, Atom):
        return axis.size
    if isinstance(axis, Product):
        return prod(size(factor) for factor in axis.factors)
    return sum(size(part) for part in axis.parts)


def product(*axes: Axis) -> Axis:
    """The product in normal form: no nested products, no factors of size 1."""
    factors: list[Axis] = []
    for axis in axes:
        axis = shallow(axis)
        factors += axis.factors if isinstance(axis, Product) else [axis]
    return factors[0] if len(factors) == 1 else Product(tuple(factors))


def concat(*axes: Axis) -> Axis:
    """The concatenation in normal form: no nested concatenations, no empty parts."""
    parts: list[Axis] = []
    for axis in axes:
        axis = shallow(axis)
        parts += axis.parts if isinstance(axis, Concat) else [axis]
    parts = [part for part in parts if size(part)]
    return parts[0] if len(parts) == 1 else Concat(tuple(parts))


def shallow(axis: Axis) -> Axis:
    """What an axis is bound to, its own parts unresolved; shortens the chain behind it (path compression)."""
    end = axis
    while isinstance(end, Atom) and end.bound is not None:
        end = end.bound
    while isinstance(axis, Atom) and axis.bound is not None and axis.bound is not end:
        axis.bound, axis = end, axis.bound
    return end


def resolve(axis: Axis) -> Axis:
    """The axis in normal form, down to atoms that nothing has taken apart."""
    axis = shallow(axis)
    if isinstance(axis, Product):
        return product(*(resolve(factor) for factor in axis.factors))
    if isinstance(axis, Concat):
        return concat(*(resolve(part) for part in axis.parts))
    return axis


def atoms(axis: Axis) -> Iterator[Atom]:
    """Every atom of the resolved axis, once for each place where it occurs."""
    axis = shallow(axis)
    if isinstance(axis, Atom):
        yield axis
    else:
        for part in axis.factors if isinstance(axis, Product) else axis.parts:
            yield from atoms(part)


def pin(axis: Axis, why: Pin) -> None:
    """Keep every atom of the axis at its size."""
    for atom in atoms(axis):
        if why not in atom.pins:
            atom.pins.append(why)


def mark(axis: Axis, role: str) -> None:
    """Note what every atom of the axis is used for."""
    for atom in atoms(axis):
        atom.roles.add(role)


def unify(left: Axis, right: Axis) -> None:
    """Make two axes the same, refining both to a common form.

    Raises:
        Mismatch: they have none; atoms that were unified until then stay so, and the caller pins both axes.

    Cost:
        Linear in the number of terms, whatever their sizes.
    """
    left, right = resolve(left), resolve(right)
    if left is right or left == right:
        return
    if size(left) != size(right):
        raise Mismatch(f"sizes {size(left)} and {size(right)} differ")
    if size(left) == 1:
        return
    if isinstance(left, Atom):
        _bind(left, right)
    elif isinstance(right, Atom):
        _bind(right, left)
    elif isinstance(left, Product) and isinstance(right, Product):
        _unify_products(list(left.factors), list(right.factors))
    elif isinstance(left, Concat) and isinstance(right, Concat):
        _unify_concats(list(left.parts), list(right.parts))
    elif isinstance(left, Concat) and isinstance(right, Product):
        _distribute(left, right)
    elif isinstance(left, Product) and isinstance(right, Concat):
        _distribute(right, left)


def _bind(atom: Atom, axis: Axis) -> None:
    for leaf in atoms(axis):
        leaf.pins += [why for why in atom.pins if why not in leaf.pins]
        leaf.roles |= atom.roles
        leaf.minimum = max(leaf.minimum, min(atom.minimum, leaf.size))
    atom.bound = axis


def _unify_products(left: list[Axis], right: list[Axis]) -> None:
    while left and right:
        first, second = left.pop(0), right.pop(0)
        if size(first) > size(second):
            first, rest = halves(first, size(second))
            left.insert(0, rest)
        elif size(second) > size(first):
            second, rest = halves(second, size(first))
            right.insert(0, rest)
        unify(first, second)


def _unify_concats(left: list[Axis], right: list[Axis]) -> None:
    starts = _starts(left)
    for part, start in _starts(right).items():
        # By its own length or more, as the halves of rotary embeddings, whole parts become the same.
        if 0 < abs(starts.get(part, start) - start) < size(part):
            raise Mismatch("an axis meets itself shifted")
    while left and right:
        first, second = left.pop(0), right.pop(0)
        if size(first) > size(second):
            first, rest = cut(first, (size(second), size(first) - size(second)))
            left.insert(0, rest)
        elif size(second) > size(first):
            second, rest = cut(second, (size(first), size(second) - size(first)))
            right.insert(0, rest)
        unify(first, second)


def _starts(parts: list[Axis]) -> dict[Axis, int]:
    """Where each part of more than one position starts; of a part that occurs again, the first time."""
    starts: dict[Axis, int] = {}
    offset = 0
    for part in parts:
        if size(part) > 1:
            starts.setdefault(part, offset)
        offset += size(part)
    return starts


def _distribute(joined: Concat, whole: Product) -> None:
    """Concat(a·r, b·r) = Product(Concat(a, b), r): the leading factor is cut where the parts end."""
    leading, rest = whole.factors[0], product(*whole.factors[1:])
    inner = size(rest)
    if any(size(part) % inner for part in joined.parts):
        raise Mismatch(f"parts of {[size(part) for part in joined.parts]} and groups of {inner}")
    pieces = cut(leading, tuple(size(part) // inner for part in joined.parts))
    for piece, part in zip(pieces, joined.parts, strict=True):
        unify(product(piece, rest), part)


def halves(axis: Axis, outer: int) -> tuple[Axis, Axis]:
    """Refine an axis into a product of ``outer`` and the rest.

    Raises:
        Mismatch: ``outer`` does not divide it, or cuts through its parts.
    """
    whole = size(axis)
    if not outer or whole % outer:
        raise Mismatch(f"{outer} does not divide {whole}")
    first, rest = fresh(outer), fresh(whole // outer)
    unify(product(first, rest), axis)
    return first, rest


def cut(axis: Axis, sizes: tuple[int, ...]) -> tuple[Axis, ...]:
    """Refine an axis into a concatenation of parts of these sizes.

    Raises:
        Mismatch: a boundary goes through a group.
    """
    parts = tuple(fresh(part) for part in sizes)
    unify(concat(*parts), axis)
    return parts


def regroup(axes: list[Axis], sizes: list[int]) -> list[Axis]:
    """The axes of a tensor after a row-major view to ``sizes``.

    Raises:
        Mismatch: an axis would have to be taken apart where it cannot.
    """
    rest: list[Axis] = []
    for axis in axes:
        axis = resolve(axis)
        rest += axis.factors if isinstance(axis, Product) else [axis]
    result = []
    for wanted in sizes:
        taken: list[Axis] = []
        while wanted > 1:
            factor = rest.pop(0)
            if wanted % size(factor):
                factor, remainder = halves(factor, wanted)
                rest.insert(0, remainder)
            taken.append(factor)
            wanted //= size(factor)
        result.append(product(*taken))
    return result


def kept_size(axis: Axis, sizes: Mapping[Atom, int]) -> int:
    """Number of positions when atoms shrink to ``sizes``; ``axis`` is resolved."""
    if isinstance(axis, Atom):
        return sizes.get(axis, axis.size)
    if isinstance(axis, Product):
        return prod(kept_size(factor, sizes) for factor in axis.factors)
    return sum(kept_size(part, sizes) for part in axis.parts)


def positions(axis: Axis, leaf: Callable[[Atom], Tensor]) -> Tensor:
    """Positions of the axis that are left, in ascending order, when ``leaf`` gives those of each atom.

    Args:
        axis: resolved.
        leaf: atom → (kept,) int64 positions in the atom, ascending.

    Returns:
        (kept,) int64 positions in the axis.
    """
    if isinstance(axis, Atom):
        return leaf(axis)
    if isinstance(axis, Product):
        result = torch.zeros(1, dtype=torch.int64)
        for factor in axis.factors:
            result = (result[:, None] * size(factor) + positions(factor, leaf)[None]).flatten()
        return result
    pieces, offset = [], 0
    for part in axis.parts:
        pieces.append(positions(part, leaf) + offset)
        offset += size(part)
    return torch.cat(pieces)


Path = tuple[int, ...]


def places(axis: Axis, path: Path = ()) -> Iterator[tuple[Atom, Path]]:
    """Every atom of a resolved axis with its position in the term: which factor or part, from the outside in."""
    if isinstance(axis, Atom):
        yield axis, path
    else:
        for index, part in enumerate(axis.factors if isinstance(axis, Product) else axis.parts):
            yield from places(part, (*path, index))


def coordinates(axis: Axis, path: Path) -> Tensor:
    """For each position of a resolved axis, the position in the atom at ``path``; −1 outside of it.

    Returns:
        (size,) int64.
    """
    if isinstance(axis, Atom):
        return torch.arange(axis.size)
    index, rest = path[0], path[1:]
    if isinstance(axis, Product):
        inner = coordinates(axis.factors[index], rest)
        before = prod(size(factor) for factor in axis.factors[:index])
        after = prod(size(factor) for factor in axis.factors[index + 1 :])
        return inner.repeat_interleave(after).repeat(before)
    pieces = [torch.full((size(part),), -1) for part in axis.parts]
    pieces[index] = coordinates(axis.parts[index], rest)
    return torch.cat(pieces)


def text(axis: Axis) -> str:
    """A resolved axis as a person reads it: (12 × 64), (32 + 32), 64."""
    if isinstance(axis, Atom):
        return str(axis.size)
    if isinstance(axis, Product):
        return "1" if not axis.factors else f"({' × '.join(map(text, axis.factors))})"
    return f"({' + '.join(map(text, axis.parts))})"
