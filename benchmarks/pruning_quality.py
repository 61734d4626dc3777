"""Claim: at equal MACs a network pruned by tinier keeps more accuracy than one pruned by Torch-Pruning 1.6.1.

ResNet-20 and a small ViT on Fashion-MNIST and MiniLM on spam, at 2 and 4 times fewer MACs: one-shot (512 calibration examples, no labels
for tinier, labels for Torch-Pruning's Taylor importance) and after the same short fine-tuning with plain cross-entropy. A seed draws the
calibration examples and the order of fine-tuning. Of Torch-Pruning's variants (L2 and Taylor importance; local and global, or the whole
width and bottlenecks only) the best on validation data at the first seed is reported, chosen apart for one-shot and fine-tuned; it may
have up to 2 % more MACs. MACs of both by ``torch.utils.flop_counter``. Rows that are done are kept in results/pruning_quality.json: a
stopped run goes on where it was.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import RESULTS, stop
from peers import peer_environment, run_peer
from pruning_quality_tasks import RECIPES, Task, accuracy, macs, task, tune
from rich.console import Console
from rich.table import Table

from tinier.criteria.reconstruction import Reconstruction
from tinier.methods.channel_pruning import ChannelPruning
from tinier.network import Network
from tinier.recovery.compensation import compensate
from tinier.statistics import observe

HERE = Path(__file__).resolve().parent
FILE = RESULTS / "pruning_quality.json"
KEEPS = (0.5, 0.25)
SEEDS = (0, 1, 2)
WAYS = {
    "resnet20": ("local", "global"),
    "vit": ("whole", "bottleneck"),
    "minilm": ("whole", "bottleneck"),
}
COST_WEIGHT = 0.5
LIMIT = 1800  # seconds for one row of the peer

Rows = dict[str, dict[str, Any]]


def ours(own: Task, keep: float, seed: int) -> dict[str, Any]:
    """Prune, compensate, fine-tune; the cost is found by torch's counter, as the peer's is."""
    network = Network(own.model(), own.example, own.name)
    whole = macs(network.module, own.example)
    data = own.calibration(seed)
    batches = [batch.inputs for batch in data.batches(64)]
    started = time.monotonic()
    criterion = Reconstruction()
    statistics = observe(network, batches, criterion.needs)
    low, high, asked, best_share, chosen = 0.0, 1.0, keep, 0.0, None
    for _ in range(6):  # the two counters differ in what they count of attention
        method = ChannelPruning(
            keep=asked, criterion=criterion, cost_weight=COST_WEIGHT, round_to=1
        )
        plan = method.plan(network, statistics)
        pruned = plan.apply(network)
        share = macs(pruned.module, own.example) / whole
        if best_share < share <= keep:
            best_share, chosen = share, (plan, pruned)
        if 0.98 * keep < share <= keep:
            break
        low, high = (asked, high) if share <= keep else (low, asked)
        asked = min(max(asked * keep / share, 0.7 * low + 0.3 * high), 0.3 * low + 0.7 * high)
    if chosen is None:
        stop(f"{own.name}: no plan of at most {keep} of the MACs")
    plan, pruned = chosen
    fitted = compensate(pruned, network, plan, batches)
    seconds = time.monotonic() - started
    tuned = tune(fitted.module, own.train, RECIPES[own.name], seed)
    return {
        "macs": best_share,
        "cut": accuracy(pruned.module, own.test),
        "one_shot": accuracy(fitted.module, own.test),
        "one_shot_valid": accuracy(fitted.module, own.valid),
        "tuned": accuracy(tuned, own.test),
        "tuned_valid": accuracy(tuned, own.valid),
        "seconds": seconds,
    }


def theirs(
    python: Path, request: dict[str, Any], variant: tuple[str, str], seed: int
) -> dict[str, Any]:
    kind, way = variant
    return run_peer(
        python,
        HERE / "pruning_quality_peer.py",
        {**request, "kind": kind, "way": way, "seed": seed},
        LIMIT,
    )


def best(rows: Rows, name: str, keep: float, what: str) -> tuple[str, str]:
    """The variant of the peer that is best on validation data at the first seed."""
    found = {}
    for kind in ("l2", "taylor"):
        for way in WAYS[name]:
            row = rows.get(f"{name} {keep} peer {kind} {way} {SEEDS[0]}", {})
            if "error" not in row and row:
                found[(kind, way)] = row[f"{what}_valid"]
    if not found:
        stop(f"{name} at {keep}: Torch-Pruning pruned nothing")
    return max(found, key=lambda variant: found[variant])


def run(name: str, spam: Path | None, seeds: tuple[int, ...], rows: Rows, python: Path) -> None:
    own = task(name, spam)
    key = f"{name} original"
    if key not in rows:
        model = own.model()
        keep_row(
            rows,
            key,
            {
                "accuracy": accuracy(model, own.test),
                "macs": macs(model, own.example),
                "data": own.source,
            },
        )
    for keep in KEEPS:
        for seed in seeds:
            key = f"{name} {keep} tinier {seed}"
            if key not in rows:
                keep_row(rows, key, ours(own, keep, seed))
        request = {
            "task": name,
            "keep": keep,
            "threads": torch.get_num_threads(),
            "spam": str(spam) if spam else "",
        }
        variants = {seeds[0]: [(kind, way) for kind in ("l2", "taylor") for way in WAYS[name]]}
        for seed in seeds:
            if seed != seeds[0]:
                chosen = [best(rows, name, keep, what) for what in ("one_shot", "tuned")]
                variants[seed] = list(dict.fromkeys(chosen))
            for variant in variants[seed]:
                key = f"{name} {keep} peer {variant[0]} {variant[1]} {seed}"
                if key not in rows:
                    keep_row(rows, key, theirs(python, request, variant, seed))


def keep_row(rows: Rows, key: str, row: dict[str, Any]) -> None:
    rows[key] = row
    numbers = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
    )
    print(f"{key}: {numbers}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    FILE.write_text(json.dumps({"rows": rows, "table": table(rows)}, indent=1))


def table(rows: Rows) -> list[dict[str, Any]]:
    """One line for each task, cost and stage that is complete: means over the seeds."""
    lines = []
    for name in WAYS:
        for keep in KEEPS:
            for what in ("one_shot", "tuned"):
                mine = [rows.get(f"{name} {keep} tinier {seed}") for seed in SEEDS]
                if not all(mine) or not any(f"{name} {keep} peer" in key for key in rows):
                    continue
                try:
                    kind, way = best(rows, name, keep, what)
                except SystemExit:
                    continue
                other = [rows.get(f"{name} {keep} peer {kind} {way} {seed}") for seed in SEEDS]
                if not all(other) or any("error" in row for row in other if row):
                    continue
                a, b = ([row[what] for row in group if row] for group in (mine, other))
                lines.append(
                    {
                        "task": name,
                        "fewer_macs": 1 / keep,
                        "stage": what,
                        "original": rows[f"{name} original"]["accuracy"],
                        "tinier": mean(a),
                        "torch_pruning": mean(b),
                        "variant": f"{kind}, {way}",
                        "difference": mean(a) - mean(b),
                        "tinier_macs": mean([row["macs"] for row in mine if row]),
                        "torch_pruning_macs": mean([row["macs"] for row in other if row]),
                        "each": {"tinier": a, "torch_pruning": b},
                    }
                )
    return lines


def show(lines: list[dict[str, Any]]) -> None:
    grid = Table(title="accuracy in %, means over 3 seeds")
    for column in (
        "task",
        "MACs",
        "stage",
        "original",
        "tinier",
        "Torch-Pruning",
        "its best",
        "difference",
    ):
        grid.add_column(column)
    for line in lines:
        grid.add_row(
            line["task"],
            f"1/{line['fewer_macs']:.0f} ({line['tinier_macs']:.3f}, {line['torch_pruning_macs']:.3f})",
            line["stage"].replace("_", "-").replace("tuned", "fine-tuned"),
            f"{line['original']:.2f}",
            f"{line['tinier']:.2f}",
            f"{line['torch_pruning']:.2f}",
            line["variant"],
            f"{line['difference']:+.2f}",
        )
    Console(width=140).print(grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spam", type=Path, help="folder with spam/, train.csv and test.csv")
    parser.add_argument("--tasks", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many, for a quick look")
    parser.add_argument("--again", action="store_true", help="forget the rows that are done")
    arguments = parser.parse_args()
    rows: Rows = {}
    if FILE.is_file() and not arguments.again:
        rows = json.loads(FILE.read_text())["rows"]
    python = peer_environment("torch-pruning")
    for name in arguments.tasks:
        if name == "minilm" and arguments.spam is None:
            print("NOT RUN: minilm; it needs --spam (minilm_spam.py --keep makes the folder)")
            continue
        run(name, arguments.spam, SEEDS[: arguments.seeds], rows, python)
    show(table(rows))


if __name__ == "__main__":
    main()
