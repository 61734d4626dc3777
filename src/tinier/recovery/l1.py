"""L1: every weight is pulled to zero equally hard, so that small ones get there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from tinier.network import Network
from tinier.recovery.base import Penalty, Pull
from tinier.recovery.pulls import EntryPull, checked, weights_of


@dataclass(frozen=True)
class L1(Penalty):
    """``λ Σ |w|`` over the weights of linear, convolutional and recurrent layers.

    Attributes:
        weight: λ, 0 or more.
        proximal: soft-threshold the weights after each step (ISTA), which makes exact zeros, instead of adding to the loss.

    Source:
        Tibshirani 1996, "Regression shrinkage and selection via the lasso"; Daubechies et al. 2004 for the proximal step.
    """

    name: ClassVar[str] = "l1"
    weight: float = 1e-4
    proximal: bool = False

    def __post_init__(self) -> None:
        checked(self.name, weight=self.weight)

    def on(self, network: Network, parameters: Mapping[str, nn.Parameter]) -> Pull:
        """See ``Penalty.on``."""
        return EntryPull(weights_of(network, parameters), self.weight, 0.0, self.proximal)
