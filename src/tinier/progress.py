"""How long work says how far it is: an interface that the terminal draws and that everything else may ignore."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager


class Progress(ABC):
    """Receives what a run does; see ``tinier.report.terminal`` for the one that draws bars with the time left."""

    @abstractmethod
    def say(self, text: str) -> None:
        """One line about what was found or decided."""

    @abstractmethod
    def start(self, text: str, total: float | None) -> int:
        """Begin a task of ``total`` units (None when unknown); returns its number."""

    @abstractmethod
    def advance(self, task: int, done: float) -> None:
        """``done`` units of the task are done, in all."""

    @abstractmethod
    def stop(self, task: int) -> None:
        """The task has ended."""

    @contextmanager
    def task(self, text: str, total: float | None = None) -> Iterator["Step"]:
        """A task that ends with its block."""
        number = self.start(text, total)
        try:
            yield Step(self, number)
        finally:
            self.stop(number)


class Step:
    """A task under way. Calling it says how many units are done, and optionally how many there are."""

    def __init__(self, progress: Progress, number: int) -> None:
        self.progress, self.number, self.done = progress, number, 0.0

    def __call__(self, done: float, *_: object) -> None:
        self.done = done
        self.progress.advance(self.number, done)

    def add(self, units: float = 1) -> None:
        """``units`` more are done."""
        self(self.done + units)


class Silent(Progress):
    """Says nothing."""

    def say(self, text: str) -> None: ...

    def start(self, text: str, total: float | None) -> int:
        return 0

    def advance(self, task: int, done: float) -> None: ...

    def stop(self, task: int) -> None: ...
