"""Fisher: the channels whose removal changes the loss least, to second order, leave first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tinier.criteria.base import Criterion, found, observed
from tinier.graph.groups import Group
from tinier.network import Network
from tinier.statistics import Statistics


@dataclass(frozen=True)
class Fisher(Criterion):
    """The second-order change of the loss when a channel's activations become zero, by the Fisher information.

    sᵢ = ½ E zᵢ², zᵢ = Σ a · ∂L/∂a over the positions of channel i and all places where operators read it, for each example. Without labels
    answers are drawn from the network itself, and it is the true Fisher information; with labels the empirical one. Suits
    ranking within a group, and across groups once divided by the mean of each: a loss of one channel at a time does not foresee that
    of many.

    Source:
        Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning", equation 10; Liu et al. 2021, "Group Fisher
        pruning", equation 5, which adds up the places of a group before squaring.

    Differs:
        No division by the memory saved; ``ChannelPruning(cost_weight=1)`` divides by the cost.
    """

    name: ClassVar[str] = "fisher"
    needs: ClassVar[frozenset[str]] = frozenset({"gates"})

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``. Cost: one run of the network over the data, and one backward."""
        statistics = observed(self, statistics, groups)
        result = {
            g.name: statistics.gates[g.name].squares / 2 for g in groups if statistics.uses[g.name]
        }
        return found(self, network, result, "no operator of the graph reads one")
