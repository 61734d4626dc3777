"""Which architectures tinier prunes to half their MACs with no hint by hand, and what still holds afterwards.

    python benchmarks/pruning_coverage.py [--only NAME …] [--family NAME …] [--jobs 2] [--no-peer]

Every row runs in a process of its own on one thread, 120 s at most (real models 400 s): pruned as ``tinier.prune`` does, compared with
the masked reference (1e-5 relative in float32; where a network rounds more than that itself, 1e-10 in float64), at other batch sizes
and lengths, trained one step, exported to ONNX and run there, saved and loaded. Beside it Torch-Pruning 1.6.1, unaided, in its own
environment, 60 s at most (see ``coverage_torch_pruning.py``). All networks have random weights unless their family is "real".
"""

import argparse
import fnmatch
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: what forks must be one thread

from architectures import table
from architectures.base import Architecture
from peers import PeerError, peer_environment, run_peer
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "pruning_coverage.json"
SECONDS, REAL_SECONDS, PEER_SECONDS = 120.0, 400.0, 60.0
PRELOAD = ["torch", "onnxruntime", "onnxscript", "transformers", "tinier", "coverage_row"]
WIDTH = 160
HEADINGS = ["architecture", "family", "MACs left", "difference", "batch", "length", "kept"]
HEADINGS += ["trains", "ONNX", "saved", "trace", "axes", "rest ms", "Torch-Pruning"]


def own(name: str, seconds: float = SECONDS) -> dict[str, Any]:
    """A row by tinier, in a process of its own."""
    context: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    if os.name == "posix":
        context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "row.json"
        process = context.Process(target=_row, args=(name, str(path)), daemon=True)
        start = time.perf_counter()
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
        row: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"name": name}
        row["seconds"] = time.perf_counter() - start
    if row.get("step") != "done":
        ended = (
            "time was up"
            if row["seconds"] >= seconds
            else f"the process ended with {process.exitcode}"
        )
        row.setdefault("failed", {})[row.get("step", "start")] = ended
    return row


def _row(name: str, path: str) -> None:
    from coverage_row import run  # in the row's process: a spawned one imports nothing before

    run(name, Path(path))


# None: not asked of this architecture, which has no free size of that kind itself.
CHECKS: dict[str, Callable[[dict[str, Any]], bool | None]] = {
    "pruned": lambda row: "macs_left" in row and row["macs_left"] <= 0.5 + 1e-9,
    "equal": lambda row: row.get("difference", 1.0) <= 1e-5 or row.get("exact", 1.0) <= 1e-10,
    "batch": lambda row: row.get("batch", False),
    "length": lambda row: row.get("length", False),
    "class": lambda row: row.get("class", False),
    "trains": lambda row: row.get("trains", False),
    "onnx": lambda row: row.get("onnx", False),
    "saved": lambda row: row.get("saved", False),
}


def whole(row: dict[str, Any]) -> bool:
    """Whether everything that is asked of a row holds; that the class is kept is not asked."""
    return all(check(row) is not False for name, check in CHECKS.items() if name != "class")


