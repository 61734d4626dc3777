"""Claim: what tinier quantizes loses less than what NNCF, ONNX Runtime, Neural Compressor and torchao quantize, at the same size.

    python benchmarks/quantization.py --spam folder [--only TASK …] [--peers NAME …] [--minutes 60] [--log FILE] [--time]

Every task is one float network with trained weights (``quantization_tasks``); every contestant gets the same file or module and the same
calibration examples, one variant in one fresh process (``quantization_own.py``, ``quantization_peers.py``), and every artifact is
evaluated at batch 1 on its own runtime (``quantization_evaluate.py``). Of a contestant's variants the best on the validation part is
chosen; it, and the first variant, its default, are evaluated on the test part. What raises is a row with its error. ``--time`` measures
latencies of the chosen artifacts beside the float network's on the same runtime, in turn; it wants a machine that does nothing else.
Rows are kept in the log as they end: a stopped run goes on where it was. The table and results/quantization.json are made of the log.
"""

import argparse
import fnmatch
import os
import re
import shutil
import sys
import time
from pathlib import Path
from statistics import geometric_mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import RESULTS
from peers import PeerError, peer_environment, run_peer
from quantization_log import Log, Row, Rows
from quantization_peers import NAMES, PACKAGES, VARIANTS, variants_of
from quantization_tasks import WHERE
from quantization_tasks import task as task_of
from quantization_tasks.base import Task, float_file, work
from rich.console import Console
from rich.table import Table

from tinier.measure.machine import machine

HERE = Path(__file__).resolve().parent
FILE = RESULTS / "quantization.json"
THREADS = 1  # of a timed artifact
EVALUATE = 1800.0  # seconds
UNCHANGED = 1e-7  # a distance that float arithmetic alone makes

# tinier's variants: the runtime that the file is exported for, and the keywords of tinier.quantize.
SMOOTH = ("smooth_quant", "bias_correction")
OURS: dict[str, dict[str, Any]] = {
    "ONNX Runtime, importance": {"export": "onnxruntime", "ranges": "importance"},
    "ONNX Runtime": {"export": "onnxruntime", "ranges": "mse"},
    "OpenVINO": {"export": "openvino", "ranges": "mse"},
    "ONNX Runtime, min-max": {"export": "onnxruntime", "ranges": "minmax", "weight_ranges": "mse"},
}
OF_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ONNX Runtime, importance, SmoothQuant": {
        "export": "onnxruntime",
        "ranges": "importance",
        "corrections": SMOOTH,
    },
    "ONNX Runtime, importance, SmoothQuant, outlier channels": {
        "export": "onnxruntime",
        "ranges": "importance",
        "corrections": (*SMOOTH, "outlier_channels"),
    },
    "ONNX Runtime, dynamic": {"export": "onnxruntime", "activations": "dynamic_per_token"},
}
OF_OTHERS: dict[str, dict[str, Any]] = {
    "ONNX Runtime, importance, error feedback": {
        "export": "onnxruntime",
        "ranges": "importance",
        "rounding": "error_feedback",
    },
    "ONNX Runtime, importance, restored": {
        "export": "onnxruntime",
        "ranges": "importance",
        "restore": 0.5,
    },
}
FLOAT = {name: {"export": name, "float": True} for name in ("onnxruntime", "openvino")}
CONTESTANTS = ("float", "tinier", *VARIANTS)
TITLES = {"float": "float", "tinier": "tinier", **NAMES}


def variants(task: Task, contestant: str) -> dict[str, dict[str, Any]]:
    """Settings by name; the first is the contestant's default."""
    ours = OURS | (OF_TRANSFORMERS if task.transformer else OF_OTHERS)
    own = {"float": FLOAT, "tinier": ours}
    return own.get(contestant) or variants_of(contestant, task.transformer)


def folder_of(task: str, contestant: str, variant: str) -> Path:
    if contestant == "float":
        return float_file(task).parent
    return work() / task / contestant / re.sub(r"[^a-z0-9]+", "-", variant.lower())


