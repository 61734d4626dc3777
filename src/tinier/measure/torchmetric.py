"""Metrics of torchmetrics."""

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tinier.data.check import class_axis
from tinier.errors import DataError, InputError, MissingError
from tinier.measure.score import Metric, Running, predictions

ALIASES = {
    "f1": "F1Score",
    "mse": "MeanSquaredError",
    "mae": "MeanAbsoluteError",
    "r2": "R2Score",
}


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


def of_torchmetrics(spec: str) -> TorchMetric:
    """The metric that torchmetrics calls so, in any spelling of capitals.

    Raises:
        InputError: there is none, or it does not say which direction is better.
        MissingError: torchmetrics is not installed.
    """
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
