"""Time and memory of the pruning engine: a Llama-3-8B shape on the meta device, growth with depth and width, and against Torch-Pruning.

    python benchmarks/pruning_engine.py [--quick] [--runs 5]

Every measurement is a fresh process on one thread. "--quick" takes few layers and one run, to see whether the script works.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import PeerError, peer_environment, run_peer
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "pruning_engine.json"
NETWORKS = ("resnet50", "vit_b", "bert_base")


def megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def llama(layers: int, width: int, heads: int = 32, keys: int = 8, words: int = 128256) -> Any:
    """A Llama of the proportions of Llama-3-8B on the meta device, and its example."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(  # type: ignore[call-arg]
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=words,
        use_cache=False,
    )
    with torch.device("meta"):
        module = LlamaForCausalLM(config).eval()
    return module, {"input_ids": torch.zeros(2, 16, dtype=torch.long)}


def real(name: str, batch: int) -> Any:
    """ResNet-50, ViT-B/16 or BERT-base with random weights, and its example."""
    import torch
    import transformers

    torch.manual_seed(0)
    image = {"pixel_values": torch.randn(batch, 3, 224, 224)}
    words = {
        "input_ids": torch.randint(0, 30000, (batch, 128)),
        "attention_mask": torch.ones(batch, 128, dtype=torch.long),
    }
    make: dict[str, Callable[[], Any]] = {
        "resnet50": lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig()),
        "vit_b": lambda: transformers.ViTForImageClassification(transformers.ViTConfig()),
        "bert_base": lambda: transformers.BertForSequenceClassification(transformers.BertConfig()),
    }
    return make[name]().eval(), words if name == "bert_base" else image


