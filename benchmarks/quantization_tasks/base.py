"""A task: one float network as a module and as a file, examples to calibrate on, and a metric of an artifact on its real runtime."""

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import cache
from torch import Tensor, nn

from tinier.targets.base import targets_for

Inputs = dict[str, Tensor]
Arrays = dict[str, np.ndarray]
Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]  # one example with its batch dimension
PARTS = ("calibration", "valid", "test")


@dataclass(frozen=True)
class Metric:
    """A figure of a task.

    Attributes:
        name: a key of what ``Task.evaluate`` gives.
        higher: whether more of it is better.
        unit: as printed.
    """

    name: str
    higher: bool
    unit: str


@dataclass(frozen=True)
class Task:
    """One float network and its data.

    Attributes:
        name: of the row.
        model: gives the module in evaluation mode, or the path of an ONNX file.
        calibration: gives inputs by name; dimension 0 is the examples.
        evaluate: from an artifact's run, at batch 1, and "valid" or "test" to figures by name.
        metrics: those that are reported, the first in the table.
        distance: from what ``evaluate`` gives to how far the outputs are from the float network's, 0 for equal: it chooses between
            variants, and is what contestants are compared by, since accuracies of a few hundred examples differ by chance.
        transformer: whether the documents of a competitor that asks for the type of the model would say transformer.
        data: what the figures are measured on.
        minutes: limit of one quantization.
    """

    name: str
    model: Callable[[], nn.Module | str]
    calibration: Callable[[], Inputs]
    evaluate: Callable[[Run, str], dict[str, float]]
    metrics: tuple[Metric, ...]
    distance: Callable[[Mapping[str, float]], float]
    transformer: bool
    data: str
    minutes: float = 15.0

    def module(self) -> nn.Module:
        """The float network as a module, also where its source is an ONNX file."""
        model = self.model()
        if isinstance(model, str):
            load = importlib.import_module("tinier.sources.load").load
            example = {name: value[:2] for name, value in self.calibration().items()}
            module: nn.Module = load(model, example).module
            return module.eval()
        return model.eval()


def work() -> Path:
    """The folder of float files, references and artifacts."""
    return cache() / "quantization"


def float_file(name: str, runtime: str = "onnxruntime") -> Path:
    """The float network of a task, as ``tinier.export`` writes it."""
    file = "model.onnx" if runtime == "onnxruntime" else "openvino_model.xml"
    return work() / name / "float" / file


def open_artifact(runtime: str, path: Path, threads: int) -> Run:
    """A function that runs an artifact on one example.

    Args:
        runtime: "onnxruntime", "openvino", or "torch": a saved ``torch.export`` program, run without a compiler.
        path: of its first file.
        threads: of the runtime.
    """
    if runtime != "torch":
        session = targets_for(runtime)[0].open(path, threads)
        return lambda inputs: session.run(inputs)
    torch.set_num_threads(threads)
    for package in ("quantization.pt2e", "quantization.pt2e.quantizer.x86_inductor_quantizer"):
        importlib.import_module(f"torchao.{package}")  # registers the operators in the file
    program = torch.export.load(path).module()

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            found: Any = program(**{name: torch.from_numpy(v) for name, v in inputs.items()})
        if isinstance(found, Mapping):
            found = tuple(found.values())
        return [one.numpy() for one in (found if isinstance(found, tuple | list) else (found,))]

    return run


def reference(name: str, part: str, rows: Arrays) -> np.ndarray:
    """The first output of the float network for each row, in ONNX Runtime; computed once and kept.

    Args:
        name: of the task.
        part: of the data.
        rows: inputs; dimension 0 is the examples.

    Returns:
        (examples, …) float32.
    """
    file = work() / name / f"reference-{part}.npy"
    if file.is_file():
        return np.load(file, allow_pickle=False)
    run = open_artifact("onnxruntime", float_file(name), 1)
    found = np.concatenate([run(row)[0] for row in each(rows)])
    partial = file.with_suffix(f".{os.getpid()}.npy")
    np.save(partial, found)
    partial.replace(file)
    return found


def each(rows: Arrays) -> list[Arrays]:
    """One example after the other, with a batch dimension."""
    count = len(next(iter(rows.values())))
    return [{name: value[i : i + 1] for name, value in rows.items()} for i in range(count)]


def arrays(inputs: Inputs) -> Arrays:
    return {name: value.numpy() for name, value in inputs.items()}


def tensors(rows: Arrays) -> Inputs:
    return {name: torch.from_numpy(value) for name, value in rows.items()}
