"""What a criterion is: a rule that scores the channels of a group."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.graph.groups import Group, Slot
from tinier.network import Network
from tinier.statistics import Statistics


@dataclass(frozen=True)
class Criterion(ABC):
    """A configured criterion: a frozen dataclass whose fields are its hyper-parameters."""

    name: ClassVar[str]

    @abstractmethod
    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """Score every channel; the lowest leave first.

        Args:
            network: left as it is.
            groups: channel groups of its traced graph.
            statistics: what a pass over data collected; some criteria need none.

        Returns:
            Group name → (size,) float64, at least 0. Only the order and the ratios within a group have a meaning.
        """


def per_channel(values: Tensor, slot: Slot, channels: int) -> Tensor:
    """Sum a value of each entry of a parameter over the entries that belong to each channel.

    Args:
        values: of the shape of the parameter.
        slot: where the group occurs in it.
        channels: size of the group.

    Returns:
        (channels,) float64.
    """
    index = slot.index().to(values.device)
    others = [dim for dim in range(values.ndim) if dim != slot.dim]
    along = values.double().sum(others) if others else values.double()
    inside = index >= 0
    result = torch.zeros(channels, dtype=torch.float64, device=values.device)
    return result.index_add_(0, index[inside], along[inside])
