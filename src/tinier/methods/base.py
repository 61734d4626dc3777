"""A method looks and decides; it never changes its input."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import ClassVar

from tinier.edits.base import Plan
from tinier.errors import InputError
from tinier.network import Network
from tinier.statistics import Statistics


class Method(ABC):
    """A configured technique: a frozen dataclass whose fields are its hyper-parameters."""

    name: ClassVar[str]

    @abstractmethod
    def plan(self, network: Network, statistics: Statistics | None = None) -> Plan:
        """Decide what to change.

        Args:
            network: the network; left as it is.
            statistics: what a pass over data collected of this very network; some methods need none.

        Raises:
            RefusedError: the method cannot be used on this network, with the operator and the reason.
        """


def covers(patterns: Sequence[str], name: str) -> bool:
    """Whether a pattern is of a module, group or parameter, or of a module that holds it."""
    return any(fnmatchcase(name, p) or fnmatchcase(name, p + ".*") for p in patterns)


def must_exist(
    patterns: Sequence[str], network: Network, others: Collection[str], argument: str = "exclude"
) -> None:
    """Refuse patterns that are of nothing.

    Args:
        patterns: of modules, or of ``others``.
        network: whose modules count.
        others: names of groups or parameters.
        argument: that they were given as, for the error.

    Raises:
        InputError: a pattern matches no name.
    """
    names = [*others, *(name for name, _ in network.module.named_modules())]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, 1)
            meant = f"did you mean {near[0]}? There" if near else "there"
            raise InputError(
                f"{argument}: nothing is called {pattern}; {meant} are {', '.join(list(others)[:20])}"
            )
