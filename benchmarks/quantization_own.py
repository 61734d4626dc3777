"""tinier's side of ``quantization.py``: the float file, and one variant of ``tinier.quantize``, each in a process of its own."""

import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import answer, request
from quantization_tasks import task as task_of
from quantization_tasks.base import arrays, open_artifact, tensors

import tinier
from tinier.measure.parity import parity
from tinier.network import Network
from tinier.targets.base import targets_for


def main() -> None:
    asked = request()
    task = task_of(asked["task"])
    model, inputs = task.model(), task.calibration()
    example = {name: value[:2] for name, value in inputs.items()}
    variant: dict[str, Any] = dict(asked["variant"])
    target = variant.pop("export")
    before, started, busy = peak(), time.monotonic(), time.process_time()
    if variant.pop("float", False):
        smaller = None
        artifact = tinier.export(model, asked["folder"], example=example, target=target)
    else:
        smaller = tinier.quantize(model, example, arrays(inputs), **variant)
        artifact = tinier.export(smaller, asked["folder"], target=target)
    seconds, busy = time.monotonic() - started, time.process_time() - busy
    row = {
        "runtime": target,
        "path": str(artifact.files[0]),
        "size": sum(Path(file).stat().st_size for file in artifact.files),
        "seconds": seconds,
        "cpu_seconds": busy,
        "peak_mb": peak(),
        "peak_before_mb": before,
    }
    answer(row)
    run = open_artifact(target, Path(artifact.files[0]), 1)
    row["valid"] = task.evaluate(run, "valid")
    answer(row)
    if smaller is not None:
        network = smaller.network
        row["simulated"] = task.evaluate(lambda given: simulated(network, given), "valid")
        session = targets_for(target)[0].open(Path(artifact.files[0]), 1)
        compared = parity(network, session, [{n: v[:1] for n, v in inputs.items()}])
        row["steps"] = max((one.steps for one in compared.rows if one.steps), default=None)
        row["relative"] = max(one.relative for one in compared.rows)
        answer(row)


def simulated(network: Network, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of the network in torch, integers simulated."""
    with torch.no_grad():
        return [one.numpy() for one in network(tensors(dict(inputs)))]


def peak() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
