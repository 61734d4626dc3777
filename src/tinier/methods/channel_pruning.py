"""Channel pruning: whole channels, neurons and heads leave until the network costs what was asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, gcd
from typing import ClassVar

from torch import Tensor

from tinier.criteria.base import Criterion
from tinier.criteria.magnitude import Magnitude
from tinier.edits.base import Plan
from tinier.edits.slice import Slice
from tinier.errors import InputError, RefusedError
from tinier.graph.axes import Atom, Concat, Product, size
from tinier.graph.groups import Channels, Group, channel_groups
from tinier.graph.macs import Cost, mac_terms, parameter_terms
from tinier.methods.base import Method
from tinier.network import Network
from tinier.statistics import Statistics

WIDTHS = 4  # a group has at least this many widths to choose from, rounded less where it is narrow


@dataclass(frozen=True)
class ChannelPruning(Method):
    """Rank the channels of all groups against each other and cut the lowest until the cost is low enough.

    Channel i of group g ranks by sᵢ / (mean of s over g) / (c_g / mean of c)^cost_weight, where s is the criterion's score and c_g what
    the network saves when the group goes. Every group keeps at least ``min_keep`` of its channels, and at least one.

    Attributes:
        keep: the share of the cost that may be left, in (0, 1].
        of: what is counted: "macs" at batch 1, or "parameters".
        criterion: scores the channels.
        round_to: widths become multiples of this where the target allows it, of less in narrow groups; runtimes like 8.
        min_keep: the smallest share of a group's channels that stays.
        cost_weight: 0 ranks by score alone, 1 by score for each unit of cost.
        normalised: whether groups that a layer norm, RMS norm or softmax runs over, as over the residual width of a transformer, are cut.
        head_dims: whether the size of attention heads is cut; otherwise heads leave whole.

    Source:
        Fang et al. 2023, "DepGraph: Towards any structural pruning", for group-wise ranking.

    Differs:
        Groups come from the axis algebra; the search is on cost, with widths rounded inside it, not on a ratio.
    """

    name: ClassVar[str] = "channel_pruning"

    keep: float = 0.5
    of: str = "macs"
    criterion: Criterion = field(default_factory=Magnitude)
    round_to: int = 8
    min_keep: float = 0.1
    cost_weight: float = 0.0
    normalised: bool = False
    head_dims: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise InputError(
                f"keep={self.keep}: a share in (0, 1] is needed, 0.5 for half the cost"
            )
        if self.of not in ("macs", "parameters"):
            raise InputError(f"of={self.of!r}: 'macs' or 'parameters' is needed")
        if self.round_to < 1 or not 0 <= self.min_keep <= 1:
            raise InputError(
                f"round_to={self.round_to} must be at least 1 and min_keep={self.min_keep} in [0, 1]"
            )

    def plan(self, network: Network, statistics: Statistics | None = None) -> Plan:
        """One slice for each group that loses channels.

        Raises:
            RefusedError: nothing can be cut, or the target cannot be reached; the message has the least possible.

        Cost:
            One pass over the operators, one over the parameters, and some hundred evaluations of the cost; no run of the network.
        """
        traced = network.traced
        channels = channel_groups(traced)
        terms = mac_terms if self.of == "macs" else parameter_terms
        cost = Cost(terms(traced, channels))
        if self.keep == 1:
            return Plan()
        groups = [group for group in channels.groups if self._eligible(group)]
        if not groups:
            raise RefusedError(f"{network.name}: no channel can be cut. {_why(channels)}")
        scores = self.criterion.scores(network, groups, statistics)
        for group in groups:
            if not bool(scores[group.name].isfinite().all()):
                raise RefusedError(
                    f"{group.name}: {self.criterion} gives scores that are not finite"
                )
        ranks = self._ranks(groups, scores, cost)
        budget = self.keep * cost.at({})
        widths = self._search(groups, ranks, cost, budget)
        if widths is None:
            least = cost.at({group.atom: self._floor(group, 1) for group in groups}) / cost.at({})
            raise RefusedError(
                f"{network.name}: {self.keep:.1%} of the {self.of} was asked for, the least possible with at least "
                f"{self.min_keep:.0%} of each group is {least:.1%}. {_why(channels)}"
            )
        edits = []
        for group in groups:
            count = widths[group.atom]
            if count < group.size:
                order = scores[group.name].argsort(descending=True, stable=True)
                edits.append(Slice.of(group, order[:count].tolist()))
        return Plan(tuple(edits))

    def _eligible(self, group: Group) -> bool:
        kinds = {"normalised": self.normalised, "head_dim": self.head_dims}
        return group.size > 1 and kinds.get(group.kind, True)

    def _ranks(
        self, groups: list[Group], scores: Mapping[str, Tensor], cost: Cost
    ) -> dict[Atom, Tensor]:
        """Atom → (size,) ranks in descending order: how soon the n-th best channel of the group leaves."""
        saved = [max(-cost.change({}, group.atom, 0), 1.0) for group in groups]
        mean = sum(saved) / len(saved)
        result = {}
        for group, saves in zip(groups, saved, strict=True):
            score = scores[group.name].double().cpu()
            average = score.mean().clamp(min=1e-30)
            weight = (saves / mean) ** self.cost_weight
            result[group.atom] = (score / average / weight).sort(descending=True).values
        return result

    def _search(
        self, groups: list[Group], ranks: Mapping[Atom, Tensor], cost: Cost, budget: float
    ) -> dict[Atom, int] | None:
        """Widths that cost at most the budget, as near to it as they get; None if there are none."""
        for rounding in (self.round_to, 1):
            steps = {group.atom: self._step(group, rounding) for group in groups}
            floors = {group.atom: self._floor(group, steps[group.atom]) for group in groups}
            if cost.at(floors) > budget:
                continue
            thresholds = sorted({float(rank) for group in ranks.values() for rank in group})
            low, high = 0, len(thresholds)  # everything above thresholds[low] stays: too much
            widths = floors
            while low < high:
                middle = (low + high) // 2
                trial = self._widths(groups, ranks, thresholds[middle], steps, floors)
                if cost.at(trial) <= budget:
                    high, widths = middle, trial
                else:
                    low = middle + 1
            return _refill(groups, ranks, cost, budget, widths, steps)
        return None

    def _widths(
        self,
        groups: list[Group],
        ranks: Mapping[Atom, Tensor],
        threshold: float,
        steps: Mapping[Atom, int],
        floors: Mapping[Atom, int],
    ) -> dict[Atom, int]:
        result = {}
        for group in groups:
            step = steps[group.atom]
            count = int((ranks[group.atom] > threshold).sum())
            rounded = int(count / step + 0.5) * step
            result[group.atom] = min(max(rounded, floors[group.atom]), group.size)
        return result

    def _floor(self, group: Group, step: int) -> int:
        return min(ceil(max(1, self.min_keep * group.size) / step) * step, group.size)

    def _step(self, group: Group, rounding: int) -> int:
        """By how many channels a group shrinks so that the parameters' dimensions stay multiples of ``rounding``."""
        inner = 0
        for slot in group.slots:
            inner = gcd(inner, _multiplicity(slot.axis, group.atom))
        step = rounding // gcd(rounding, inner)
        # Narrow groups need some widths to choose from: 8 and 16 alone are too coarse for 16 channels.
        while step > 1 and group.size < WIDTHS * step:
            step //= 2
        return max(step, 1)