def built(task: Task, contestant: str, variant: str, python: Path) -> Row:
    """One quantization in a fresh process."""
    folder = folder_of(task.name, contestant, variant)
    if contestant != "float":
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    own = contestant in ("float", "tinier")
    asked = {
        "task": task.name,
        "peer": contestant,
        "variant": variants(task, contestant)[variant],
        "folder": str(folder),
    }
    script = HERE / ("quantization_own.py" if own else "quantization_peers.py")
    started = time.monotonic()
    found = run_peer(python, script, asked, 60 * task.minutes)
    if "error" in found:
        return {"error": found["error"], "seconds": time.monotonic() - started}
    found["file"] = Path(found.pop("path")).name
    return found


def present(task: Task, row: Row, python: Path) -> None:
    """Make the artifact of a row again where the row comes from another machine, or its folder was emptied."""
    path = folder_of(task.name, row["contestant"], row["variant"]) / row.get("file", "")
    if "error" not in row and not path.is_file():
        built(task, row["contestant"], row["variant"], python)


def evaluated(task: Task, row: Row, part: str, python: Path) -> Row:
    path = folder_of(task.name, row["contestant"], row["variant"]) / row["file"]
    asked = {"task": task.name, "runtime": row["runtime"], "path": str(path), "part": part}
    return run_peer(python, HERE / "quantization_evaluate.py", asked, EVALUATE)


def timed(task: Task, row: Row, python: Path) -> Row:
    path = folder_of(task.name, row["contestant"], row["variant"]) / row["file"]
    asked = {
        "task": task.name,
        "runtime": row["runtime"],
        "path": str(path),
        "float": str(float_file(task.name, row["runtime"])),
        "threads": THREADS,
    }
    return run_peer(python, HERE / "quantization_evaluate.py", asked, EVALUATE)


def run(
    task: Task, contestant: str, log: Log, python: Path, until: float, again: bool = False
) -> None:
    """All variants of one contestant on the validation part; the best and the default on the test part."""
    for variant in variants(task, contestant):
        key = f"{task.name} | {contestant} | {variant}"
        row = log.rows().get(key)
        if row is not None and not again:
            if contestant == "float":
                present(task, row, python)  # everybody reads it
            continue
        if time.monotonic() > until:
            continue
        row = {"key": key, "task": task.name, "contestant": contestant, "variant": variant}
        row |= built(task, contestant, variant, python)
        if "error" not in row and "valid" not in row:
            figures = evaluated(task, row, "valid", python)  # for its error, if for nothing else
            row |= {"error": figures["error"]} if "error" in figures else {"valid": figures}
        log.keep(row)
    for row in {id(row): row for row in reported(log.rows(), task, contestant)}.values():
        if "test" not in row and time.monotonic() < until:
            present(task, row, python)
            figures = evaluated(task, row, "test", python)
            log.keep(
                row | ({"error": figures["error"]} if "error" in figures else {"test": figures})
            )


def reported(rows: Rows, task: Task, contestant: str) -> list[Row]:
    """The best variant on the validation part, and the default where it ran; of float networks all."""
    keys = [f"{task.name} | {contestant} | {variant}" for variant in variants(task, contestant)]
    good = [rows[key] for key in keys if "valid" in rows.get(key, {}) and "error" not in rows[key]]
    if contestant == "float" or not good:
        return good
    best = min(good, key=lambda row: task.distance(row["valid"]))
    return [best, *(row for row in good if row["key"] == keys[0])]


