"""Function: scores by a rule of the user's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tinier.criteria.base import Criterion
from tinier.errors import InputError
from tinier.graph.groups import Group
from tinier.network import Network
from tinier.statistics import Statistics


@dataclass(frozen=True)
class Function(Criterion):
    """A function of the user's: (network, group) → one score for each channel of the group; the lowest leave first.

    Scores are called for every group that may be cut. ``group.slots`` says in which parameters, dimensions and positions a channel occurs,
    ``dict(network.traced.module.named_parameters())`` has them. Ranking across groups divides scores by the mean of their group. A plain
    function given as ``criterion=`` is wrapped in this class.

    Attributes:
        function: called with ``Network`` and ``Group``; gives (group.size,) finite numbers, at least 0: a tensor, an array or a list.
            None for a group that stays whole.
    """

    name: ClassVar[str] = "function"

    function: Callable[[Network, Group], Any]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(
                f"criterion: {self.function!r} is not a function (network, group) → scores"
            )

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``.

        Raises:
            InputError: what the function gives for a group has another shape, or numbers that are not finite or below 0.
        """
        title = getattr(self.function, "__name__", type(self.function).__name__)
        result = {}
        for group in groups:
            given = self.function(network, group)
            if given is None:
                continue
            where = f"{group.name}: the criterion {title}"
            try:
                values = torch.as_tensor(given).detach().double().cpu()
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"{where} gives {type(given).__name__}, {group.size} numbers are needed: {error}"
                ) from error
            if values.shape != (group.size,):
                raise InputError(
                    f"{where} gives scores of shape {tuple(values.shape)}, ({group.size},) is needed: one for each channel"
                )
            wrong = (~(values.isfinite() & (values >= 0))).nonzero().flatten()
            if len(wrong):
                raise InputError(
                    f"{where} gives {float(values[wrong[0]])} for channel {int(wrong[0])}; finite numbers, at least 0, are needed"
                )
            result[group.name] = values.clone()
        return result
