"""The metric of one artifact on its runtime, or its latency beside the float network's on the same runtime; in a process of its own."""

import json
import time
from pathlib import Path
from statistics import quantiles
from typing import Any

from peers import answer, request
from quantization_tasks import task as task_of
from quantization_tasks.base import Run, arrays, each, open_artifact

WARM = 5
PAIRS = 400
SECONDS = 30.0


def latency(asked: dict[str, Any]) -> dict[str, Any]:
    """Both in turn, on the same example at batch 1: the ratios of neighbours are what is reported."""
    task = task_of(asked["task"])
    inputs = {name: value[:1] for name, value in task.calibration().items()}
    row = each(arrays(inputs))[0]
    runs = [
        open_artifact(asked["runtime"], Path(asked[which]), asked["threads"])
        for which in ("float", "path")
    ]
    for run in runs * WARM:
        run(row)
    times: list[list[float]] = [[], []]
    until = time.monotonic() + SECONDS
    while len(times[0]) < PAIRS and time.monotonic() < until:
        for index in (0, 1) if len(times[0]) % 2 else (1, 0):
            times[index].append(_once(runs[index], row))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    found = {"float_ms": times[0], "ms": times[1], "faster": ratios}
    return {
        "pairs": len(ratios),
        "threads": asked["threads"],
        **{
            name: dict(zip(("quarter", "median", "three_quarters"), quantiles(v), strict=True))
            for name, v in found.items()
        },
    }


def _once(run: Run, row: dict[str, Any]) -> float:
    start = time.perf_counter()
    run(row)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    asked = request()
    if "float" in asked:
        answer(latency(asked))
        return
    run = open_artifact(asked["runtime"], Path(asked["path"]), 1)
    answer(json.loads(json.dumps(task_of(asked["task"]).evaluate(run, asked["part"]))))


if __name__ == "__main__":
    main()