def show(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """One table, the reasons of what failed, and a line for each column."""
    made = Table(title="Pruned to 50 % of the MACs, no hint by hand", show_lines=False)
    for heading in HEADINGS:
        right = heading in ("MACs left", "difference", "trace", "axes", "rest ms")
        made.add_column(
            heading, justify="right" if right else "left", no_wrap=heading != "Torch-Pruning"
        )
    for row in rows:
        marks = {
            name: {True: "yes", False: "NO", None: "–"}[check(row)]
            for name, check in CHECKS.items()
        }
        made.add_row(
            row["name"][:30],
            row["family"][:16],
            f"{row['macs_left']:.1%}" if "macs_left" in row else "refused",
            f"{row['difference']:.0e}{'*' if 'exact' in row else ''}"
            if "difference" in row
            else "",
            marks["batch"],
            marks["length"],
            "class" if row.get("class") else "graph" if "class" in row else "",
            marks["trains"],
            marks["onnx"],
            marks["saved"],
            *(
                f"{row[key]:.0f}" if key in row else ""
                for key in ("trace_ms", "axes_ms", "rest_ms")
            ),
            _peer(row.get("torch_pruning")),
        )
    console.print(made)
    for row in rows:
        for step, reason in row.get("failed", {}).items():
            console.print(f"{row['name']}: {step}: {reason}", highlight=False, markup=False)
    for row in rows:
        if row.get("exact", 1.0) <= 1e-10:
            console.print(
                f"* {row['name']}: its float32 rounds by {row['rounding']:.0e}; in float64 it differs by {row['exact']:.0e}",
                highlight=False,
            )
    for line in summary(rows):
        console.print(line, highlight=False)


def _peer(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if found.get("runs"):
        return f"{found['macs_left']:.0%}"
    return str(found.get("error", "?"))[:24]


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each column."""
    lines = [f"{sum(map(whole, rows))} of {len(rows)} rows hold in every column"]
    for name, check in CHECKS.items():
        asked = [row for row in rows if check(row) is not None]
        lines.append(f"{name}: {sum(bool(check(row)) for row in asked)} of {len(asked)}")
    for key in ("trace_ms", "axes_ms", "rest_ms"):
        times = sorted(row[key] for row in rows if key in row)
        if times:
            lines.append(f"{key}: median {times[len(times) // 2]:.0f}, largest {times[-1]:.0f}")
    peers = [row["torch_pruning"] for row in rows if "torch_pruning" in row]
    if peers:
        smaller = [peer for peer in peers if peer.get("runs")]
        half = [peer for peer in smaller if peer["macs_left"] <= 0.52]
        lines.append(
            f"Torch-Pruning unaided: smaller and running {len(smaller)} of {len(peers)}, of these at most 52 % of the MACs {len(half)}"
        )
    return lines


def chosen(only: Sequence[str], family: Sequence[str]) -> list[Architecture]:
    """The rows asked for by name or family, * standing for anything; all if none is named."""
    found, missing = table()
    for file, reason in missing.items():
        print(f"architectures/{file}.py is left out: {reason}")
    return [
        row
        for row in found.values()
        if (not only or any(fnmatch.fnmatch(row.name, pattern) for pattern in only))
        and (not family or any(fnmatch.fnmatch(row.family, pattern) for pattern in family))
    ]


def main() -> None:
    """Run the rows, print the table, write it."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--only", nargs="+", default=[], help="names of rows, * for anything")
    options.add_argument("--family", nargs="+", default=[], help="families of rows")
    options.add_argument("--jobs", type=int, default=1, help="rows at once; times need 1")
    options.add_argument("--no-peer", action="store_true", help="without Torch-Pruning")
    options.add_argument(
        "--out", type=Path, help="JSON file; results/pruning_coverage.json where all rows run"
    )
    options.add_argument(
        "--log",
        type=Path,
        help="JSON lines: rows are added as they end, and those in it are not run again",
    )
    options.add_argument(
        "--minutes",
        type=float,
        help="begin no row later; the order is random then, but real models first",
    )
    given = options.parse_args()
    console = Console(width=WIDTH)
    architectures = chosen(given.only, given.family)
    python = None
    if not given.no_peer:
        try:
            python = peer_environment("torch-pruning")
        except PeerError as error:
            console.print(f"without Torch-Pruning: {error}")

    logged = _logged(given.log)
    if given.minutes:
        # What time is too short for is then a random part of the table, chosen beforehand, and not its end.
        random.Random(0).shuffle(architectures)
        architectures.sort(key=lambda row: row.family not in ("real", "keras"))
    until = time.monotonic() + 60 * given.minutes if given.minutes else float("inf")

    def one(architecture: Architecture) -> dict[str, Any] | None:
        if time.monotonic() > until and architecture.name not in logged:
            return None
        row = logged.get(architecture.name)
        if row is not None and (python is None or "torch_pruning" in row):
            return row
        if row is None:
            about = {"family": architecture.family, "note": architecture.note}
            seconds = REAL_SECONDS if architecture.family == "real" else SECONDS
            row = {**about, **own(architecture.name, seconds)}
        if python is not None:
            script = HERE / "coverage_torch_pruning.py"
            row["torch_pruning"] = run_peer(python, script, {"name": row["name"]}, PEER_SECONDS)
        state = "holds" if whole(row) else f"FAILS {row.get('failed')}"
        console.print(
            f"{row['name']}: {state} ({row['seconds']:.0f} s)", highlight=False, markup=False
        )
        if given.log:
            with given.log.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
        return row

    with ThreadPoolExecutor(given.jobs) as pool:
        found = list(pool.map(one, architectures))
    rows = [row for row in found if row is not None]
    show(console, rows)
    console.print(f"not run, for want of time: {len(found) - len(rows)} of {len(found)}")
    everything = not given.only and not given.family
    path = given.out or (RESULT if everything else None)
    if path is not None:
        content = {"summary": summary(rows), "not_run": len(found) - len(rows), "rows": rows}
        path.write_text(json.dumps(content, indent=1) + "\n")


def _logged(log: Path | None) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run by name, the last of each."""
    lines = log.read_text().splitlines() if log and log.is_file() else []
    return {row["name"]: row for row in map(json.loads, lines)}


if __name__ == "__main__":
    main()