def lines(rows: Rows) -> list[Row]:
    """One line for each task and contestant: float, loss, size, cost, of the best variant and the default."""
    found = []
    for task in map(task_of, WHERE):
        metric = task.metrics[0]
        base = rows.get(f"{task.name} | float | onnxruntime", {})
        if "test" not in base:
            continue
        for contestant in CONTESTANTS:
            if contestant == "float":
                continue
            keys = [
                f"{task.name} | {contestant} | {variant}" for variant in variants(task, contestant)
            ]
            ran = [rows[key] for key in keys if key in rows]
            if not ran:
                continue
            line: Row = {
                "task": task.name,
                "contestant": TITLES[contestant],
                "metric": metric.name,
                "unit": metric.unit,
                "float": base["test"][metric.name],
                "variants": len(ran),
                "failed": {row["variant"]: row["error"] for row in ran if "error" in row},
            }
            best, *default = reported(rows, task, contestant) or [{}]
            if "test" in best:
                value = best["test"][metric.name]
                line |= {
                    "variant": best["variant"],
                    "runtime": best["runtime"],
                    "quantized": value,
                    "loss": (line["float"] - value) * (1 if metric.higher else -1),
                    "figures": best["test"],
                    "distance": task.distance(best["test"]),
                    "simulated": best.get("simulated"),
                    "on runtime": best["valid"],
                    "steps": best.get("steps"),
                    "relative": best.get("relative"),
                    "float_bytes": base["size"],
                    "bytes": best["size"],
                    "smaller": base["size"] / best["size"],
                    "cpu_seconds": best.get("cpu_seconds"),
                    "peak_mb": best["peak_mb"],
                    "time": best.get("time"),
                }
            if default and "test" in default[0]:
                line["default"] = default[0]["test"][metric.name]
            found.append(line)
    return found


def content(rows: Rows) -> dict[str, Any]:
    """What the result holds beside the rows."""
    return {
        "machine": {"vnni": machine().vnni, "threads": THREADS},
        "data": {task.name: task.data for task in map(task_of, WHERE)},
        "table": lines(rows),
        "against the best peer": ratios(lines(rows)),
        "speed at a peer's accuracy": speeds(rows),
    }


def ratios(table: list[Row]) -> dict[str, Any]:
    """tinier's distance to the float network's outputs over the nearest peer's, by task, and the geometric mean; below 1 is nearer.

    The nearest peer is the one that turned out nearest on the test part, which is known afterwards only.
    """
    found: dict[str, Any] = {}
    for name in WHERE:
        lines = [line for line in table if line["task"] == name and "distance" in line]
        mine = [line["distance"] for line in lines if line["contestant"] == TITLES["tinier"]]
        others = [line for line in lines if line["contestant"] != TITLES["tinier"]]
        # Who found nothing to quantize gives the float network back.
        peers = [line for line in others if line["distance"] > UNCHANGED]
        if mine and peers:
            nearest = min(peers, key=lambda line: line["distance"])
            ratio = mine[0] / nearest["distance"]
            found[name] = {"nearest": nearest["contestant"], "ratio": ratio}
    if found:
        found["geometric mean"] = geometric_mean([one["ratio"] for one in found.values()])
    return found


def to_time(rows: Rows, task: Task, contestant: str) -> list[Row]:
    """A peer's chosen artifact; all of tinier's, of which `speeds` chooses."""
    if contestant != "tinier":
        return reported(rows, task, contestant)[:1]
    keys = [f"{task.name} | tinier | {variant}" for variant in variants(task, contestant)]
    return [rows[key] for key in keys if "valid" in rows.get(key, {})]


def speeds(rows: Rows) -> list[Row]:
    """For each peer's chosen artifact: the fastest of tinier's for the same runtime that are as near to the float outputs, on validation.

    A speed is the float network's median latency over the artifact's, on that runtime, timed in turn.
    """
    found = []
    for task in map(task_of, WHERE):
        keys = [f"{task.name} | tinier | {variant}" for variant in variants(task, "tinier")]
        mine = [rows[key] for key in keys if "time" in rows.get(key, {})]
        for peer in [name for name in VARIANTS if reported(rows, task, name)]:
            theirs = reported(rows, task, peer)[0]
            if "time" not in theirs:
                continue
            limit = max(task.distance(theirs["valid"]), UNCHANGED)
            near = [
                row
                for row in mine
                if row["runtime"] == theirs["runtime"] and task.distance(row["valid"]) <= limit
            ]
            best = max(near, key=speed, default=None)
            found.append(
                {
                    "task": task.name,
                    "runtime": theirs["runtime"],
                    "peer": TITLES[peer],
                    "its speed": speed(theirs),
                    "variant": best and best["variant"],
                    "speed": best and speed(best),
                    "ratio": best and speed(best) / max(speed(theirs), 1.0),
                }
            )
    return found


