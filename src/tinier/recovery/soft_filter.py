"""Soft filter pruning: the weakest filters are zeroed after each epoch and may grow back; the last zeros stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor, nn

from tinier.errors import InputError
from tinier.network import Network
from tinier.recovery.base import Penalty, Pull, StepSize
from tinier.recovery.pulls import Members, members
from tinier.units import is_number


@dataclass(frozen=True)
class SoftFilter(Penalty):
    """After each epoch the weights that make the weakest channels become zero; when training ends, so do their biases and norms.

    A zeroed filter still gets gradients, so that it can come back. After the end ``shrink`` removes the zeroed channels.

    Attributes:
        keep: share of each group's channels that stays, in (0, 1]; the number is rounded up.
        progressive: the share that is zeroed grows, P(t) = (1 − keep) · (1 − 4^(−8t)) / (1 − 4^(−8)): three quarters of it after an
            eighth of the training.

    Source:
        He et al. 2018, "Soft filter pruning for accelerating deep convolutional neural networks", algorithm 1; He et al. 2019,
        "Asymptotic soft filter pruning", equation 7, for the growing share.

    Differs:
        Filters that leave together, as those of a residual stream, are ranked by the norm of all of them.
    """

    name: ClassVar[str] = "soft_filter"
    keep: float = 0.7
    progressive: bool = False

    def __post_init__(self) -> None:
        if not is_number(self.keep) or not 0 < self.keep <= 1:
            raise InputError(f"soft_filter: keep is {self.keep!r}; a share in (0, 1] is needed")

    def on(self, network: Network, parameters: Mapping[str, nn.Parameter]) -> Pull:
        """See ``Penalty.on``."""
        return _Soft(
            members(network, parameters, "producing", scalars=False),
            members(network, parameters, "producing"),
            self.keep,
            self.progressive,
        )


class _Soft(Pull):
    def __init__(
        self, filters: Sequence[Members], whole: Sequence[Members], keep: float, progressive: bool
    ) -> None:
        self.filters, self.keep, self.progressive = filters, keep, progressive
        self.whole = {one.group.name: one for one in whole}

    def loss(self, done: float) -> Tensor | None:
        return None

    def after_step(self, step: StepSize) -> None: ...

    def after_epoch(self, done: float) -> None:
        share = (1 - 4 ** (-8 * done)) / (1 - 4**-8) if self.progressive else 1.0
        for one in self.filters:
            one.scale(self._stay(one, 1 - share * (1 - self.keep)))

    def finish(self) -> None:
        for one in self.filters:
            self.whole[one.group.name].scale(self._stay(one, self.keep))

    def _stay(self, one: Members, keep: float) -> Tensor:
        """(channels,) 1 for the strongest, 0 for those that are zeroed."""
        with torch.no_grad():
            order = one.squares().argsort(descending=True, stable=True)
            stay = torch.zeros(one.group.size, device=one.entries.device)
            # What rounding adds to a whole number is not another channel.
            stay[order[: max(1, ceil(keep * one.group.size - 1e-9))]] = 1
        return stay
