"""L2: every weight is pulled to zero in proportion to its size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from tinier.network import Network
from tinier.recovery.base import Penalty, Pull
from tinier.recovery.pulls import EntryPull, checked, weights_of


@dataclass(frozen=True)
class L2(Penalty):
    """``λ/2 Σ w²`` over the weights of linear, convolutional and recurrent layers; makes weights small, never zero.

    Attributes:
        weight: λ, 0 or more.
        proximal: shrink the weights by 1 / (1 + step · λ) after each step (decoupled weight decay) instead of adding to the loss.

    Source:
        Krogh and Hertz 1991, "A simple weight decay can improve generalization".
    """

    name: ClassVar[str] = "l2"
    weight: float = 1e-4
    proximal: bool = False

    def __post_init__(self) -> None:
        checked(self.name, weight=self.weight)

    def on(self, network: Network, parameters: Mapping[str, nn.Parameter]) -> Pull:
        """See ``Penalty.on``."""
        return EntryPull(weights_of(network, parameters), 0.0, self.weight, self.proximal)
