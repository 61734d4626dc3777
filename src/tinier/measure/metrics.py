"""What "quality" means: a number for a network's answers, and where it is a mean, one number for each example."""

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from tinier.data.check import IGNORED, class_axis
from tinier.data.python import FUNCTION, import_function
from tinier.errors import DataError, InputError, MissingError

ALIASES = {
    "f1": "F1Score",
    "mse": "MeanSquaredError",
    "mae": "MeanAbsoluteError",
    "r2": "R2Score",
}


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


def predictions(output: np.ndarray) -> np.ndarray:
    """The class that an output names: the argmax of the class scores; of one logit, whether it is above 0."""
    axis = class_axis(output.shape)
    if axis is None:
        return (output.reshape(len(output)) > 0).astype(np.int64)
    return output.argmax(axis).astype(np.int64)


@dataclass(frozen=True)
class Accuracy(Metric):
    """The share of right answers: the argmax of the first output (of one logit: above 0) equals the label.

    With several answers an example (tokens, pixels), the score of an example is the share of its positions that are right;
    positions with label −100 do not count.
    """

    name: str = "accuracy"
    bounds: tuple[float, float] | None = (0.0, 1.0)
    binary: ClassVar[bool] = True

    def scores(self, outputs: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
        answers = predictions(outputs[0])
        if labels.dtype.kind == "f" and (labels != np.round(labels)).any():
            raise DataError(
                f"{self.name} needs integer labels, got {labels.dtype}; for numbers to be predicted "
                "use a metric such as MeanSquaredError"
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


@dataclass(frozen=True)
class TorchMetric(Metric):
    """A metric of torchmetrics, of the network's first output.

    Class scores are turned into probabilities row by row (softmax; sigmoid for one logit or several labels an example)
    unless the rows are probabilities already, so that no batch changes what another batch means.
    """

    kind: type = field(kw_only=True)

    @property
    def classifies(self) -> bool:
        return "task" in inspect.signature(self.kind.__new__).parameters

    def scores(self, outputs: list[np.ndarray], labels: np.ndarray) -> np.ndarray | None:
        rows = [([outputs[0][i : i + 1]], labels[i : i + 1]) for i in range(len(labels))]
        running = TorchRunning(self)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                each = np.array([running.only(*row) for row in rows], dtype=np.float64)
                # A mean over examples is one over any of the examples: unequal parts tell F1 or R2 from a mean.
                for count in {len(rows), (len(rows) + 1) // 2, (len(rows) + 2) // 3}:
                    whole = running.only([outputs[0][:count]], labels[:count])
                    if not abs(whole - each[:count].mean()) <= 1e-6 * max(1.0, abs(whole)):
                        return None
        except (ValueError, RuntimeError, IndexError):
            # Not defined for one example (a correlation): then it is no mean; the whole is tried on its own.
            return None
        return each

    def running(self) -> Running:
        return TorchRunning(self)

    def reference(self, outputs: list[np.ndarray]) -> np.ndarray:
        return predictions(outputs[0]) if self.classifies else outputs[0]


class TorchRunning(Running):
    """A torchmetrics object, made when the first batch shows how many classes there are."""

    def __init__(self, metric: TorchMetric) -> None:
        self.metric = metric
        self.made: Any = None
        self.task = ""

    def update(self, outputs: list[np.ndarray], labels: np.ndarray) -> None:
        output = torch.from_numpy(np.ascontiguousarray(outputs[0]))
        target = torch.from_numpy(np.ascontiguousarray(labels))
        if self.made is None:
            self._make(output, target)
        if self.task:
            output, target = self._classes(output, target)
        else:
            if target.numel() == output.numel():
                target = target.reshape(output.shape)
            output, target = output.double(), target.double()
        try:
            self.made.update(output, target)
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            raise DataError(
                f"torchmetrics {self.metric.name}: the network's output of shape {tuple(output.shape)} "
                f"and labels of shape {tuple(target.shape)} do not fit: {error}"
            ) from error

    def compute(self) -> float:
        value = self.made.compute() if self.made is not None else torch.tensor(float("nan"))
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise DataError(
                f"torchmetrics {self.metric.name} gives more than one number; choose another metric or "
                "write module:function that gives one"
            )
        return float(value)

    def only(self, outputs: list[np.ndarray], labels: np.ndarray) -> float:
        """The value over these examples alone."""
        if self.made is not None:
            self.made.reset()
        self.update(outputs, labels)
        return self.compute()

    def _make(self, output: torch.Tensor, target: torch.Tensor) -> None:
        arguments: dict[str, Any] = {}
        if self.metric.classifies:
            classes = output.shape[1] if output.ndim > 1 else 1
            if output.ndim > 1 and classes > 1 and target.shape == output.shape:
                self.task, arguments = "multilabel", {"num_labels": classes}
            elif classes == 1:
                self.task = "binary"
            else:
                axis = class_axis(output.shape)
                self.task, arguments = "multiclass", {"num_classes": output.shape[axis or 1]}
            arguments["task"] = self.task
        try:
            self.made = self.metric.kind(**arguments)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"torchmetrics {self.metric.name} cannot be made without options: {error}; "
                "write module:function that calls it"
            ) from error

    def _classes(
        self, output: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.task == "multiclass":
            axis = class_axis(output.shape) or 1
            output = output.double().movedim(axis, 1)
            sums = output.sum(1, keepdim=True)
            given = (output >= 0).all(1, keepdim=True) & ((sums - 1).abs() < 1e-3)
            output = torch.where(given, output, output.softmax(1))
            return output, target.long()
        if self.task == "binary":
            output = output.reshape(target.shape) if output.numel() == target.numel() else output
        return output.double().sigmoid(), target.long()


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
    return _of_torchmetrics(spec)


def _of_function(function: Callable[..., Any], name: str) -> Function:
    if not callable(function):
        raise InputError(f"metric: {type(function).__name__} is neither a name nor a function")
    higher = bool(getattr(function, "higher_is_better", True))
    bounds = getattr(function, "bounds", None)
    if bounds is not None:
        low, high = (float(bound) for bound in bounds)
        bounds = (low, high)
    return Function(name, higher, bounds, function=function)


def _of_torchmetrics(spec: str) -> TorchMetric:
    try:
        import torchmetrics
    except ImportError as error:
        raise MissingError("torchmetrics", "metrics", f"the metric {spec}") from error
    plain = spec.lower().replace("_", "").replace("-", "")
    known: Mapping[str, str] = {name.lower(): name for name in torchmetrics.__all__}
    name = ALIASES.get(plain) or known.get(plain)
    kind = getattr(torchmetrics, name, None) if name else None
    if not inspect.isclass(kind):
        near = [known[key] for key in known if plain[:4] and plain[:4] in key][:5]
        raise InputError(
            f"unknown metric {spec!r}; use accuracy, agreement, a torchmetrics name"
            f"{' (' + ', '.join(near) + '?)' if near else ' (F1Score, AUROC, MeanSquaredError, …)'} "
            "or module:function"
        )
    higher, low, high = _direction(kind)
    if higher is None:
        raise InputError(
            f"torchmetrics {name} does not say whether higher is better; write module:function with "
            "the attribute higher_is_better"
        )
    bounds = (float(low), float(high)) if low is not None and high is not None else None
    return TorchMetric(name or spec, higher, bounds, kind=kind)


def _direction(kind: Any) -> tuple[bool | None, float | None, float | None]:
    """higher_is_better and the bounds; wrappers that choose by task carry them on the class they make."""
    if "task" in inspect.signature(kind.__new__).parameters:
        try:
            kind = type(kind(task="multiclass", num_classes=3))
        except (TypeError, ValueError):
            return None, None, None
    return kind.higher_is_better, kind.plot_lower_bound, kind.plot_upper_bound
