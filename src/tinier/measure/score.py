"""What a measure of quality is: a value over examples and, where it is a mean, a score for each."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tinier.data.check import class_axis
from tinier.errors import DataError


class Running(ABC):
    """The value of a metric over batches that are seen one after the other."""

    @abstractmethod
    def update(self, outputs: list[np.ndarray], labels: np.ndarray) -> None:
        """Take one batch in."""

    @abstractmethod
    def compute(self) -> float:
        """The value over all batches so far."""


@dataclass(frozen=True)
class Metric(ABC):
    """A measure of quality.

    Attributes:
        name: what tables call it.
        higher_is_better: the direction.
        bounds: the least and greatest score of one example, where they are known.
        binary: whether the score of one example is 0 or 1 (for one answer an example).
        against_original: the original's answers are the labels, even where the data have labels.
    """

    name: str
    higher_is_better: bool = True
    bounds: tuple[float, float] | None = None
    binary: ClassVar[bool] = False
    against_original: ClassVar[bool] = False

    @property
    def classifies(self) -> bool | None:
        """Whether outputs are class scores; None where the metric does not tell."""
        return None

    @abstractmethod
    def scores(self, outputs: list[np.ndarray], labels: np.ndarray) -> np.ndarray | None:
        """One number for each example, whose mean is the value.

        Args:
            outputs: the network's outputs, dimension 0 is the example.
            labels: (n, …), dimension 0 is the example.

        Returns:
            (n,) float64, or None where the metric is not a mean over examples.

        Raises:
            DataError: outputs and labels do not fit together.
        """

    def value(self, outputs: list[np.ndarray], labels: np.ndarray) -> float:
        """The metric over all the examples given."""
        running = self.running()
        running.update(outputs, labels)
        return running.compute()

    def running(self) -> Running:
        """A fresh value, to be fed batch by batch."""
        return Mean(self)

    def reference(self, outputs: list[np.ndarray]) -> np.ndarray:
        """The labels that the original's outputs stand for, where the data have none."""
        return outputs[0]


class Mean(Running):
    """The mean of the scores."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.total = 0.0
        self.count = 0

    def update(self, outputs: list[np.ndarray], labels: np.ndarray) -> None:
        scores = self.metric.scores(outputs, labels)
        if scores is None:
            raise DataError(f"{self.metric.name} has no score for each example")
        self.total += float(scores.sum())
        self.count += len(scores)

    def compute(self) -> float:
        return self.total / self.count if self.count else float("nan")


def predictions(output: np.ndarray) -> np.ndarray:
    """The class that an output names: the argmax of the class scores; of one logit, whether it is above 0."""
    axis = class_axis(output.shape)
    if axis is None:
        return (output.reshape(len(output)) > 0).astype(np.int64)
    return output.argmax(axis).astype(np.int64)
