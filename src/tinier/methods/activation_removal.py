"""Activation removal: the activation functions that a straight line replaces best are linearized, and neighbours merged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from torch import Tensor

from tinier.edits.base import Plan
from tinier.edits.linearize import Linearize
from tinier.edits.merge import Merge
from tinier.errors import InputError, RefusedError
from tinier.graph.activations import Activation, Line, activations, straightened
from tinier.graph.neighbours import neighbours
from tinier.methods.base import Method
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.units import is_number, is_whole

SCORES = ("output", "fit")
KEEP = 0.75


@dataclass(frozen=True)
class ActivationRemoval(Method):
    """Linearize the activation functions that matter least, one after the other, and merge layers that become neighbours.

    The score "fit" is the part of the function's variance that its least-squares line leaves, 1 − R²; "output" is the change of
    the network's output with the line in place, ‖f(x) − f′(x)‖² / ‖f(x) − mean f‖², given those linearized before.

    Attributes:
        keep: the share of the activation functions that stay, in [0, 1]; None for 0.75, where none leaves but those between two layers
            that become one of fewer MACs without it.
        count: how many leave instead.
        score: "output" or "fit".
        merge: whether layers are merged where one of them takes fewer MACs than two.

    Source:
        Dror et al. 2021, "Layer folding: Neural network depth reduction using activation linearization", for folding; Cho et al. 2022,
        "Selective network linearization for efficient private inference", for choosing.

    Differs:
        The line is fitted in closed form to each channel's values, not trained by a penalty on slopes.
    """

    name: ClassVar[str] = "activation_removal"

    keep: float | None = None
    count: int | None = None
    score: str = "output"
    merge: bool = True

    def __post_init__(self) -> None:
        if self.keep is not None and (not is_number(self.keep) or not 0 <= self.keep <= 1):
            raise InputError(f"keep={self.keep!r}: a share in [0, 1] is needed")
        if self.count is not None and (not is_whole(self.count) or self.count < 0):
            raise InputError(
                f"count={self.count!r}: a whole number of activation functions is needed"
            )
        if self.score not in SCORES:
            raise InputError(f"score={self.score!r}: one of {', '.join(SCORES)} is needed")

    def plan(self, network: Network, statistics: Statistics | None = None) -> Plan:
        """One edit for each function that leaves, then one for each pair of layers that is merged.

        Args:
            network: left as it is.
            statistics: its ``lines``, and its ``samples`` for the score "output".

        Raises:
            InputError: there are no statistics: a line is fitted to data.
            RefusedError: there are fewer activation functions than asked for.

        Cost:
            With "output", a run of the network on the samples for each function that is left, for each that leaves.
        """
        found = activations(network.traced)
        if self.asked or not self.merge:
            count = (
                ceil((1 - self._share) * len(found) - 1e-9) if self.count is None else self.count
            )
            candidates = found
        else:
            candidates = tuple(merging(network, found))
            count = min(ceil((1 - self._share) * len(found) - 1e-9), len(candidates))
        if count > len(found):
            raise RefusedError(
                f"{network.name}: {count} activation functions were to leave, there are {len(found)}"
            )
        if count == 0:
            return Plan()
        if statistics is None or not statistics.lines:
            raise InputError("removing activation functions needs data: lines are fitted to it")
        if self.score == "fit":
            errors = {one: statistics.lines[one.name].error for one in candidates}
            chosen = dict(sorted(errors.items(), key=lambda pair: pair[1])[:count])
        else:
            chosen = self._greedy(network, candidates, count, statistics)
        edits = []
        for one in found:
            if one in chosen:
                line = statistics.lines[one.name].line
                slope, intercept = (tuple(t.float().tolist()) for t in (line.slope, line.intercept))
                edits.append(Linearize(one.name, slope, intercept, chosen[one]))
        plan = Plan(tuple(edits))
        return plan + self._merges(plan.apply(network)) if self.merge else plan

    @property
    def asked(self) -> bool:
        """Whether somebody has said how many leave."""
        return self.keep is not None or self.count is not None

    @property
    def _share(self) -> float:
        return KEEP if self.keep is None else self.keep

    def _greedy(
        self, network: Network, found: Sequence[Activation], count: int, statistics: Statistics
    ) -> dict[Activation, float]:
        """The functions that leave, and what the output had changed when they were chosen."""
        samples = statistics.samples or (network.example,)
        chosen: dict[Activation, float] = {}
        for _ in range(count):
            changes = {}
            for one in found:
                if one not in chosen:
                    lines = {each: statistics.lines[each.name].line for each in (*chosen, one)}
                    changes[one] = output_change(network, lines, samples)
            best = min(changes, key=lambda one: changes[one])
            chosen[best] = changes[best]
        return chosen

    def _merges(self, network: Network) -> Plan:
        plan = Plan()
        while True:
            pair = next((p for p in neighbours(network.traced) if p.merged < p.macs), None)
            if pair is None:
                return plan
            step = Plan((Merge(pair.first.weight, pair.second.weight),))
            network, plan = step.apply(network), plan + step


def merging(network: Network, found: Sequence[Activation]) -> list[Activation]:
    """Those of some activations that alone stand between two layers which would be one of fewer MACs."""
    nodes = {one.node: one for one in found}
    result = []
    for pair in neighbours(network.traced, found):
        between = [nodes[node] for node in pair.between if node in nodes]
        if len(between) == 1 and pair.merged < pair.macs:
            result.append(between[0])
    return result


def output_change(
    network: Network,
    lines: Mapping[Activation, Line],
    samples: Sequence[Mapping[str, Tensor]],
) -> float:
    """How much the float outputs change with lines in place, relative to their variance over the samples."""
    result = 0.0
    for inputs in samples:
        after = straightened(network.traced, lines, inputs)
        for a, b in zip(network(inputs), after, strict=True):
            if a.is_floating_point():
                a, b = a.double(), b.double()
                scale = float((a - a.mean(0)).square().sum()) or float(a.square().sum())
                result += float((a - b).square().sum()) / max(scale, 1e-30)
    return result
