"""MobileNetV2 and EfficientNet-Lite0 (ImageNet weights), fine-tuned on Fashion-MNIST at 96 × 96 pixels, and its parts.

Both are trained here once and kept in the cache folder (see ``peers``). Images come from the Debian package dataset-fashion-mnist where
it is installed, else the 14,000 that come with tinier. The first training images train, the last are the parts that nothing is trained on.
"""

import copy
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from architectures import real
from peers import cache as folder
from pruning_quality_tasks import task
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIDE = 96
TRAINED, BATCH, EPOCHS, RATE = 10_000, 50, 2, 0.03
PARTS = {"calibration": 512, "valid": 500, "test": 2000}
MEAN, DEVIATION = 0.286, 0.353  # of Fashion-MNIST's pixels


def images(x: Tensor) -> Tensor:
    """(n, 1, 28, 28) pixels in [0, 1] → (n, 3, SIDE, SIDE) float32 of about mean 0 and variance 1."""
    large = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear")
    return ((large - MEAN) / DEVIATION).expand(-1, 3, -1, -1).contiguous()


@cache
def part(name: str) -> tuple[Tensor, Tensor]:
    """((n, 3, SIDE, SIDE) float32 images, (n,) class numbers). Of what was trained on is only "calibration"."""
    source = task("resnet20")
    data = {"calibration": source.train, "valid": source.valid, "test": source.test}[name]
    rows = data.part(slice(0, PARTS[name]))
    return images(rows.inputs["x"]), rows.labels


def answers(model: Callable[[Tensor], Tensor], name: str) -> Tensor:
    """(n, 10) float32 logits that a network gives for a part of the data."""
    with torch.no_grad():
        rows = part(name)[0].split(25)
        return torch.cat([model(channels_last(images)) for images in rows])


def channels_last(x: Tensor) -> Tensor:
    """The same, as convolutions take it faster."""
    return x.contiguous(memory_format=torch.channels_last)


def mobilenet() -> nn.Module:
    model = real._mobilenet()
    model.classifier = nn.Linear(1280, 10)
    return model


def efficientnet() -> nn.Module:
    model = real._efficientnet()
    model._fc = nn.Linear(1280, 10)
    return model


NETWORKS = {"MobileNetV2": mobilenet, "EfficientNet-Lite0": efficientnet}


def network(name: str) -> nn.Module:
    """A fine-tuned network, in evaluation mode."""
    file = folder() / f"{name.lower()}-fashion-mnist-{SIDE}.safetensors"
    torch.manual_seed(0)
    model = NETWORKS[name]()
    if not file.is_file():
        print(f"fine-tuning {name}", flush=True)
        state = _tuned(model).state_dict()
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in state.items()}, file)
    model.load_state_dict(load_file(file))
    return model.eval()


def _tuned(model: nn.Module) -> nn.Module:
    """A copy after EPOCHS over the first TRAINED images, by SGD towards their labels."""
    model = copy.deepcopy(model).train().to(memory_format=torch.channels_last)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.1  # EfficientNet's 0.01 would keep ImageNet's statistics
    rows = task("resnet20").train.part(slice(0, TRAINED))
    optimizer = torch.optim.SGD(
        model.parameters(), RATE, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    steps = len(rows) // BATCH * EPOCHS
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.2
    )
    generator = torch.Generator().manual_seed(0)
    for epoch in range(EPOCHS):
        for index in torch.randperm(len(rows), generator=generator).split(BATCH):
            batch = rows.part(index)
            loss = F.cross_entropy(model(images(batch.inputs["x"])), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(
            f"epoch {epoch + 1} of {EPOCHS}: loss of the last batch {float(loss):.3f}", flush=True
        )
    return model.eval()
