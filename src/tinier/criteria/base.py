"""What a criterion is: a rule that scores the channels of a group, or the weights of a layer."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.errors import InputError, RefusedError
from tinier.graph.groups import Group, Slot
from tinier.network import Network
from tinier.statistics import Statistics

SMALLEST = 1e-30  # stands in for a mean of 0 that something is divided by


@dataclass(frozen=True)
class Criterion(ABC):
    """A configured criterion: a frozen dataclass whose fields are its hyper-parameters.

    Class attributes:
        name: what the command line and tables call it.
        comparable: whether scores of different groups mean the same thing, such as a loss; the ranking then takes them as they are,
            else it divides them by the mean of their group.
        needs: what ``tinier.statistics.observe`` has to collect for the scores; empty where weights are enough.
        weight_needs: the same for ``weights``.
    """

    name: ClassVar[str]
    comparable: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    weight_needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """Score every channel; the lowest leave first.

        Args:
            network: left as it is.
            groups: channel groups of its traced graph.
            statistics: what ``observe`` collected of this network; some criteria need none.

        Returns:
            Group name → (size,) float64, at least 0. Groups about which the criterion can say nothing are absent, and stay whole.

        Raises:
            InputError: the criterion needs data, and there are no statistics of them.
            RefusedError: it can say nothing about any of the groups, with the reason.
        """

    def weights(
        self, network: Network, names: Collection[str], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """Score single weights, for unstructured pruning; the lowest leave first.

        Args:
            network: left as it is.
            names: parameters of its traced graph.
            statistics: what ``observe`` collected with ``weight_needs``.

        Returns:
            Parameter → float64 of its shape, at least 0.

        Raises:
            InputError: an unknown parameter, or the criterion needs data and there are no statistics of them.
            RefusedError: the criterion scores channels only, or can say nothing about one of the parameters.
        """
        raise RefusedError(
            f"{self.name}: scores whole channels, not single weights; use magnitude, lamp, wanda, gradient, taylor, obd or random"
        )


def observed(
    criterion: Criterion, statistics: Statistics | None, groups: Sequence[Group] = ()
) -> Statistics:
    """The statistics that a criterion needs for scores of groups, checked.

    Raises:
        InputError: there are none, something was not collected, or they are of another network.
    """
    return _collected(criterion, criterion.needs, statistics, groups)


def observed_weights(criterion: Criterion, statistics: Statistics | None) -> Statistics:
    """As ``observed``, for scores of weights."""
    return _collected(criterion, criterion.weight_needs, statistics, ())


def _collected(
    criterion: Criterion,
    needs: frozenset[str],
    statistics: Statistics | None,
    groups: Sequence[Group],
) -> Statistics:
    wanted = ", ".join(sorted(needs))
    if statistics is None:
        raise InputError(
            f"{criterion.name}: needs data: pass data=, a few hundred examples; or statistics=observe(network, batches, [{wanted!r}])"
        )
    missing = needs - statistics.needs
    if missing:
        raise InputError(
            f"{criterion.name}: the statistics lack {', '.join(sorted(missing))}; collect them with observe(network, batches, [{wanted!r}])"
        )
    for group in groups:
        uses = statistics.uses.get(group.name)
        if uses is None or any(int(use.index.max()) >= group.size for use in uses):
            raise InputError(
                f"{group.name}: the statistics are of another network; collect them of the network that is pruned"
            )
    return statistics


def found(
    criterion: Criterion, network: Network, result: dict[str, Tensor], why: str
) -> dict[str, Tensor]:
    """The scores, if there are any.

    Args:
        why: what no group has.

    Raises:
        RefusedError: there are none.
    """
    if not result:
        raise RefusedError(
            f"{network.name}: {criterion.name} can score no channel group: {why}; use another criterion, such as magnitude"
        )
    return result


def parameters(network: Network) -> dict[str, Tensor]:
    """Parameters of the traced graph by name, tied ones under each of their names; detached.

    Raises:
        RefusedError: they have no values.
    """
    named = dict(network.traced.module.named_parameters(remove_duplicate=False))
    empty = next((name for name, parameter in named.items() if parameter.is_meta), None)
    if empty is not None:
        raise RefusedError(
            f"{empty} is on the meta device and has no values to score; load the weights, or plan with the criterion random"
        )
    return {name: parameter.detach() for name, parameter in named.items()}


def chosen(network: Network, names: Collection[str]) -> dict[str, Tensor]:
    """Some of the parameters.

    Raises:
        InputError: one does not exist.
    """
    known = parameters(network)
    for name in names:
        if name not in known:
            raise InputError(f"{name}: the network has no such parameter")
    return {name: known[name] for name in names}


def per_channel(values: Tensor, slot: Slot, channels: int) -> Tensor:
    """Sum a value of each entry of a parameter over the entries that belong to each channel.

    Args:
        values: of the shape of the parameter.
        slot: where the group occurs in it.
        channels: size of the group.

    Returns:
        (channels,) float64.
    """
    others = [dim for dim in range(values.ndim) if dim != slot.dim]
    along = values.double().sum(others) if others else values.double()
    return by_channel(along, slot.index(), channels)


def by_channel(values: Tensor, index: Tensor, channels: int) -> Tensor:
    """Sum a value of each position of an axis over the positions of each channel.

    Args:
        values: (length,).
        index: (length,) int64, the channel of each position, or −1.
        channels: size of the group.

    Returns:
        (channels,) float64.
    """
    index = index.to(values.device)
    inside = index >= 0
    result = torch.zeros(channels, dtype=torch.float64, device=values.device)
    return result.index_add_(0, index[inside], values.double()[inside]).cpu()


def rows(values: Tensor, slot: Slot, channels: int) -> Tensor:
    """All entries of a parameter that belong to each channel.

    Returns:
        (channels, entries) float64, in the same order for each channel.
    """
    index = slot.index().to(values.device)
    order = index.argsort(stable=True)[int((index < 0).sum()) :]
    moved = values.double().movedim(slot.dim, 0)[order]
    return moved.reshape(channels, -1).cpu()


def slots_of(group: Group, known: dict[str, Tensor]) -> Iterator[tuple[Slot, Tensor]]:
    """The slots of a group in parameters other than biases, which say nothing about a channel's use."""
    for slot in group.slots:
        if slot.parameter in known and not slot.parameter.endswith("bias"):
            yield slot, known[slot.parameter]


def relative(values: Tensor) -> Tensor:
    """Divided by their mean, which takes the scale of a layer out."""
    return values / values.mean().clamp(min=SMALLEST)
