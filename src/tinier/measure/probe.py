"""Opens one artifact and runs it in a process of its own, and prints what memory that took, as JSON.

Run by path, never imported: ``python -P probe.py RUNTIME FILE INPUTS.npz THREADS RUNS``. Imports numpy and the runtime, nothing
else, so that the figures are those of a program that uses the artifact without tinier.
"""

import json
import os
import sys
from collections.abc import Iterator

import numpy as np


def resident() -> tuple[int, int]:
    """Bytes resident now, and the most that this process ever had resident."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            fields = dict(line.split(":", 1) for line in status)
        return tuple(1024 * int(fields[key].split()[0]) for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
    except (OSError, KeyError):
        pass
    if sys.platform == "win32":
        import psutil

        memory = psutil.Process().memory_info()
        return memory.rss, memory.peak_wset
    import resource

    # Without /proc, the peak until now stands for both; macOS counts in bytes, the BSDs in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    return peak, peak


def open_onnxruntime(file: str, threads: int) -> Iterator:
    import onnxruntime

    yield
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    yield lambda inputs: session.run(None, inputs)


def open_openvino(file: str, threads: int) -> Iterator:
    import openvino

    yield
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model = openvino.Core().compile_model(file, "CPU", settings)
    yield lambda inputs: list(model(inputs).values())


def open_torch(file: str, threads: int) -> Iterator:
    import torch

    yield
    torch.set_num_threads(threads)
    model = torch.export.load(file).module(check_guards=False)

    def run(inputs: dict) -> object:
        with torch.inference_mode():
            return model(**{name: torch.from_numpy(array) for name, array in inputs.items()})

    yield run


def open_null(file: str, threads: int) -> Iterator:
    yield
    with open(file, encoding="utf-8") as declared:
        held = np.ones(int(json.load(declared).get("memory", 0)), np.uint8)
    yield lambda inputs: held


def main() -> None:
    runtime, file, inputs_file, threads, runs = sys.argv[1:]
    with np.load(inputs_file, allow_pickle=False) as archive:
        inputs = {name.removeprefix("inputs/"): archive[name] for name in archive.files}
    steps = globals()[f"open_{runtime}"](file, int(threads))
    next(steps)
    baseline, _ = resident()
    run = next(steps)
    for _ in range(int(runs)):
        run(inputs)
    _, peak = resident()
    print(json.dumps({"baseline": baseline, "peak": max(peak, baseline)}), flush=True)
    # Runtimes may take long to shut down, or fail at it; the figures are out.
    os._exit(0)


if __name__ == "__main__":
    main()
