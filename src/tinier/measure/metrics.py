"""The metrics that users name."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from tinier.data.check import IGNORED, class_axis
from tinier.data.python import FUNCTION, import_function
from tinier.errors import DataError, InputError
from tinier.measure.score import Mean, Metric, Running, predictions
from tinier.measure.torchmetric import TorchMetric, of_torchmetrics

__all__ = ["Accuracy", "Agreement", "Function", "Metric", "TorchMetric", "metric", "predictions"]


@dataclass(frozen=True)
class Accuracy(Metric):
    """The share of right answers: the argmax of the first output (of one logit: above 0) equals the label.

    With several answers an example (tokens, pixels), the score of an example is the share of its positions that are right;
    positions with label −100 do not count.
    """

    name: str = "accuracy"
    bounds: tuple[float, float] | None = (0.0, 1.0)
    binary: ClassVar[bool] = True

    @property
    def classifies(self) -> bool | None:
        return True

    def scores(self, outputs: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
        answers = predictions(outputs[0])
        if labels.dtype.kind == "f" and (labels != np.round(labels)).any():
            raise DataError(
                f"{self.name} needs integer labels, got {labels.dtype}; for numbers to be predicted "
                "use a metric such as MeanSquaredError"
            )
        if class_axis(outputs[0].shape) is None and not np.isin(labels, (0, 1, IGNORED)).all():
            wrong = labels[~np.isin(labels, (0, 1, IGNORED))].flat[0]
            raise DataError(
                f"{self.name}: the network gives one logit an example, so that labels are 0 and 1; there is a {wrong:g}"
            )
        if labels.ndim == 2 and labels.shape[1] == 1 and answers.ndim == 1:
            labels = labels[:, 0]
        if labels.shape != answers.shape:
            raise DataError(
                f"{self.name}: labels of shape {labels.shape}, but the network's first output of "
                f"shape {outputs[0].shape} gives answers of shape {answers.shape}; use class indices "
                "as labels or a metric of your own (module:function)"
            )
        counts = labels != IGNORED
        right = ((answers == labels) & counts).reshape(len(labels), -1).sum(1)
        total = counts.reshape(len(labels), -1).sum(1)
        # An example in which nothing counts has nothing wrong.
        return np.where(total > 0, right / np.maximum(total, 1), 1.0).astype(np.float64)

    def reference(self, outputs: list[np.ndarray]) -> np.ndarray:
        return predictions(outputs[0])


@dataclass(frozen=True)
class Agreement(Accuracy):
    """The share of examples to which the network gives the original's answer; labels are the original's answers."""

    name: str = "agreement"
    against_original: ClassVar[bool] = True


@dataclass(frozen=True)
class Function(Metric):
    """A function of the user's: ``function(outputs, labels)`` gives one number for each example, or one number.

    ``outputs`` is a list of arrays, ``labels`` an array; where it gives one number for each example it sees batches and
    the value is the mean, else it sees everything at once.
    """

    function: Callable[[list[np.ndarray], np.ndarray], Any] = field(kw_only=True)

    def scores(self, outputs: list[np.ndarray], labels: np.ndarray) -> np.ndarray | None:
        result = self.call(outputs, labels)
        if result.ndim == 0:
            return None
        if result.shape != (len(labels),):
            raise DataError(
                f"{self.name} gave an array of shape {result.shape} for {len(labels)} examples; "
                f"({len(labels)},) or one number is needed"
            )
        return result

    def running(self) -> Running:
        return Called(self)

    def call(self, outputs: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
        """What the user's function gives, as float64.

        Raises:
            DataError: it failed.
        """
        try:
            return np.asarray(self.function(outputs, labels), dtype=np.float64)
        except Exception as error:
            raise DataError(
                f"the metric {self.name} failed on outputs of shape "
                f"{[output.shape for output in outputs]} and labels of shape {labels.shape}: "
                f"{type(error).__name__}: {error}"
            ) from error


class Called(Running):
    """The mean of what a function gives for each example, or what it gives for everything at once."""

    def __init__(self, function: "Function") -> None:
        self.function = function
        self.mean = Mean(function)
        self.outputs: list[list[np.ndarray]] = []
        self.labels: list[np.ndarray] = []

    def update(self, outputs: list[np.ndarray], labels: np.ndarray) -> None:
        if not self.outputs and self.function.scores(outputs, labels) is not None:
            self.mean.update(outputs, labels)
            return
        # One number for a batch says nothing of the whole: keep all of it.
        self.outputs.append(outputs)
        self.labels.append(labels)

    def compute(self) -> float:
        if not self.outputs:
            return self.mean.compute()
        columns = [np.concatenate(column) for column in zip(*self.outputs, strict=True)]
        return float(self.function.call(columns, np.concatenate(self.labels)))


def metric(spec: str | Metric | Callable[..., Any], labelled: bool = True) -> Metric:
    """The metric that a user names.

    Args:
        spec: "accuracy"; "agreement" with the original's answers; a name of torchmetrics ("F1Score", "AUROC",
            "MeanSquaredError", …); ``module:function`` or a function of ``(outputs, labels)``, whose attributes
            ``higher_is_better`` (default True) and ``bounds`` are used if present; a Metric.
        labelled: whether the data have labels; without them "accuracy" is "agreement", and other metrics compare with
            the original's outputs.

    Raises:
        InputError: no such metric; the message has what is near.
        MissingError: torchmetrics is not installed.
    """
    if isinstance(spec, Metric):
        return spec
    if not isinstance(spec, str):
        return _of_function(spec, getattr(spec, "__name__", "metric"))
    if spec == "accuracy":
        return Accuracy() if labelled else Agreement()
    if spec == "agreement":
        return Agreement()
    if FUNCTION.fullmatch(spec):
        return _of_function(import_function(spec), spec)
    return of_torchmetrics(spec)


def _of_function(function: Callable[..., Any], name: str) -> Function:
    if not callable(function):
        raise InputError(f"metric: {type(function).__name__} is neither a name nor a function")
    higher = bool(getattr(function, "higher_is_better", True))
    bounds = getattr(function, "bounds", None)
    if bounds is not None:
        low, high = (float(bound) for bound in bounds)
        bounds = (low, high)
    return Function(name, higher, bounds, function=function)
