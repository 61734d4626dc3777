"""Network slimming: L1 on the scales of batch norms, one for each channel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from tinier.errors import RefusedError
from tinier.graph.rules import operator_name
from tinier.network import Network
from tinier.recovery.base import Penalty, Pull
from tinier.recovery.pulls import EntryPull, checked


@dataclass(frozen=True)
class Slimming(Penalty):
    """``λ Σ |γ|`` over the scales of batch norms.

    Attributes:
        weight: λ, 0 or more.
        proximal: soft-threshold the scales after each step, which makes exact zeros, instead of adding to the loss.

    Source:
        Liu et al. 2017, "Learning efficient convolutional networks through network slimming", equation 1.
    """

    name: ClassVar[str] = "slimming"
    weight: float = 1e-4
    proximal: bool = False

    def __post_init__(self) -> None:
        checked(self.name, weight=self.weight)

    def on(self, network: Network, parameters: Mapping[str, nn.Parameter]) -> Pull:
        """See ``Penalty.on``."""
        scales = {
            str(source.target): parameters[str(source.target)]
            for node in network.traced.module.graph.nodes
            if operator_name(node) in ("batch_norm", "_native_batch_norm_legit_no_training")
            for source in node.all_input_nodes[1:2]
            if str(source.target) in parameters
        }
        if not scales:
            raise RefusedError(
                f"{network.name}: slimming needs batch norms with a scale, there are none; use GroupLasso"
            )
        return EntryPull(list(scales.values()), self.weight, 0.0, self.proximal)