class Clock:
    """Seconds of each step, by name."""

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}

    def __call__(self, name: str, step: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = step()
        self.steps[name] = time.perf_counter() - start
        return result


def on_meta(layers: int, width: int, everything: bool) -> dict[str, Any]:
    """Times and memory of one Llama shape; with ``everything``, also planning and applying."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    imported = megabytes()
    from tinier.criteria.random import Random
    from tinier.graph.groups import channel_groups
    from tinier.methods.channel_pruning import ChannelPruning
    from tinier.sources.load import load

    heads = max(width // 128, 1)
    keys = max(heads // 4, 1)
    module, example = llama(layers, width, heads, keys, 128256 if everything else 1000)
    clock = Clock()
    network = load(module, example)
    clock("trace", lambda: network.traced)
    for _ in range(5):
        clock("analysis", lambda: channel_groups(network.traced))
    answer: dict[str, Any] = {
        "parameters": sum(p.numel() for p in module.parameters()),
        "operators": len(network.traced.module.graph.nodes),
        "by_export": network.traced.by_export,
        "imported_megabytes": imported,
        "peak_megabytes": megabytes(),
    }
    if everything:
        plan = clock("plan", lambda: ChannelPruning(criterion=Random()).plan(network))
        smaller = clock("apply", lambda: plan.apply(network))
        answer["kept"] = sum(p.numel() for p in smaller.module.parameters())
        answer["class"] = type(smaller.module).__name__
        answer["peak_megabytes_with_apply"] = megabytes()
    return answer | {"seconds": clock.steps}


def ours(name: str) -> dict[str, Any]:
    """The whole of pruning to half the MACs, step by step; a small network is pruned first, as a warm-up."""
    import torch

    torch.set_num_threads(1)
    from tinier.edits.rewrite import sliced_graph
    from tinier.edits.stock import stock_modules
    from tinier.graph.groups import channel_groups
    from tinier.methods.channel_pruning import ChannelPruning
    from tinier.network import Network

    warm = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    first = Network(warm.eval(), {"input": torch.randn(2, 8)})
    ChannelPruning().plan(first).apply(first)
    module, example = real(name, 2)
    network, clock = Network(module, example, name), Clock()
    traced = clock("trace", lambda: network.traced)
    channels = clock("analysis", lambda: channel_groups(traced))
    plan = clock("plan", lambda: ChannelPruning().plan(network))
    atoms = {group.name: group.atom for group in channels.groups}
    kept = {atoms[edit.group]: torch.tensor(edit.kept) for edit in plan.edits}
    clock("cut", lambda: next(iter(stock_modules(module, channels, kept))))
    clock("cut_graph", lambda: sliced_graph(traced, channels, kept))
    smaller = clock("apply", lambda: plan.apply(network))
    steps = clock.steps
    return {
        "seconds": steps,
        "without_proof": steps["trace"] + steps["plan"] + steps["cut"],
        "with_proof": steps["trace"] + steps["plan"] + steps["apply"],
        "class": type(smaller.module).__name__,
        "by_export": traced.by_export,
    }


def fresh(*arguments: Any) -> dict[str, Any]:
    """What this file answers in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def growth(rows: list[dict[str, Any]], by: str, of: str) -> float:
    """The exponent k of seconds ~ byᵏ, by least squares on logarithms."""
    x = [math.log(row[by]) for row in rows]
    y = [math.log(row["seconds"][of]) for row in rows]
    return statistics.linear_regression(x, y).slope


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, *arguments = json.loads(options.worker)
        print(json.dumps({"meta": on_meta, "ours": ours}[kind](*arguments)))
        return
    console, runs = Console(), 1 if options.quick else options.runs
    result: dict[str, Any] = {"threads": 1, "runs": runs}
    result["llama"] = fresh("meta", 2 if options.quick else 32, 4096, True)
    console.print("Llama-3-8B shape on the meta device", result["llama"])
    times = (1, 2) if options.quick else (1, 2, 4, 8)
    result["depth"] = [fresh("meta", 4 * n, 512, False) | {"times": n} for n in times]
    result["width"] = [fresh("meta", 4, 512 * n, False) | {"times": n} for n in times]
    result["growth"] = {
        f"{of} by {by}": growth(result[by], "operators" if by == "depth" else "times", of)
        for by in ("depth", "width")
        for of in ("trace", "analysis")
    }
    console.print("seconds ~ sizeᵏ: 1 is linear, 0 is flat", result["growth"])
    result["against"] = against(("resnet50",) if options.quick else NETWORKS, runs)
    table = Table("network", "step", "tinier s", "Torch-Pruning s", "ratio")
    for name, row in result["against"].items():
        other = row["torch_pruning"]
        for step in ("without_proof", "with_proof"):
            ratio = f"{other / row[step]:.2f}×" if other else "-"
            table.add_row(name, step, f"{row[step]:.2f}", f"{other:.2f}" if other else "-", ratio)
        how = "torch.export" if row["by_export"] else "the recording"
        table.add_row(name, f"of it {how}", f"{row['seconds']['trace']:.2f}", "", "")
    console.print(table)
    if not options.quick:
        RESULTS.write_text(json.dumps(result, indent=1))


def against(names: tuple[str, ...], runs: int) -> dict[str, Any]:
    """Medians of tinier and Torch-Pruning in turns; None for Torch-Pruning where it cannot be installed or raises."""
    try:
        python: Path | None = peer_environment("torch-pruning")
    except PeerError as error:
        print(f"NOT RUN: {error}", file=sys.stderr)
        python = None
    result: dict[str, Any] = {}
    for name in names:
        mine, theirs, answer = [], [], {}
        for _ in range(runs):
            mine.append(fresh("ours", name))
            if python is not None:
                answer = run_peer(python, HERE / "pruning_engine_peer.py", {"name": name}, 300)
                theirs += [answer["seconds"]] if "seconds" in answer else []
        steps = mine[0]["seconds"]
        result[name] = {
            "seconds": {k: statistics.median(m["seconds"][k] for m in mine) for k in steps},
            "without_proof": statistics.median(m["without_proof"] for m in mine),
            "with_proof": statistics.median(m["with_proof"] for m in mine),
            "class": mine[0]["class"],
            "by_export": mine[0]["by_export"],
            "torch_pruning": statistics.median(theirs) if theirs else None,
            "torch_pruning_answer": answer,
        }
    return result


if __name__ == "__main__":
    main()