def speed(row: Row) -> float:
    """How much faster than the float network an artifact is, by the medians."""
    return float(row["time"]["faster"]["median"])


def show(rows: Rows) -> None:
    grid = Table(
        title="8 bits after training, test part, batch 1, each artifact on its own runtime"
    )
    for column in ("task", "metric", "float", "contestant", "best", "its default", "variant"):
        grid.add_column(column)
    for column in ("smaller", "faster", "CPU s", "MiB"):
        grid.add_column(column, justify="right")
    for line in lines(rows):
        ran = "quantized" in line
        absent = "failed" if len(line["failed"]) == line["variants"] else "not yet"
        speed = (line.get("time") or {}).get("faster", {}).get("median") if ran else None
        grid.add_row(
            line["task"],
            f"{line['metric']}, {line['unit']}".rstrip(", "),
            f"{line['float']:.4g}",
            line["contestant"],
            f"{line['quantized']:.4g}" if ran else absent,
            f"{line['default']:.4g}" if "default" in line else "",
            line["variant"] if ran else next(iter(line["failed"].values()), "")[:60],
            *(
                (
                    f"{line['smaller']:.2f}",
                    f"{speed:.2f}" if speed else "",
                    f"{line['cpu_seconds'] or 0:.0f}",
                    f"{line['peak_mb']:.0f}",
                )
                if ran
                else ("", "", "", "")
            ),
        )
    Console(width=180).print(grid)
    for name, found in ratios(lines(rows)).items():
        nearest = f" of {found['nearest']}'s" if name in WHERE else ""
        ratio = found["ratio"] if name in WHERE else found
        print(f"{name}: tinier's distance to the float outputs is {ratio:.2f}{nearest}")
    for row in speeds(rows):
        own = (
            f"{row['speed']:.2f}× ({row['variant']})"
            if row["variant"]
            else "none of those timed is as near"
        )
        theirs = f"{row['peer']} {row['its speed']:.2f}×"
        print(f"{row['task']} on {row['runtime']}, times float: {theirs}, tinier {own}")


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--spam", help="folder with spam/, train.csv and test.csv")
    options.add_argument("--only", nargs="+", default=["*"], help="tasks, * for anything")
    options.add_argument(
        "--peers", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS), metavar="NAME"
    )
    options.add_argument("--minutes", type=float, default=1e6, help="begin no row later")
    options.add_argument("--log", type=Path, default=work() / "log.jsonl", help="JSON lines")
    options.add_argument("--again", action="store_true", help="also what is in the log")
    options.add_argument("--time", action="store_true", help="latencies of the chosen artifacts")
    given = options.parse_args()
    if given.spam:
        os.environ["TINIER_SPAM"] = str(Path(given.spam).resolve())
    log, until = Log(given.log, FILE, content), time.monotonic() + 60 * given.minutes
    pythons: dict[str, Path] = {"float": Path(sys.executable), "tinier": Path(sys.executable)}
    for name in [name for name in given.peers if name in PACKAGES]:
        try:
            pythons[name] = peer_environment(f"quantization-{name}", PACKAGES[name])
        except PeerError as error:
            print(f"NOT RUN: {error}")
    chosen = [t for t in map(task_of, WHERE) if any(fnmatch.fnmatch(t.name, p) for p in given.only)]
    for task in chosen:
        for contestant in dict.fromkeys(["float", *given.peers]):
            if contestant in pythons:
                run(task, contestant, log, pythons[contestant], until, given.again)
    if given.time:
        for task in chosen:
            for contestant in [name for name in given.peers if name in pythons]:
                for row in to_time(log.rows(), task, contestant):
                    if "time" not in row and row["runtime"] != "torch" and contestant != "float":
                        present(task, row, pythons[contestant])
                        log.keep(row | {"time": timed(task, row, pythons[contestant])})
    log.write()
    show(log.rows())


if __name__ == "__main__":
    main()
