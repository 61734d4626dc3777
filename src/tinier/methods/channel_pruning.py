"""Channel pruning: whole channels, neurons and heads leave until the network costs what was asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import ceil, isfinite
from typing import ClassVar

import torch
from torch import Tensor

from tinier.criteria.base import Criterion
from tinier.criteria.magnitude import Magnitude
from tinier.edits.base import Plan
from tinier.edits.slice import Slice
from tinier.errors import InputError, RefusedError
from tinier.graph.axes import Atom
from tinier.graph.groups import Channels, Group, channel_groups
from tinier.graph.macs import COSTS, Cost
from tinier.methods.allocation import Knob, above, allocate
from tinier.methods.base import Method, covers, must_exist
from tinier.methods.uniform import Together
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.units import is_number, is_whole

RANKINGS = ("global", "kind", "local")
SHOWN = 5  # names in a refusal
# Kinds that are cut only when the others cannot reach the cost: which kinds there are, from the first to the last resort.
RESORTS = (frozenset[str](), frozenset({"head_dim"}), frozenset({"head_dim", "normalised"}))


@dataclass(frozen=True)
class ChannelPruning(Method):
    """Rank the channels of all groups against each other and cut the lowest until the cost is low enough.

    Channel i of group g ranks by sᵢ / (mean of s over g) / (c_g / mean of c)^cost_weight, where s is the criterion's score and c_g what
    the network saves when the group goes; scores that mean the same in every group, such as a loss, are not divided by their mean.
    Every group keeps at least ``min_keep`` of its channels, and at least one.

    Attributes:
        keep: the share of the cost that may be left, in (0, 1].
        of: what is counted: "macs" at batch 1, "parameters", "bytes" of the parameters, or "channels" of each group.
        at_most: the cost that may be left as a number instead: MACs, parameters or bytes.
        threshold: cut every channel that ranks at or below this instead, whatever that costs.
        rates: (pattern, share) pairs: groups whose name matches keep exactly this share of their channels; "*" matches anything.
        exclude: patterns of names of groups, or of modules, whose channels all stay; of a parameter named in full, both its sides do.
        criterion: scores the channels.
        ranking: "global" ranks all channels against each other, "kind" those of one kind (neurons, heads, …), each kind losing the same
            share, and "local" those of a group, each group losing the same share.
        uniform: whether the groups that play the same part in every layer keep the same width, as a standard checkpoint needs.
        round_to: widths become multiples of this where the target allows it, of less in narrow groups; runtimes like 8.
        min_keep: the smallest share of a group's channels that stays.
        cost_weight: 0 ranks by score alone, 1 by score for each unit of cost; None for 0.5 with scores that mean the same in every
            group, else 0.
        normalised: whether groups that a layer norm, RMS norm or softmax runs over, as over the residual width of a transformer, are cut;
            None cuts them where the cost cannot be met without.
        head_dims: whether the size of attention heads is cut; None where the cost cannot be met by cutting heads and neurons.

    Source:
        Fang et al. 2023, "DepGraph: Towards any structural pruning", for group-wise ranking.

    Differs:
        Groups come from the axis algebra; the search is on cost, with widths rounded inside it, not on a ratio.
    """

    name: ClassVar[str] = "channel_pruning"

    keep: float = 0.5
    of: str = "macs"
    at_most: float | None = None
    threshold: float | None = None
    rates: tuple[tuple[str, float], ...] = ()
    exclude: tuple[str, ...] = ()
    criterion: Criterion = field(default_factory=Magnitude)
    ranking: str = "global"
    uniform: bool = False
    round_to: int = 8
    min_keep: float = 0.1
    cost_weight: float | None = None
    normalised: bool | None = None
    head_dims: bool | None = None

    def __post_init__(self) -> None:
        if not is_number(self.keep) or not 0 < self.keep <= 1:
            raise InputError(
                f"keep={self.keep!r}: a share in (0, 1] is needed, 0.5 for half the cost"
            )
        if self.of not in (*COSTS, "channels"):
            raise InputError(f"of={self.of!r}: one of {', '.join(COSTS)} or channels is needed")
        if self.at_most is not None and (
            self.of == "channels" or not is_number(self.at_most) or not self.at_most > 0
        ):
            raise InputError(
                f"at_most={self.at_most!r}: a positive number of {', '.join(COSTS)} is needed"
            )
        if self.threshold is not None and not (
            is_number(self.threshold) and isfinite(self.threshold)
        ):
            raise InputError(f"threshold={self.threshold!r}: a finite number is needed")
        if self.ranking not in RANKINGS:
            raise InputError(f"ranking={self.ranking!r}: one of {', '.join(RANKINGS)} is needed")
        if not is_whole(self.round_to) or self.round_to < 1:
            raise InputError(f"round_to={self.round_to!r}: a whole number, at least 1, is needed")
        if not is_number(self.min_keep) or not 0 <= self.min_keep <= 1:
            raise InputError(f"min_keep={self.min_keep!r}: a share in [0, 1] is needed")
        for pattern, share in self.rates:
            if not is_number(share) or not 0 < share <= 1:
                raise InputError(f"rates: {pattern} {share!r}: a share in (0, 1] is needed")

    def plan(self, network: Network, statistics: Statistics | None = None) -> Plan:
        """One slice for each group that loses channels.

        Args:
            network: left as it is.
            statistics: what the criterion needs of data.

        Raises:
            RefusedError: nothing can be cut, or the target cannot be reached; the message has the least possible.

        Cost:
            One pass over the operators, what the criterion costs, and some tens of evaluations of the cost; no run of the network.
        """
        traced = network.traced
        channels = channel_groups(traced)
        cost = Cost(COSTS["macs" if self.of == "channels" else self.of](traced, channels))
        share = self.keep if self.at_most is None else min(self.at_most / cost.at({}), 1.0)
        together = Together.of(network, channels, self.uniform)
        fixed = self._fixed(together)
        if share == 1 and not fixed and self.threshold is None:
            return Plan()
        must_exist(
            self.exclude, network, [*(g.name for g in channels.groups), *channels.parameters]
        )
        candidates = [group for group in channels.groups if self._may_go(group)]
        if not candidates:
            raise RefusedError(f"{network.name}: no channel can be cut. {why(channels)}")
        scores = self._scores(network, candidates, statistics)
        candidates = [group for group in candidates if group.name in scores]
        widths = self._widths(together, candidates, scores, cost, share, fixed)
        edits = []
        for group in candidates:
            count = widths.get(group.atom, group.size)
            if count < group.size:
                order = scores[group.name].argsort(descending=True, stable=True)
                edits.append(Slice.of(group, order[:count].tolist()))
        return Plan(tuple(edits))

    def _may_go(self, group: Group) -> bool:
        asked = {"normalised": self.normalised, "head_dim": self.head_dims}
        if group.size <= group.minimum or asked.get(group.kind) is False:
            return False
        if any(slot.parameter in self.exclude for slot in group.slots):
            return False
        module = group.name.partition(":")[0]
        return not any(covers(self.exclude, name) for name in (group.name, module))

    def _scores(
        self, network: Network, groups: list[Group], statistics: Statistics | None
    ) -> dict[str, Tensor]:
        scores = dict(self.criterion.scores(network, groups, statistics))
        for group in groups:
            if group.name not in scores:
                continue  # the criterion can say nothing about it: it stays whole
            values = scores[group.name]
            if values.shape != (group.size,):
                raise RefusedError(
                    f"{group.name}: {self.criterion} gives scores of shape {tuple(values.shape)}, ({group.size},) is needed"
                )
            if not bool(values.isfinite().all()):
                raise RefusedError(
                    f"{group.name}: {self.criterion} gives scores that are not finite"
                )
            scores[group.name] = values.double().cpu()
        return scores

    def _fixed(self, together: Together) -> dict[Atom, int]:
        """The widths of groups that have a rate of their own, and of those that change in step with them."""
        result: dict[Atom, int] = {}
        groups, by = together.channels.groups, dict[Atom, str]()
        for pattern, share in self.rates:
            matching = [g for g in groups if fnmatchcase(g.name, pattern)]
            if not matching:
                raise InputError(
                    f"rates: no channel group is called {pattern}; there are {', '.join(g.name for g in groups)}"
                )
            bundles = together.bundles([g for g in groups if self._may_go(g)])
            for group in matching:
                if not self._may_go(group):
                    raise InputError(f"rates: {group.name} is excluded, or of a kind that stays")
                bundle = next((b for b in bundles if any(g is group for g, _ in b)), None)
                if bundle is None:
                    raise InputError(
                        f"rates: {group.name} changes in step with what stays; leave uniform, the rate or the exclusion out"
                    )
                unit = next(unit for other, unit in bundle if other is group)
                count = max(round(share * group.size / unit), -(-group.minimum // unit), 1)
                for other, each in bundle:
                    if result.setdefault(other.atom, count * each) != count * each:
                        raise InputError(
                            f"rates: {group.name} and {by[other.atom]} change in step, and {share:g} of {group.size} is another width; "
                            "give both the same rate, or leave uniform out"
                        )
                    by.setdefault(other.atom, group.name)
        return result

    def _widths(
        self,
        together: Together,
        candidates: list[Group],
        scores: Mapping[str, Tensor],
        cost: Cost,
        share: float,
        fixed: dict[Atom, int],
    ) -> dict[Atom, int]:
        whole = cost.at({})
        budget, cost = share * whole, Cost(cost.terms, fixed)
        open_groups = [group for group in candidates if group.atom not in fixed]
        if (share == 1 and self.threshold is None) or not open_groups:
            return dict(fixed)
        ranks = self._ranks(open_groups, scores, cost)
        if self.threshold is not None or self.of == "channels":
            first = [g for g in open_groups if g.kind not in RESORTS[-1] or self._asked(g)]
            knobs = self._knobs(together, first or open_groups, ranks, self.min_keep)
            if self.threshold is not None:
                return above(knobs, self.threshold, self.round_to) | fixed
            wanted: dict[Atom, int] = {}
            for knob in knobs:
                step = knob.step(self.round_to)
                count = max(round(share * knob.size / step) * step, knob.floor)
                wanted |= knob.at(knob.down(min(count, knob.size)))
            return wanted | fixed
        # A resort is enough when no group would have to fall below half of what the whole keeps; the last one goes as far as it must.
        for resort in RESORTS:
            groups = [
                g for g in open_groups if g.kind not in RESORTS[-1] - resort or self._asked(g)
            ]
            if not groups:
                continue
            last = len(groups) == len(open_groups)
            half = self._knobs(together, groups, ranks, max(self.min_keep, share / 2))
            knobs = self._knobs(together, groups, ranks, self.min_keep)
            if last or cost.at(_lowest(half)) <= budget:
                widths = allocate(knobs, cost, budget, self.round_to)
                if widths is not None:
                    return widths | fixed
            if last:
                break
        least = cost.at(_lowest(knobs)) / whole
        among = ""
        if self.uniform:
            loose = replace(together, uniform=False, says={})
            knobs = self._knobs(loose, open_groups, ranks, self.min_keep)
            among = f" and the same width in every layer (without uniform=True it is {cost.at(_lowest(knobs)) / whole:.1%})"
        raise RefusedError(
            f"{together.network.name}: {share:.1%} of the {self.of} was asked for, the least possible with at least "
            f"{self.min_keep:.0%} of each group{among} is {least:.1%}. "
            f"{self._unscored(together.channels, scores)}{why(together.channels)}"
        )

    def _unscored(self, channels: Channels, scores: Mapping[str, Tensor]) -> str:
        names = [g.name for g in channels.groups if self._may_go(g) and g.name not in scores]
        if not names:
            return ""
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return (
            f"Criterion {self.criterion.name} cannot score {', '.join(names[:SHOWN])}{more}, which stay whole: "
            "use another one, such as magnitude, or keep more. "
        )

    def _asked(self, group: Group) -> bool:
        return bool({"normalised": self.normalised, "head_dim": self.head_dims}.get(group.kind))

    def _ranks(
        self, groups: list[Group], scores: Mapping[str, Tensor], cost: Cost
    ) -> dict[Atom, Tensor]:
        """Atom → (size,) ranks in descending order: how soon the n-th best channel of the group leaves."""
        saved = [max(-cost.change({}, group.atom, 0), 1.0) for group in groups]
        mean = sum(saved) / len(saved)
        exponent = self.cost_weight
        if exponent is None:
            exponent = 0.5 if self.criterion.comparable else 0.0
        result = {}
        for group, saves in zip(groups, saved, strict=True):
            score = scores[group.name]
            average = 1.0 if self.criterion.comparable else float(score.mean().clamp(min=1e-30))
            weight = (saves / mean) ** exponent
            result[group.atom] = (score / average / weight).sort(descending=True).values
        if self.ranking == "local":
            return {group.atom: _places(result[group.atom]) for group in groups}
        if self.ranking == "kind":
            for kind in {group.kind for group in groups}:
                atoms = [group.atom for group in groups if group.kind == kind]
                places = _places(torch.cat([result[atom] for atom in atoms]))
                sizes = [atom.size for atom in atoms]
                for atom, own in zip(atoms, places.split(sizes), strict=True):
                    result[atom] = own
        return result

    def _knobs(
        self,
        together: Together,
        groups: list[Group],
        ranks: Mapping[Atom, Tensor],
        least: float,
    ) -> list[Knob]:
        result = []
        for bundle in together.bundles(groups):
            size = bundle[0][0].size // bundle[0][1]
            mean = torch.stack([ranks[g.atom].view(size, unit).mean(1) for g, unit in bundle])
            floor = max(
                max(ceil(least * size - 1e-9), -(-group.minimum // unit), 1)
                for group, unit in bundle
            )
            divides, grain = together.divides(bundle), together.grain(bundle)
            knob = Knob(
                bundle, mean.mean(0), min(floor, size), divides, grain, together.never(bundle)
            )
            result.append(replace(knob, floor=knob.up(0, -(-knob.floor // grain) * grain)))
        return result


def _lowest(knobs: list[Knob]) -> dict[Atom, int]:
    return {atom: width for knob in knobs for atom, width in knob.at(knob.floor).items()}


def _places(ranks: Tensor) -> Tensor:
    """Of each rank, the share of ranks at or below it, in (0, 1]; equal ranks are told apart by their order."""
    order = ranks.argsort(stable=True, descending=True)
    result = torch.empty_like(ranks)
    result[order] = torch.arange(len(ranks), 0, -1, dtype=ranks.dtype) / len(ranks)
    return result


def why(channels: Channels) -> str:
    """The first reasons for which something is pinned."""
    reasons = dict.fromkeys(
        f"{why.operator} ({why.reason})" for pinned in channels.pins for why in pinned.pins[:1]
    )
    return "Pinned by " + "; ".join(list(reasons)[:5]) if reasons else "Nothing is pinned"
