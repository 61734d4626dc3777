"""Taylor on activations: the channels that move no example's loss, to first order, leave first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tinier.criteria.base import Criterion, found, observed
from tinier.graph.groups import Group
from tinier.network import Network
from tinier.statistics import Statistics


@dataclass(frozen=True)
class TaylorActivation(Criterion):
    """The mean over examples of the first-order change of the loss when a channel's activations become zero.

    sᵢ = E|zᵢ|, zᵢ = Σ a · ∂L/∂a over the positions of channel i and all places where operators read it. Suits ranking within a group, and
    across groups once divided by the mean of each: a loss of one channel at a time does not foresee that of many.

    Source:
        Molchanov et al. 2017, "Pruning convolutional neural networks for resource efficient inference", equation 8.

    Differs:
        A sum over positions and places in place of a mean, so that it is the change of the loss; no division by the norm of the layer.
    """

    name: ClassVar[str] = "taylor_activation"
    needs: ClassVar[frozenset[str]] = frozenset({"gates"})

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``. Cost: one run of the network over the data, and one backward."""
        statistics = observed(self, statistics, groups)
        result = {
            g.name: statistics.gates[g.name].absolute for g in groups if statistics.uses[g.name]
        }
        return found(self, network, result, "no operator of the graph reads one")
