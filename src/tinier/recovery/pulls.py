"""What penalties share: pulls of the common shapes, and the channels of a group with the weights that belong to them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tinier.errors import InputError, RefusedError
from tinier.graph.groups import Group, channel_groups
from tinier.graph.weights import weights
from tinier.network import Network
from tinier.recovery.base import Pull, StepSize
from tinier.tensors.proximal import group_factor, soft_threshold
from tinier.units import is_number

# Groups whose channels a norm runs over change everything when one leaves; they are left alone, as in channel pruning.
LEFT_ALONE = ("normalised", "head_dim")


class EntryPull(Pull):
    """λ₁ Σ |w| + λ₂/2 Σ w² over the entries of some parameters, as a loss or by proximal steps.

    Args:
        parameters: what is pulled.
        l1: λ₁.
        l2: λ₂.
        proximal: soft-threshold after each step, which gives exact zeros, instead of adding to the loss.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], l1: float, l2: float, proximal: bool
    ) -> None:
        self.parameters = parameters
        self.l1, self.l2, self.proximal = l1, l2, proximal

    def loss(self, done: float) -> Tensor | None:
        if self.proximal:
            return None
        terms = []
        for p in self.parameters:
            if self.l1:
                terms.append(self.l1 * p.abs().sum())
            if self.l2:
                terms.append(self.l2 / 2 * p.square().sum())
        return torch.stack(terms).sum() if terms else None

    def after_step(self, step: StepSize) -> None:
        if self.proximal:
            with torch.no_grad():
                for p in self.parameters:
                    size = step(p)
                    p.copy_(soft_threshold(p, size * self.l1, size * self.l2))

    def after_epoch(self, done: float) -> None: ...

    def finish(self) -> None: ...


class GroupPull(Pull):
    """λ Σ_g √|g| ‖w_g‖₂ over channels, as a loss or by proximal steps.

    Args:
        members: the channels.
        weight: λ.
        proximal: shrink each channel after each step, which gives exact zeros, instead of adding to the loss.
    """

    def __init__(self, members: Sequence["Members"], weight: float, proximal: bool) -> None:
        self.members, self.weight, self.proximal = members, weight, proximal

    def loss(self, done: float) -> Tensor | None:
        if self.proximal:
            return None
        terms = []
        for one in self.members:
            squares = one.squares()
            # The gradient of a norm at zero is taken as zero.
            norms = torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)
            terms.append((one.entries.sqrt() * norms).sum())
        return self.weight * torch.stack(terms).sum()

    def after_step(self, step: StepSize) -> None:
        if self.proximal:
            with torch.no_grad():
                for one in self.members:
                    threshold = self.weight * one.entries.sqrt() * one.mean(step)
                    one.scale(group_factor(one.squares(), threshold))

    def after_epoch(self, done: float) -> None: ...

    def finish(self) -> None: ...


class Members:
    """The channels of a group and the entries of parameters that belong to each.

    Args:
        group: the group.
        places: (parameter, dimension, channel of each position along it or −1).
    """

    def __init__(self, group: Group, places: Sequence[tuple[nn.Parameter, int, Tensor]]) -> None:
        self.group, self.places = group, places
        # (channels,) how many entries belong to each
        self.entries = self._per_channel(lambda p: torch.ones_like(p, requires_grad=False))

    def squares(self) -> Tensor:
        """(channels,) sum of the squares of each channel's entries, differentiable."""
        return self._per_channel(torch.square)

    def mean(self, step: StepSize) -> Tensor:
        """(channels,) mean step size over each channel's entries."""

        def full(p: nn.Parameter) -> Tensor:
            return torch.as_tensor(step(p), dtype=p.dtype, device=p.device).expand_as(p)

        return self._per_channel(full) / self.entries.clamp_min(1)

    def scale(self, factor: Tensor, only: Callable[[nn.Parameter], bool] | None = None) -> None:
        """Multiply every entry of each channel by the channel's factor, in place.

        Args:
            factor: (channels,).
            only: which parameters are written; None for all.
        """
        with torch.no_grad():
            for p, dim, index in self.places:
                if only is None or only(p):
                    along = torch.where(index >= 0, factor[index.clamp_min(0)], 1.0)
                    p.mul_(along.to(p.dtype).view([-1 if d == dim else 1 for d in range(p.ndim)]))

    def _per_channel(self, values: Callable[[nn.Parameter], Tensor]) -> Tensor:
        first = self.places[0][0]
        total = torch.zeros(self.group.size, dtype=first.dtype, device=first.device)
        for p, dim, index in self.places:
            others = [d for d in range(p.ndim) if d != dim]
            found = values(p)
            along = found.sum(others) if others else found
            inside = index >= 0
            total = total.index_add(0, index[inside], along[inside].to(total.dtype))
        return total


