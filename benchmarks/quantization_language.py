"""Claim: with weights of 4, 3 and 2 bits in groups, a language model loses less by tinier than by its peers at equal bits.

    python benchmarks/quantization_language.py [--only MODEL …] [--peers NAME …] [--bits 4 …] [--minutes 60] [--log FILE]

Two models (``quantization_language_models.py``): "small", trained from scratch on Shakespeare's plays, and SmolLM2-135M, whose linear
layers are already 4-bit in the file that it comes from, which is said beside every figure. The linear layers of the blocks are quantized,
embeddings and the last layer stay float, activations stay float. Bits a weight count the integers, a 16-bit scale a group, and zero points
where there are some; every contestant's variants stand beside each other with theirs. Every row is one fresh process in the contestant's
own environment; the best variant of a contestant is chosen on validation text, at most as many bits as asked, and its perplexity on the
test text is reported.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import RESULTS
from peers import PeerError, peer_environment, run_peer
from quantization_log import Log, Row, Rows
from quantization_peers import NAMES, PACKAGES
from quantization_tasks.base import work
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
FILE = RESULTS / "quantization_language.json"
SECONDS = 1800.0

# (bits, group) by model: SmolLM2's layers have 576 inputs, which 128 does not divide.
ASKED = {
    "small": ((4, 128), (4, 32), (3, 128), (3, 64), (2, 64), (2, 32)),
    "SmolLM2-135M": ((4, 64), (3, 64), (2, 32)),
}
# Each variant's settings; "zero_points" says whether it stores some, which is counted and passed to nobody.
CONTESTANTS: dict[str, dict[str, dict[str, Any]]] = {
    "float": {"float": {}},
    # The keywords of tinier.quantize beside bits and group.
    "tinier": {
        "RTN": {"weight_ranges": "minmax"},
        "RTN, mean squared error": {"weight_ranges": "mse"},
        "RTN, mean squared error, symmetric": {"weight_ranges": "mse", "symmetric": True},
        "RTN, importance": {"weight_ranges": "importance"},
        "error feedback": {"weight_ranges": "minmax", "rounding": "error_feedback"},
        "error feedback, mean squared error": {
            "weight_ranges": "mse", "rounding": "error_feedback"
        },
        "error feedback, importance": {
            "weight_ranges": "importance", "rounding": "error_feedback"
        },
        "HQQ": {"rounding": "hqq"},
    },
    "nncf": {
        "RTN, symmetric": {"symmetric": True},
        "RTN": {"symmetric": False},
        "AWQ": {"symmetric": False, "awq": True},
        "scale estimation": {"symmetric": False, "scale_estimation": True},
        "AWQ, scale estimation": {"symmetric": False, "awq": True, "scale_estimation": True},
        "GPTQ": {"symmetric": False, "gptq": True},
        "AWQ, GPTQ, scale estimation": {
            "symmetric": False, "awq": True, "gptq": True, "scale_estimation": True
        },
        "AWQ, scale estimation, symmetric": {
            "symmetric": True, "awq": True, "scale_estimation": True
        },
        "GPTQ, symmetric": {"symmetric": True, "gptq": True},
    },
    "torchao": {
        "RTN, symmetric": {"mapping": "SYMMETRIC"},
        "RTN": {"mapping": "ASYMMETRIC"},
        "HQQ, scale only": {"mapping": "SYMMETRIC", "algorithm": "hqq_scale_only"},
        "AWQ": {"mapping": "ASYMMETRIC", "method": "awq"},
        "GPTQ": {"mapping": "ASYMMETRIC", "method": "gptq"},
    },
    "inc": {
        "RTN": {"method": "rtn", "use_sym": False},
        "RTN, mean squared error": {"method": "rtn", "use_sym": False, "use_mse_search": True},
        "GPTQ": {"method": "gptq", "use_sym": False},
        "GPTQ, mean squared error": {"method": "gptq", "use_sym": False, "use_mse_search": True},
        "GPTQ, ordered": {"method": "gptq", "use_sym": False, "act_order": True},
        "GPTQ, ordered, mean squared error": {
            "method": "gptq", "use_sym": False, "act_order": True, "use_mse_search": True
        },
        "AWQ": {"method": "awq", "use_sym": False},
        "AWQ, folding": {"method": "awq", "use_sym": False, "folding": True},
        "HQQ": {"method": "hqq"},
    },
}  # fmt: skip
TITLES = {"float": "float", "tinier": "tinier", **NAMES}


def zero_points(contestant: str, variant: dict[str, Any]) -> bool:
    """Whether a variant stores zero points."""
    symmetric = variant.get("symmetric", variant.get("use_sym", False))
    return not symmetric and variant.get("mapping") != "SYMMETRIC"


def bits_per_weight(bits: int, group: int, zeros: bool) -> float:
    """Integers, a 16-bit scale a group, and where they are stored, zero points of as many bits as the weights."""
    return bits + (16 + (bits if zeros else 0)) / group


def run(
    model: str,
    contestant: str,
    log: Log,
    python: Path,
    until: float,
    asked: tuple[tuple[int, int], ...],
) -> None:
    for bits, group in ((32, 0),) if contestant == "float" else asked:
        for variant, settings in CONTESTANTS[contestant].items():
            key = f"{model} | {bits} bits, group {group} | {contestant} | {variant}"
            if key in log.rows() or time.monotonic() > until:
                continue
            row: Row = {"key": key, "model": model, "bits": bits, "group": group}
            row |= {"contestant": contestant, "variant": variant}
            request = {**row, "variant": settings}
            row |= run_peer(python, HERE / "quantization_language_peers.py", request, SECONDS)
            if contestant != "float":
                zeros = zero_points(contestant, settings)
                row["bits_per_weight"] = bits_per_weight(bits, group, zeros)
            log.keep(row)


def lines(rows: Rows) -> list[Row]:
    """One line for each model, bits and contestant: the variant that is best on the validation text."""
    found = []
    for model, pairs in ASKED.items():
        base = rows.get(f"{model} | 32 bits, group 0 | float | float", {})
        if "test" not in base:
            continue
        for bits, group in pairs:
            for contestant, variants in CONTESTANTS.items():
                prefix = f"{model} | {bits} bits, group {group} | {contestant} | "
                ran = [rows[prefix + name] for name in variants if prefix + name in rows]
                if not ran:
                    continue
                good = [row for row in ran if "test" in row]
                line: Row = {
                    "model": model,
                    "note": base["note"],
                    "bits": bits,
                    "group": group,
                    "contestant": TITLES[contestant],
                    "float": base["test"],
                    "each": {row["variant"]: row["test"] for row in good},
                    "failed": {
                        row["variant"]: row.get("error", "?") for row in ran if row not in good
                    },
                }
                if good:
                    best = min(good, key=lambda row: row["valid"])
                    names = ("variant", "test", "bits_per_weight", "cpu_seconds", "peak_mb")
                    line |= {name: best[name] for name in names}
                found.append(line)
    return found


def show(rows: Rows) -> None:
    grid = Table(title="perplexity on the test text, weights only")
    for column in ("model", "bits", "group", "contestant", "variant"):
        grid.add_column(column)
    for column in ("bits a weight", "float", "perplexity", "CPU s", "MiB"):
        grid.add_column(column, justify="right")
    for line in lines(rows):
        head = (line["model"], str(line["bits"]), str(line["group"]), line["contestant"])
        if "test" in line:
            numbers = (f"{line['bits_per_weight']:.2f}", f"{line['float']:.2f}")
            numbers += (
                f"{line['test']:.2f}",
                f"{line['cpu_seconds'] or 0:.0f}",
                f"{line['peak_mb']:.0f}",
            )
            grid.add_row(*head, line["variant"], *numbers)
        else:
            grid.add_row(*head, "failed: " + next(iter(line["failed"].values()))[:60])
    console = Console(width=160)
    console.print(grid)
    for model, note in dict((line["model"], line["note"]) for line in lines(rows)).items():
        console.print(f"{model}: {note}", highlight=False)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--only", nargs="+", choices=list(ASKED), default=list(ASKED))
    options.add_argument(
        "--peers", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS), metavar="NAME"
    )
    options.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], help="of weights")
    options.add_argument("--minutes", type=float, default=1e6, help="begin no row later")
    options.add_argument("--log", type=Path, default=work() / "language.jsonl", help="JSON lines")
    given = options.parse_args()
    log = Log(given.log, FILE, lambda rows: {"table": lines(rows)})
    until = time.monotonic() + 60 * given.minutes
    pythons: dict[str, Path] = {"float": Path(sys.executable), "tinier": Path(sys.executable)}
    for name in [name for name in given.peers if name in PACKAGES]:
        try:
            pythons[name] = peer_environment(f"quantization-{name}", PACKAGES[name])
        except PeerError as error:
            print(f"NOT RUN: {error}")
    for model in given.only:
        asked = tuple(pair for pair in ASKED[model] if pair[0] in given.bits)
        for contestant in dict.fromkeys(["float", *given.peers]):
            if contestant in pythons:
                run(model, contestant, log, pythons[contestant], until, asked)
    log.write()
    show(log.rows())


if __name__ == "__main__":
    main()
