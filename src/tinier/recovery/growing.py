"""Growing regularisation: channels that were picked to go are pulled harder and harder, then they leave at no loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from tinier.edits.base import Plan
from tinier.edits.slice import Slice
from tinier.errors import InputError, RefusedError
from tinier.network import Network
from tinier.recovery.base import Penalty, Pull, StepSize
from tinier.recovery.pulls import Members, checked, members
from tinier.units import is_number


@dataclass(frozen=True)
class Growing(Penalty):
    """``λ(t)/2 Σ w²`` over everything that belongs to the channels that a plan cuts; apply the plan when training is over.

    λ rises linearly from 0 to ``most`` over the first ``ramp`` of the training and stays there.

    Attributes:
        plan: its slices say which channels go: ``ChannelPruning(…).plan(network)``.
        most: the largest λ.
        ramp: part of the training in which λ rises, in (0, 1].

    Source:
        Wang et al. 2021, "Neural pruning via growing regularization", algorithm 1 (GReg-1).

    Differs:
        λ follows the part of the training that is over, not the number of steps; all places of a channel are pulled, the norms and the
        weights that read it, too, so that what is left is nothing.
    """

    name: ClassVar[str] = "growing"
    plan: Plan = field(default_factory=Plan)
    most: float = 1.0
    ramp: float = 0.7

    def __post_init__(self) -> None:
        checked(self.name, most=self.most)
        if not is_number(self.ramp) or not 0 < self.ramp <= 1:
            raise InputError(f"growing: ramp is {self.ramp!r}; a part in (0, 1] is needed")

    def on(self, network: Network, parameters: Mapping[str, nn.Parameter]) -> Pull:
        """See ``Penalty.on``."""
        cuts = {edit.group: edit for edit in self.plan.edits if isinstance(edit, Slice)}
        if not cuts:
            raise RefusedError(
                "growing: its plan cuts no channel; give plan=ChannelPruning(keep=…).plan(network), or sparsify a share: keep="
            )
        picked = []
        for one in members(network, parameters, "all", every=True):
            if (edit := cuts.pop(one.group.name, None)) is not None:
                if edit.size != one.group.size:
                    raise RefusedError(
                        f"growing: {edit.group} has {one.group.size} channels, in the plan {edit.size}"
                    )
                going = torch.ones(one.group.size, device=one.entries.device)
                going[list(edit.kept)] = 0
                picked.append((one, going))
        if cuts:
            raise RefusedError(f"growing: {network.name} has no channel group {', '.join(cuts)}")
        return _Grow(picked, self.most, self.ramp)


class _Grow(Pull):
    def __init__(self, picked: Sequence[tuple[Members, Tensor]], most: float, ramp: float) -> None:
        self.picked, self.most, self.ramp = picked, most, ramp

    def loss(self, done: float) -> Tensor | None:
        strength = self.most * min(1.0, done / self.ramp)
        sums = [(going * one.squares()).sum() for one, going in self.picked]
        return strength / 2 * torch.stack(sums).sum()

    def after_step(self, step: StepSize) -> None: ...

    def after_epoch(self, done: float) -> None: ...

    def finish(self) -> None: ...
