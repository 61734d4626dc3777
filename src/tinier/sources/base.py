"""Where networks come from."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from tinier.errors import ModelError
from tinier.network import Inputs, Network


class Source(ABC):
    """One kind of model that tinier can take; each is a file of this folder."""

    name: ClassVar[str]

    @abstractmethod
    def accepts(self, model: Any) -> bool:
        """Whether it is a model of this kind, by the look of it (a file's ending, an object's type)."""

    @abstractmethod
    def load(self, model: Any, example: Inputs | None) -> Network:
        """The network, without changing ``model``.

        Args:
            model: what the user gave.
            example: example inputs; None to invent them where the model says what it takes.

        Raises:
            ModelError: it cannot be read, run or traced; the message has the fix.
        """


def present(path: Path) -> None:
    """Raise ModelError for a path that does not exist, and for an empty file."""
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    if path.is_file() and path.stat().st_size == 0:
        raise ModelError(f"{path}: the file is empty; export or copy the model again")


def first_line(error: Exception) -> str:
    """What an exception says, without the stack traces that torch puts into its text."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
