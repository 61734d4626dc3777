"""Real time: the speed-up of pruned networks on ONNX Runtime and OpenVINO against their MACs, with and without rounded widths.

    python benchmarks/pruning_time.py [--seconds 6] [--only NAME…]

Random weights: what they are does not change the time. Each pruned network is measured in turns with its original, at batch 1.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, stop
from rich.console import Console
from rich.table import Table

from tinier.graph.macs import macs
from tinier.measure.latency import interleaved
from tinier.measure.machine import machine
from tinier.methods.channel_pruning import ChannelPruning
from tinier.network import Network
from tinier.targets.base import Target, targets_for

KEEPS = (0.5, 0.25)
ROUNDINGS = (1, 8, 16)
RUNTIMES = ("onnxruntime", "openvino")


def image(size: int = 224) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def resnet() -> Network:
    from transformers import ResNetConfig, ResNetForImageClassification

    return Network(ResNetForImageClassification(ResNetConfig()).eval(), image(), "ResNet-50")


def mobilenet() -> Network:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    module = MobileNetV2ForImageClassification(MobileNetV2Config(image_size=224)).eval()
    return Network(module, image(), "MobileNetV2")


def vit() -> Network:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536
    )
    return Network(ViTForImageClassification(config).eval(), image(), "ViT-S/16")


def bert() -> Network:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    tokens = torch.randint(0, 30000, (2, 128))
    module = BertForSequenceClassification(config).eval()
    return Network(module, {"input_ids": tokens}, "BERT 6 × 384, 128 tokens")


NETWORKS: dict[str, Callable[[], Network]] = {
    "resnet": resnet,
    "mobilenet": mobilenet,
    "vit": vit,
    "bert": bert,
}


def measured(
    original: Network, pruned: Network, target: Target, seconds: float, threads: int
) -> dict[str, float]:
    """Median milliseconds of both, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, network in (("original", original), ("pruned", pruned)):
            path = Path(folder) / name
            path.mkdir()
            sessions[name] = target.open(target.lower(network, path).files[0], threads)
        inputs = {name: tensor.numpy() for name, tensor in original.batch(1).items()}
        found = interleaved(sessions, inputs, seconds=seconds)
    return {name: one.median for name, one in found.items()} | {
        f"{name}_{side}": getattr(one, side)
        for name, one in found.items()
        for side in ("low", "high")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS))
    options = parser.parse_args()
    facts = machine()
    missing = [name for name in RUNTIMES if not facts.runtimes[name].installed]
    if missing:
        stop(f"{', '.join(missing)} missing: pip install 'tinier[onnxruntime,openvino]'")
    threads = facts.cores
    table = Table(box=None, header_style="bold")
    for head in ("network", "keep", "round to", "MACs ÷", "runtime", "ms before", "ms after", "faster ×", "of the MACs ratio"):  # fmt: skip
        table.add_column(head, justify="left" if head in ("network", "runtime") else "right")
    rows: list[dict[str, Any]] = []
    for name in options.only:
        torch.manual_seed(0)
        original = NETWORKS[name]()
        whole = sum(macs(original.traced).values())
        for keep in KEEPS:
            for rounding in ROUNDINGS:
                pruned = ChannelPruning(keep=keep, round_to=rounding).plan(original).apply(original)
                ratio = whole / sum(macs(pruned.traced).values())
                for runtime in RUNTIMES:
                    target = targets_for(runtime)[0]
                    found = measured(original, pruned, target, options.seconds, threads)
                    faster = found["original"] / found["pruned"]
                    rows.append(
                        {"network": original.name, "keep": keep, "round_to": rounding, "macs_ratio": ratio, "runtime": runtime,
                         "faster": faster, "share_of_macs_ratio": faster / ratio, **found}
                    )  # fmt: skip
                    print(f"{original.name} {keep} {rounding} {runtime}: {faster:.2f}", flush=True)
                    table.add_row(
                        original.name, f"{keep:g}", str(rounding), f"{ratio:.2f}", runtime, f"{found['original']:.2f}",
                        f"{found['pruned']:.2f}", f"{faster:.2f}", f"{faster / ratio:.0%}",
                    )  # fmt: skip
    Console(width=140).print(table)
    RESULTS.mkdir(exist_ok=True)
    content = {"cpu": facts.cpu, "threads": threads, "batch": 1, "rows": rows}
    (RESULTS / "pruning_time.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
