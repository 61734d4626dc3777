"""Which groups keep the same width so that every layer of a kind stays alike and the result is a standard checkpoint."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm, prod
from typing import Any

from tinier.edits.config import WIDTH, config_says, first_number
from tinier.edits.config_numbers import Dim, Number, keeps_its_layers
from tinier.graph.axes import Atom, Axis, Product, atoms, size
from tinier.graph.groups import Channels, Group
from tinier.modules.keras import KerasModule
from tinier.network import Network

Bundle = tuple[tuple[Group, int], ...]
PLAIN = ("channel", "neuron", "hidden", "normalised")
BLOCK = 16  # bytes


@dataclass(frozen=True)
class Together:
    """What changes in step, and which widths it may have.

    Attributes:
        network: whose ``config`` is looked at, where its module has one.
        channels: of the network.
        uniform: whether layers stay alike.
        says: number of the config → the dimensions of parameters that it governs; empty without a config.
    """

    network: Network
    channels: Channels
    uniform: bool
    says: Mapping[Number, frozenset[Dim]]

    @staticmethod
    def of(network: Network, channels: Channels, uniform: bool) -> "Together":
        """Look at the config of a network, if layers are to stay alike.

        Cost:
            For each number of the config, the class built once without memory for its weights.
        """
        return Together(
            network, channels, uniform, config_says(network.module).dims if uniform else {}
        )

    def bundles(self, groups: Sequence[Group]) -> list[Bundle]:
        """Groups that change in step, so that one number says how wide they are.

        A class with a Hugging Face config is built from numbers: all groups that a number governs change with it, heads of a size that the
        class derives among them, and what no number governs stays. In other classes those groups go together that have the same name but
        for its numbers, the same kind and the same size. Where one of a bundle must stay, all of it does.

        Args:
            groups: that may be cut.

        Returns:
            Tuples of (group, unit): of count n the group keeps n · unit channels.
        """
        if not self.uniform:
            return _tied(self.network, [_bundle([group]) for group in groups])
        # Heads, their size and experts have numbers of their own where no width governs their dimensions.
        derived = frozenset[Dim]().union(*self.says.values())
        found = [
            _in_step(
                _moved(frozenset().union(*(self.says[n] for n in numbers)), plain, self.channels)
            )
            for numbers, plain in _components(self.says, self.channels)
        ]
        alike: dict[tuple[object, ...], list[Group]] = {}
        for group in self.channels.groups:
            key: tuple[object, ...] = (group.kind, "repeated" in group.atom.roles, group.size)
            if not self.says:
                key = (*key, re.sub(r"\d+", "*", group.name), group.minimum)
            elif group.kind in PLAIN or _dims(group) & derived:
                continue
            alike.setdefault(key, []).append(group)
        found += [_bundle(same) for same in alike.values()]
        found = _tied(self.network, found)
        free = {group.atom for group in groups}
        return [b for b in found if b and all(group.atom in free for group, _ in b)]

    def divides(self, bundle: Bundle) -> int:
        """The width that the number of heads must divide, by the rules of Hugging Face configs; 0 for other bundles and classes."""
        if not self.says or any(group.kind != "head" for group, _ in bundle):
            return 0
        return first_number(self.network.module.config, WIDTH) or 0

    def never(self, bundle: Bundle) -> frozenset[int]:
        """Counts with which a class would have other layers: some leave a projection out between two equal widths."""
        plain = [group for group, _ in bundle if group.kind in PLAIN]
        own = [n for n, dims in self.says.items() if any(_dims(group) & dims for group in plain)]
        whole = bundle[0][0].size // bundle[0][1]
        found = set()
        for other in self.says:
            for number in own if other not in own and other.name in WIDTH else ():
                count = Fraction(other.value * whole, number.value)
                if count.denominator == 1 and count < whole:
                    changes = {n: n.value * int(count) // whole for n in own}
                    if not keeps_its_layers(self.network.module, changes):
                        found.add(int(count))
        return frozenset(found)

    def grain(self, bundle: Bundle) -> int:
        """What counts are multiples of: torch multiplies the stacked weights of experts where their rows are whole blocks of 16 bytes."""
        result = 1
        for group, unit in bundle:
            for slot in group.slots:
                axes = self.channels.parameters[slot.parameter]
                others = {atom for axis in axes for atom in atoms(axis)} - {group.atom}
                if any("expert" in atom.roles for atom in others):
                    tensor: Any = self.network.traced.module.get_parameter(slot.parameter)
                    whole = max(BLOCK // tensor.element_size(), 1)
                    result = lcm(result, whole // gcd(whole, unit))
        return 1 if bundle[0][0].size // bundle[0][1] % result else result


def _bundle(groups: Sequence[Group]) -> Bundle:
    return tuple((group, 1) for group in groups)


def _tied(network: Network, found: list[Bundle]) -> list[Bundle]:
    """Bundles in which groups are together that the class cannot give different widths: the two directions of Keras."""
    module = network.module
    pairs = module.directions() if isinstance(module, KerasModule) else {}
    names = [group.name for bundle in found for group, _ in bundle]
    for forward, backward in pairs.items():
        for one in names:
            if one.startswith(f"{forward}."):
                two = backward + one.removeprefix(forward)
                both = [b for b in found if any(group.name in (one, two) for group, _ in b)]
                if len(both) == 2:
                    found = [b for b in found if b not in both] + [both[0] + both[1]]
    return found


def _in_step(groups: list[Group]) -> Bundle:
    base = gcd(*(group.size for group in groups)) if groups else 1
    return tuple((group, group.size // base) for group in groups)


def _dims(group: Group) -> set[Dim]:
    return {(slot.parameter, slot.dim) for slot in group.slots}


def _components(
    says: Mapping[Number, frozenset[Dim]], channels: Channels
) -> Iterator[tuple[list[Number], list[Group]]]:
    """Numbers that share a group, and the plain groups that they govern: all of them shrink in step."""
    rest = [group for group in channels.groups if group.kind in PLAIN]
    open_numbers = list(says)
    while open_numbers:
        numbers, groups = [open_numbers.pop(0)], list[Group]()
        for number in numbers:  # grows
            found = [group for group in rest if _dims(group) & says[number]]
            groups += found
            rest = [group for group in rest if group not in found]
            dims = set[Dim]().union(*map(_dims, found))
            more = [other for other in open_numbers if says[other] & dims]
            numbers += more
            open_numbers = [other for other in open_numbers if other not in more]
        yield numbers, groups


def _moved(dims: frozenset[Dim], plain: list[Group], channels: Channels) -> list[Group]:
    """The groups that shrink with some numbers, heads of a size that a class derives among them; none where some must stay."""
    heads = [
        group
        for group in channels.groups
        if group.kind == "head" and "repeated" not in group.atom.roles and _dims(group) & dims
    ]
    axes = [
        axis
        for name, found in channels.parameters.items()
        for dim, axis in enumerate(found)
        if (name, dim) in dims
    ]
    # Of groups that multiply in one dimension the widest shrinks alone; what also stands where no number reaches stays.
    moved = list[Group]()
    plain = [group for group in plain if _dims(group) <= dims]
    for group in sorted((*heads, *plain), key=lambda g: (g.kind != "head", -g.size)):
        theirs = {other.atom for other in moved}
        if all(_halved(a, theirs | {group.atom}) >= Fraction(size(a), 2) for a in axes):
            moved.append(group)
    theirs = {group.atom for group in moved}
    alike = all(_halved(axis, theirs) == Fraction(size(axis), 2) for axis in axes)
    return moved if plain and alike else []


def _halved(axis: Axis, theirs: set[Atom]) -> Fraction:
    """The size of an axis when some of its atoms are half as wide."""
    if isinstance(axis, Atom):
        return Fraction(axis.size, 2 if axis in theirs else 1)
    if isinstance(axis, Product):
        return prod((_halved(factor, theirs) for factor in axis.factors), start=Fraction(1))
    return sum((_halved(part, theirs) for part in axis.parts), start=Fraction(0))
