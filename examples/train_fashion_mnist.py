"""Train the demo's ResNet-20 on Fashion-MNIST and write the demo's data.

Needs Debian's package: ``apt-get install dataset-fashion-mnist``. About 15 minutes on two cores.

    python examples/train_fashion_mnist.py --out src/tinier/demo

The last epoch's weights are taken, so the test images choose nothing. Fashion-MNIST: Xiao, Rasul, Vollgraf 2017, MIT licence.
"""

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tinier.demo.resnet import ResNet20


def read_idx(path: Path) -> np.ndarray:
    """Array of an IDX file of unsigned bytes: magic, one big-endian size a dimension, the bytes."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = np.frombuffer(raw, ">i4", dims, 4)
    return np.frombuffer(bytearray(raw), np.uint8, offset=4 + 4 * dims).reshape(shape)


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of the images and shift each by up to two pixels. x: (batch, 1, 28, 28)."""
    n = len(x)
    mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    x = torch.where(mirrored, x.flip(3), x)
    rows, columns = torch.randint(0, 5, (2, n, 1), generator=generator)
    grid = torch.arange(28)
    padded = F.pad(x, (2, 2, 2, 2))
    return padded[
        torch.arange(n)[:, None, None], 0, (grid + rows)[:, :, None], (grid + columns)[:, None]
    ][:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--shipped", type=int, default=14_000, help="training images that ship")
    arguments = parser.parse_args()

    images, labels = (
        read_idx(arguments.data / f"train-{part}.gz")
        for part in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    test_images, test_labels = (
        read_idx(arguments.data / f"t10k-{part}.gz")
        for part in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    order = torch.randperm(len(images), generator=generator)[: arguments.shipped].sort().values
    np.savez_compressed(arguments.out / "train.npz", x=images[order], y=labels[order])
    np.savez_compressed(arguments.out / "test.npz", x=test_images, y=test_labels)

    model = ResNet20()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.from_numpy(images)[:, None].float() / 255
    y = torch.from_numpy(labels).long()
    batch = 128
    steps = arguments.epochs * (len(x) // batch)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}],
        lr=0.2,
        momentum=0.9,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps, pct_start=0.2)
    started = time.monotonic()
    for epoch in range(arguments.epochs):
        model.train()
        total = 0.0
        shuffled = torch.randperm(len(x), generator=generator)
        for index in shuffled[: len(x) // batch * batch].split(batch):
            inputs = augment(x[index], generator).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(inputs), y[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds = time.monotonic() - started
        print(f"epoch {epoch + 1}: loss {total * batch / len(x):.4f}, {seconds:.0f} s", flush=True)
    model.eval()
    with torch.no_grad():
        test = torch.from_numpy(test_images)[:, None].float() / 255
        answers = torch.cat([model(part).argmax(1) for part in test.split(500)]).numpy()
    print(f"test accuracy {(answers == test_labels).mean():.4f}")
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        arguments.out / "resnet20.safetensors",
    )


if __name__ == "__main__":
    main()
