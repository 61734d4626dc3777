"""How many channels each group keeps: one threshold on ranks, searched until the cost is met."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from tinier.graph.axes import Atom, Axis, Concat, Product, size
from tinier.graph.groups import Group
from tinier.graph.macs import Cost

NEAR = 0.95  # of the budget; widths are rounded less where less of it is used
COARSE = 8  # so many knobs are tried one notch wider
WIDTHS = 4  # a knob has at least this many widths to choose from, rounded less where it is narrow


@dataclass(frozen=True, eq=False)
class Knob:
    """Groups whose widths change in step.

    Attributes:
        groups: (group, unit): of count n the group keeps n · unit channels; all have size · unit channels.
        ranks: (size,) float64, descending: how soon the n-th best unit leaves.
        floor: the least count.
        divides: counts must divide this, as heads must a width; 0 for any count.
        grain: counts are multiples of this, as kernels that multiply the weights of several experts at once need.
        never: counts that are not possible.
    """

    groups: tuple[tuple[Group, int], ...]
    ranks: Tensor
    floor: int
    divides: int = 0
    grain: int = 1
    never: frozenset[int] = frozenset()

    @property
    def size(self) -> int:
        """The count with nothing cut."""
        return len(self.ranks)

    def at(self, count: int) -> dict[Atom, int]:
        """The widths at a count."""
        return {group.atom: count * unit for group, unit in self.groups}

    def possible(self, count: int) -> bool:
        """Whether the groups may have this count."""
        return count not in self.never and not (self.divides and self.divides % count)

    def down(self, count: int) -> int:
        """The next count at or below this one that is possible; the floor if none is."""
        while count > self.floor and not self.possible(count):
            count -= self.grain
        return max(count, self.floor)

    def up(self, count: int, step: int) -> int:
        """The next wider count that is possible, about one step on."""
        wider = min(count + step, self.size)
        while wider < self.size and not self.possible(wider):
            wider = min(wider + self.grain, self.size)
        return wider

    def step(self, rounding: int) -> int:
        """By what the count changes so that the parameters' dimensions stay multiples of ``rounding``."""
        step = self.grain
        for group, unit in self.groups:
            inner = 0
            for slot in group.slots:
                inner = gcd(inner, multiplicity(slot.axis, group.atom))
            wanted = rounding // gcd(rounding, inner * unit)
            step = step * wanted // gcd(step, wanted)
        # Narrow groups need some widths to choose from: 8 and 16 alone are too coarse for 16 channels.
        while step > self.grain and self.size < WIDTHS * step:
            step = self.finer(step)
        return step

    def finer(self, step: int) -> int:
        """About half a step, as far as the grain allows."""
        return max(step // 2 // self.grain, 1) * self.grain


def allocate(
    knobs: Sequence[Knob], cost: Cost, budget: float, rounding: int
) -> dict[Atom, int] | None:
    """Widths that cost at most the budget, as near to it as they get.

    Every unit that ranks above one threshold stays; what rounding leaves over goes to the best units that still fit.

    Args:
        knobs: what may change.
        cost: of the network.
        budget: in the unit of ``cost``.
        rounding: the multiple that widths are rounded to, given up where the budget cannot be met with it.

    Returns:
        Atom → width; None if even the floors cost more.

    Cost:
        Some twenty evaluations of the cost; nine times as many where widths are so coarse that much of the budget is left.
    """
    counts = _search(knobs, cost, budget, rounding) if knobs else None
    if counts is None:
        return None
    widths = _widths(knobs, counts)
    spent = cost.at(widths)
    if spent >= NEAR * budget:
        return widths
    # A coarse knob may leave much of the budget: one notch more of it, and less of the others, may be nearer.
    notches = [knob.up(count, knob.grain) for knob, count in zip(knobs, counts, strict=True)]
    prices = [cost.at(widths | k.at(n)) - spent for k, n in zip(knobs, notches, strict=True)]
    coarse = [i for i in range(len(knobs)) if spent + prices[i] > budget]
    for index in sorted(coarse, key=lambda i: -prices[i])[:COARSE]:
        others = [knob for place, knob in enumerate(knobs) if place != index]
        wider = knobs[index].at(notches[index])
        around = Cost(cost.terms, cost.settled | wider)
        found = _search(others, around, budget, rounding) if others else None
        if found is not None and cost.at(trial := wider | _widths(others, found)) > cost.at(widths):
            widths = trial
    return widths


def _search(knobs: Sequence[Knob], cost: Cost, budget: float, rounding: int) -> list[int] | None:
    everything = torch.cat([knob.ranks for knob in knobs]).unique()
    for multiple in (rounding, 1):
        steps = [knob.step(multiple) for knob in knobs]
        floors = [
            knob.up(min(-(-knob.floor // step) * step, knob.size), 0)
            for knob, step in zip(knobs, steps, strict=True)
        ]
        if cost.at(_widths(knobs, floors)) > budget:
            continue
        low, high = 0, len(everything)  # everything above everything[low] stays: too much
        counts = floors
        while low < high:
            middle = (low + high) // 2
            trial = _above(knobs, float(everything[middle]), steps, floors)
            if cost.at(_widths(knobs, trial)) <= budget:
                high, counts = middle, trial
            else:
                low = middle + 1
        counts = _refill(knobs, counts, steps, cost, budget)
        # Narrow networks have few multiples to choose from: finer ones use what is left of the budget.
        while cost.at(_widths(knobs, counts)) < NEAR * budget:
            finer = [knob.finer(step) for knob, step in zip(knobs, steps, strict=True)]
            if finer == steps:
                break
            steps = finer
            counts = _refill(knobs, counts, steps, cost, budget)
        return counts
    return None


def above(knobs: Sequence[Knob], threshold: float, rounding: int) -> dict[Atom, int]:
    """Widths that keep every unit that ranks above a threshold, and the floors."""
    steps = [knob.step(rounding) for knob in knobs]
    floors = [knob.floor for knob in knobs]
    return _widths(knobs, _above(knobs, threshold, steps, floors))


def _widths(knobs: Sequence[Knob], counts: Sequence[int]) -> dict[Atom, int]:
    result: dict[Atom, int] = {}
    for knob, count in zip(knobs, counts, strict=True):
        result |= knob.at(count)
    return result


def _above(
    knobs: Sequence[Knob], threshold: float, steps: Sequence[int], floors: Sequence[int]
) -> list[int]:
    result = []
    for knob, step, floor in zip(knobs, steps, floors, strict=True):
        count = int((knob.ranks > threshold).sum())
        wanted = min(max(int(count / step + 0.5) * step, floor), knob.size)
        result.append(knob.down(wanted))
    return result


def _refill(
    knobs: Sequence[Knob],
    counts: Sequence[int],
    steps: Sequence[int],
    cost: Cost,
    budget: float,
) -> list[int]:
    result = list(counts)
    widths = _widths(knobs, result)
    spent = cost.at(widths)
    narrow = [index for index, knob in enumerate(knobs) if result[index] < knob.size]
    while narrow:
        index = max(narrow, key=lambda i: (float(knobs[i].ranks[result[i]]), -i))
        knob, wider = knobs[index], knobs[index].up(result[index], steps[index])
        extra, trial = 0.0, dict(widths)
        for atom, width in knob.at(wider).items():
            extra += cost.change(trial, atom, width)
            trial[atom] = width
        fits = spent + extra <= budget
        if fits:
            result[index], widths, spent = wider, trial, spent + extra
        if not fits or wider == knob.size:
            narrow.remove(index)
    return result


def multiplicity(axis: Axis, atom: Atom) -> int:
    """How many positions of a resolved axis each position of an atom stands for."""
    if isinstance(axis, Product):
        inside = next(f for f in axis.factors if contains(f, atom))
        return size(axis) // size(inside) * multiplicity(inside, atom)
    if isinstance(axis, Concat):
        found = 0
        for part in axis.parts:
            if contains(part, atom):
                found = gcd(found, multiplicity(part, atom))
        return found
    return 1


def contains(axis: Axis, atom: Atom) -> bool:
    """Whether an atom occurs in a resolved axis."""
    if isinstance(axis, Atom):
        return axis is atom
    inner = axis.factors if isinstance(axis, Product) else axis.parts
    return any(contains(part, atom) for part in inner)
