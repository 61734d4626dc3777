"""Elastic net: L1 and L2 together, each with a strength of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from tinier.network import Network
from tinier.recovery.base import Penalty, Pull
from tinier.recovery.pulls import EntryPull, checked, weights_of


@dataclass(frozen=True)
class ElasticNet(Penalty):
    """``λ₁ Σ |w| + λ₂/2 Σ w²`` over the weights of linear, convolutional and recurrent layers.

    Attributes:
        l1: λ₁, 0 or more.
        l2: λ₂, 0 or more; keeps weights that do the same alive together, where L1 alone takes one of them.
        proximal: a proximal step after each step of the optimizer, which makes exact zeros, instead of adding to the loss.

    Source:
        Zou and Hastie 2005, "Regularization and variable selection via the elastic net", equation 3 (with λ₂/2 for λ₂).
    """

    name: ClassVar[str] = "elastic_net"
    l1: float = 1e-4
    l2: float = 1e-4
    proximal: bool = False

    def __post_init__(self) -> None:
        checked(self.name, l1=self.l1, l2=self.l2)

    def on(self, network: Network, parameters: Mapping[str, nn.Parameter]) -> Pull:
        """See ``Penalty.on``."""
        return EntryPull(weights_of(network, parameters), self.l1, self.l2, self.proximal)
