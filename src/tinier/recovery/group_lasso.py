"""Group lasso: whole channels are pulled to zero, so that they can leave."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from tinier.errors import InputError
from tinier.network import Network
from tinier.recovery.base import Penalty, Pull
from tinier.recovery.pulls import GroupPull, checked, members


@dataclass(frozen=True)
class GroupLasso(Penalty):
    """``λ Σ_g √|g| ‖w_g‖₂``: one term for each channel g of each channel group, over all its weights in all their places.

    Attributes:
        weight: λ, 0 or more.
        part: "all": everything that leaves with a channel; "producing": without the weights that read it.
        proximal: shrink each channel after each step, which makes exact zeros, instead of adding to the loss; needs "producing",
            for a weight lies in the channel that it reads and in the one that it makes, and the operator is of groups that do not overlap.

    Source:
        Yuan and Lin 2006, "Model selection and estimation in regression with grouped variables"; Wen et al. 2016, "Learning structured
        sparsity in deep neural networks" (filters and channels).

    Differs:
        Groups are those of the axis algebra, over several layers; with Adam the proximal step takes the mean step size of a channel.
    """

    name: ClassVar[str] = "group_lasso"
    weight: float = 1e-4
    part: str = "all"
    proximal: bool = False

    def __post_init__(self) -> None:
        checked(self.name, weight=self.weight)
        if self.proximal and self.part != "producing":
            raise InputError("group_lasso: proximal=True needs part='producing'")

    def on(self, network: Network, parameters: Mapping[str, nn.Parameter]) -> Pull:
        """See ``Penalty.on``."""
        return GroupPull(members(network, parameters, self.part), self.weight, self.proximal)
