"""Claim: the demo's ResNet-20 with 4-bit weights and activations, trained quantized for one epoch, is within 1 point of float.

First and last layer have 8-bit weights. Trained on the training images of Fashion-MNIST (the Debian package dataset-fashion-mnist, else the
14,000 that come with the package) towards the float network's answers, without labels; nothing is chosen on the test images.
"""

import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tinier
from tinier.demo.run import network, test, train

IMAGES = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
LAYERS = {"conv1": 8, "fc": 8}


def images() -> Tensor:
    """(n, 1, 28, 28) float32 training images in [0, 1]."""
    if not IMAGES.exists():
        return train()[0]
    raw = np.frombuffer(gzip.decompress(IMAGES.read_bytes()), np.uint8, offset=16)
    return torch.from_numpy(raw.copy()).view(-1, 1, 28, 28).float() / 255


def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in x.split(500)])
    return float((found == labels).double().mean())


if __name__ == "__main__":
    torch.set_num_threads(1)
    x, (test_x, labels) = images(), test()
    model = network()
    base = accuracy(model, test_x, labels)
    rows: list[dict[str, Any]] = [{"what": "float", "accuracy": base}]
    nearest = tinier.quantize(model, (x[:2],), x, bits=4, activations=4, layers=LAYERS)
    rows.append({"what": "W4A4 nearest", "accuracy": accuracy(nearest.model, test_x, labels)})
    started = time.process_time()
    trained = tinier.recover(nearest, x, epochs=1)
    rows.append(
        {
            "what": "W4A4 trained quantized, 1 epoch",
            "accuracy": accuracy(trained.model, test_x, labels),
            "cpu_seconds": time.process_time() - started,
        }
    )
    table = Table("ResNet-20, Fashion-MNIST", "accuracy", "points lost", "CPU seconds")
    for row in rows:
        lost = 100 * (base - row["accuracy"])
        spent = f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else ""
        table.add_row(row["what"], f"{row['accuracy']:.2%}", f"{lost:.2f}", spent)
    Console().print(table)
    kept = base - rows[-1]["accuracy"] <= 0.01
    content = {"claim": __doc__, "holds": kept, "training_images": len(x), "rows": rows}
    (RESULTS / "quantization_aware.json").write_text(json.dumps(content, indent=1))
    print("claim holds" if kept else "CLAIM FAILS")
    sys.exit(0 if kept else 1)