def _multiplicity(axis: object, atom: Atom) -> int:
    """How many positions of an axis each position of an atom stands for."""
    if isinstance(axis, Product):
        inside = next(f for f in axis.factors if f is atom or _contains(f, atom))
        return size(axis) // size(inside) * _multiplicity(inside, atom)
    if isinstance(axis, Concat):
        found = 0
        for part in axis.parts:
            if part is atom or _contains(part, atom):
                found = gcd(found, _multiplicity(part, atom))
        return found
    return 1


def _contains(axis: object, atom: Atom) -> bool:
    if axis is atom:
        return True
    inner = (
        axis.factors
        if isinstance(axis, Product)
        else axis.parts
        if isinstance(axis, Concat)
        else ()
    )
    return any(_contains(part, atom) for part in inner)


def _refill(
    groups: list[Group],
    ranks: Mapping[Atom, Tensor],
    cost: Cost,
    budget: float,
    widths: Mapping[Atom, int],
    steps: Mapping[Atom, int],
) -> dict[Atom, int]:
    """Give back the best channels that still fit; rounding leaves some budget over."""
    result, spent = dict(widths), cost.at(widths)
    open_groups = [group.atom for group in groups if result[group.atom] < group.size]
    while open_groups:
        atom = max(open_groups, key=lambda a: (float(ranks[a][result[a]]), -a.number))
        wider = min(result[atom] + steps[atom], atom.size)
        extra = cost.change(result, atom, wider)
        if spent + extra <= budget:
            result[atom], spent = wider, spent + extra
        if result[atom] != wider or wider == atom.size:
            open_groups.remove(atom)
    return result


def _why(channels: Channels) -> str:
    reasons = dict.fromkeys(
        f"{why.operator} ({why.reason})" for pinned in channels.pins for why in pinned.pins[:1]
    )
    return "Pinned by " + "; ".join(list(reasons)[:5]) if reasons else "Nothing is pinned"
