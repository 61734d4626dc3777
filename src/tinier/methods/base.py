"""A method looks and decides; it never changes its input."""

from abc import ABC, abstractmethod
from typing import ClassVar

from tinier.edits.base import Plan
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
