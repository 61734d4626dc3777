"""Claim: distilled from the demo's ResNet-20, a small student wins back 60 % of what it lacks alone, and as much as with torchdistill.

    python benchmarks/distillation.py [--seeds 5] [--only NAME …] [--minutes 60]

The student has a twentieth of its MACs; 10,000 training images of Fashion-MNIST, 10 passes, batches of 64, one optimizer and one
schedule for all.
"alone" learns from the labels. torchdistill's settings are tried on the validation part with the first seed; losses of tinier have their
defaults. A step's time is that of a loop written by hand beside tinier's, in turn, the teacher's answers kept in both. Test images are
only reported.
"""

import argparse
import json
import os
import time
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import RESULTS
from distillation_task import (
    BATCH,
    EPOCHS,
    EXAMPLES,
    RATE,
    accuracy,
    by_hand,
    data,
    student,
    teacher,
)
from peers import PeerError, cache, peer_environment, run_peer
from rich.console import Console
from rich.table import Table

import tinier

HERE = Path(__file__).resolve().parent
FILE = RESULTS / "distillation.json"
LOG = cache() / "distillation.jsonl"
PEER = ("torchdistill==1.1.5", "torchvision==0.29.1")
SETTINGS = [{"temperature": t, "alpha": a} for t in (2.0, 4.0) for a in (0.1, 0.5)]
OURS: dict[str, list[str]] = {
    "alone": ["cross_entropy"],
    "soft targets": ["soft_targets"],
    "decoupled": ["decoupled"],
    "correlation": ["correlation"],
    "correlation, T = 2": ["correlation:temperature=2"],
    "soft targets, attention transfer": ["soft_targets", "attention_transfer"],
    "soft targets, relational": ["soft_targets", "relational"],
    "soft targets, contrastive": ["soft_targets", "contrastive:weight=0.1"],
    "soft targets, hints": ["soft_targets", "hints:weight=0.1"],
    "soft targets, labels": ["soft_targets", "cross_entropy"],
}
Row = dict[str, Any]


def rows() -> dict[str, Row]:
    if not LOG.is_file():
        return {}
    found = map(json.loads, LOG.read_text().splitlines())
    return {row["key"]: row for row in found}


def keep(row: Row) -> None:
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with LOG.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row["key"], {k: round(v, 2) for k, v in row.items() if isinstance(v, float)}, flush=True)


def ours(losses: list[str], seed: int) -> Row:
    part, started = data("train"), time.process_time()
    found = tinier.distill(
        student(seed),
        teacher(),
        (part.inputs["x"], part.labels),
        losses=losses,
        epochs=EPOCHS,
        batch=BATCH,
        lr=RATE,
        seed=seed,
    )
    spent = time.process_time() - started
    model = found.model
    return {
        "valid": accuracy(model, "valid"),
        "test": accuracy(model, "test"),
        "cpu_seconds": spent,
    }


def theirs(python: Path, seed: int, settings: Row) -> Row:
    return run_peer(python, HERE / "distillation_peer.py", {"seed": seed, **settings}, 1800)


def step_times(turns: int = 5) -> Row:
    """CPU milliseconds of a step of both loops, one pass over the data in turn."""
    part, other = data("train"), teacher()
    steps = EXAMPLES // BATCH
    found: dict[str, list[float]] = {"by hand": [], "tinier": []}
    for turn in range(turns + 1):
        for name in found:
            model, spent = student(turn), []
            # Two lengths: what is done once, as the teacher's answers, falls out.
            for epochs in (1, 2):
                started = time.process_time()
                if name == "by hand":
                    by_hand(model, other, turn, epochs)
                else:
                    tinier.distill(model, other, part.inputs["x"], epochs=epochs, lr=RATE)
                spent.append(time.process_time() - started)
            if turn:  # the first warms up
                found[name].append(1e3 * (spent[1] - spent[0]) / steps)
    ratios = [a / b for a, b in zip(found["tinier"], found["by hand"], strict=True)]
    return {
        **{name: median(values) for name, values in found.items()},
        "ratio": median(ratios),
        "ratios": ratios,
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--only", nargs="+", help="contestants")
    options.add_argument("--minutes", type=float, default=1e6, help="begin no row later")
    given = options.parse_args()
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * given.minutes
    names = [name for name in (*OURS, "torchdistill") if not given.only or name in given.only]
    python: Path | None = None
    settings: Row = {}
    if "torchdistill" in names:
        try:
            python = peer_environment("torchdistill", PEER)
        except PeerError as error:
            print(f"NOT RUN: {error}")
            names.remove("torchdistill")
    for seed in range(given.seeds):
        for name in names:
            key = f"{name} | {seed}"
            if key in rows() or time.monotonic() > until:
                continue
            if name != "torchdistill":
                keep({"key": key, "name": name, "seed": seed, **ours(OURS[name], seed)})
                continue
            assert python is not None
            for tried in SETTINGS:
                at = f"torchdistill {tried} | 0"
                if at not in rows() and time.monotonic() < until:
                    keep({"key": at, "settings": tried, **theirs(python, 0, tried)})
            done = [row for row in rows().values() if "valid" in row and "settings" in row]
            if done:
                settings = max(done, key=lambda row: row["valid"])["settings"]
                keep({"key": key, "name": name, "seed": seed, **theirs(python, seed, settings)})
    if "step" not in rows() and time.monotonic() < until:
        keep({"key": "step", **step_times()})
    report(settings)


def report(settings: Row) -> None:
    found = rows()
    goal = accuracy(teacher(), "test")
    table, lines = Table("student", "seeds", "test accuracy", "±", "of the gap", "CPU s"), []
    alone = [row["test"] for row in found.values() if row.get("name") == "alone"]
    for name in (*OURS, "torchdistill"):
        own = [row for row in found.values() if row.get("name") == name and "test" in row]
        if not own or not alone:
            continue
        values = [row["test"] for row in own]
        share = (mean(values) - mean(alone)) / (goal - mean(alone))
        spread = stdev(values) if len(values) > 1 else 0.0
        spent = mean(row["cpu_seconds"] for row in own)
        table.add_row(
            name,
            str(len(own)),
            f"{mean(values):.2f}",
            f"{spread:.2f}",
            f"{share:.0%}",
            f"{spent:.0f}",
        )
        lines.append({"name": name, "test": values, "of the gap": share, "cpu_seconds": spent})
    Console(width=120).print(table)
    step = found.get("step", {})
    print(
        f"teacher {goal:.2f}; a step of tinier takes {step.get('ratio', float('nan')):.2f} of one by hand"
    )
    content = {
        "claim": __doc__,
        "teacher": goal,
        "torchdistill": settings,
        "rows": lines,
        "step": step,
    }
    FILE.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
