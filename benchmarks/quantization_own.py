"""tinier's side of ``quantization.py``: the float file, and one variant of ``tinier.quantize``, each in a process of its own."""

import resource
import time
from pathlib import Path
from typing import Any

from peers import answer, request
from quantization_tasks import task as task_of
from quantization_tasks.base import arrays, open_artifact

import tinier


def main() -> None:
    asked = request()
    task = task_of(asked["task"])
    model, inputs = task.model(), task.calibration()
    example = {name: value[:2] for name, value in inputs.items()}
    variant: dict[str, Any] = dict(asked["variant"])
    target = variant.pop("export")
    before, started, busy = peak(), time.monotonic(), time.process_time()
    if variant.pop("float", False):
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
    answer(row | {"valid": task.evaluate(run, "valid")})


def peak() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