def members(
    network: Network,
    parameters: Mapping[str, nn.Parameter],
    part: str,
    *,
    scalars: bool = True,
    every: bool = False,
) -> list[Members]:
    """The channels of every group that pruning may cut.

    Args:
        network: for its groups.
        parameters: name → parameter that is trained.
        part: "all" places of a channel, or only those "producing" it: weights that read it are left out.
        scalars: whether biases and the scales of norms belong to a channel.
        every: also groups that pruning leaves alone unless asked, those that a norm runs over and the size of heads.

    Raises:
        InputError: another part.
        RefusedError: no channel could be cut.
    """
    if part not in ("all", "producing"):
        raise InputError(f"part={part!r}: 'all' or 'producing' is needed")
    read = {(w.name, w.inputs) for w in weights(network.traced).values()}
    result = []
    for group in channel_groups(network.traced).groups:
        places = [
            (
                parameters[slot.parameter],
                slot.dim,
                slot.index().to(parameters[slot.parameter].device),
            )
            for slot in group.slots
            if slot.parameter in parameters
            and (part == "all" or (slot.parameter, slot.dim) not in read)
            and (scalars or parameters[slot.parameter].ndim > 1)
        ]
        if places and group.size > 1 and (every or group.kind not in LEFT_ALONE):
            result.append(Members(group, places))
    if not result:
        raise RefusedError(f"{network.name}: no channel could leave, so that none can be pulled")
    return result


def weights_of(network: Network, parameters: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """The trained weights of linear, convolutional and recurrent layers; not biases, norms or tables of embeddings.

    Raises:
        RefusedError: there are none.
    """
    found = [
        parameters[w.name]
        for w in weights(network.traced).values()
        if not w.shared and w.name in parameters
    ]
    if not found:
        raise RefusedError(f"{network.name}: no weight of a linear layer or convolution is trained")
    return found


def checked(name: str, **values: float) -> None:
    """Raise InputError for a strength below 0 or not finite."""
    for key, value in values.items():
        if not is_number(value) or not 0 <= value < float("inf"):
            raise InputError(f"{name}: {key} is {value!r}; it must be 0 or more and finite")


def step_size(optimizer: torch.optim.Optimizer) -> StepSize:
    """The step along a constant gradient, by which a proximal step must threshold for its fixed point to be the penalty's minimum.

    SGD with momentum μ: lr / (1 − μ). Adam: lr / (√v̂ + ε) for each entry.
    """
    settings = optimizer.param_groups[0]

    def size(p: nn.Parameter) -> Tensor | float:
        lr = float(settings["lr"])
        if "betas" not in settings:
            return lr / (1 - float(settings["momentum"]))
        state = optimizer.state[p]
        if not state:  # it has had no gradient and does not move
            return 0.0
        unbiased = state["exp_avg_sq"] / (1 - settings["betas"][1] ** float(state["step"]))
        return lr / (unbiased.sqrt() + float(settings["eps"]))

    return size
