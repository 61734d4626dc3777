"""Classification and super-resolution of crops of photographs, and a linear probe on Fashion-MNIST.

Photographs come from scikit-image and foolbox; a photograph is in one part of the data only: calibration, validation or test.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from architectures import real
from common import packaged
from mobilenet_v2 import PHOTOS
from PIL import Image
from torch import Tensor, nn

from quantization_tasks.base import PARTS, Arrays, Inputs, Metric, Run, Task, each, reference

COUNTS = {"calibration": 256, "valid": 150, "test": 400}
SMALL = {"calibration": 128, "valid": 24, "test": 60}  # super-resolution
PIXELS = 70  # of a side, for DINOv2


@cache
def photos(part: str) -> tuple[Any, ...]:
    """Every third photograph."""
    folder = packaged("skimage", "data", "scikit-image==0.26.0")
    files = [folder / name for name in PHOTOS]
    files += sorted(packaged("foolbox", "data", "foolbox==3.3.4").glob("imagenet_*.*"))
    return tuple(Image.open(file).convert("RGB") for file in files[PARTS.index(part) :: 3])


@cache
def crops(part: str) -> np.ndarray:
    """(COUNTS[part], 3, 224, 224) float32, 0 … 1: random crops of a third to the whole of a photograph."""
    random = np.random.default_rng(PARTS.index(part))
    rows = []
    for index in range(COUNTS[part]):
        photo = photos(part)[index % len(photos(part))]
        side = int(min(photo.size) * random.uniform(0.33, 1))
        left, top = (int(random.integers(0, length - side + 1)) for length in photo.size)
        crop = photo.crop((left, top, left + side, top + side))
        pixels = np.asarray(crop.resize((224, 224), Image.Resampling.BILINEAR), np.float32)
        rows.append(pixels.transpose(2, 0, 1) / 255)
    return np.stack(rows)


def imagenet(pixels: np.ndarray) -> np.ndarray:
    mean, std = (
        np.array(v, np.float32)[:, None, None]
        for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return (pixels - mean) / std


def lite(pixels: np.ndarray) -> np.ndarray:
    """As the lite models of EfficientNet take them."""
    return (pixels * 255 - 127) / 128


def agreement(
    name: str, port: str, prepare: Callable[[np.ndarray], np.ndarray]
) -> Callable[[Run, str], dict[str, float]]:
    """Top-1 agreement with the float network in %, and KL(float ‖ quantized) in nats."""

    def evaluate(run: Run, part: str) -> dict[str, float]:
        rows = {port: prepare(crops(part)).astype(np.float32)}
        expected = torch.from_numpy(reference(name, part, rows))
        found = torch.from_numpy(np.concatenate([run(row)[0] for row in each(rows)]))
        same = (found.argmax(1) == expected.argmax(1)).float().mean()
        kl = F.kl_div(
            found.log_softmax(1), expected.log_softmax(1), log_target=True, reduction="batchmean"
        )
        return {"agreement": 100 * float(same), "kl": float(kl)}

    return evaluate


def prepared(port: str, prepare: Callable[[np.ndarray], np.ndarray]) -> Callable[[], Inputs]:
    return lambda: {port: torch.from_numpy(prepare(crops("calibration")).astype(np.float32))}


@cache
def pairs(part: str) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3, 64, 64) and (n, 3, 128, 128) float32, 0 … 255: crops of photographs, and the same at half the size."""
    random = np.random.default_rng(10 + PARTS.index(part))
    low, high = [], []
    for index in range(SMALL[part]):
        photo = photos(part)[index % len(photos(part))]
        left, top = (int(random.integers(0, length - 128 + 1)) for length in photo.size)
        crop = photo.crop((left, top, left + 128, top + 128))
        high.append(np.asarray(crop, np.float32).transpose(2, 0, 1))
        half = crop.resize((64, 64), Image.Resampling.BICUBIC)
        low.append(np.asarray(half, np.float32).transpose(2, 0, 1))
    return np.stack(low), np.stack(high)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of pixels 0 … 255, in dB, at most 99."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return 99.0 if error == 0 else min(99.0, 10 * float(np.log10(255**2 / error)))


def restoration(run: Run, part: str) -> dict[str, float]:
    """PSNR to what the float network gives, and to the photograph."""
    low, high = pairs(part)
    rows: Arrays = {"x": low}
    expected = reference("ESRGAN-slim", part, rows)
    found = np.concatenate([run(row)[0] for row in each(rows)])
    shown = np.clip(found, 0, 255)
    return {"psnr_float": psnr(found, expected), "psnr_photo": psnr(shown, high)}


class Backbone(nn.Module):
    """DINOv2's features of a picture: the class token and the mean of the patches, after the last norm."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.model(pixel_values=pixel_values).last_hidden_state
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)


@cache
def garments(part: str) -> tuple[np.ndarray, np.ndarray]:
    """((n, 3, 70, 70) float32, (n,) class numbers) of Fashion-MNIST; "probe" are those that the probe is fitted on."""
    source = importlib.import_module("pruning_quality_tasks").task("resnet20")
    data, start, count = {
        "calibration": (source.train, 0, 256),
        "probe": (source.train, 1000, 1500),
        "valid": (source.valid, 0, 400),
        "test": (source.test, 0, 1000),
    }[part]
    rows = data.part(slice(start, start + count))
    pixels = F.interpolate(rows.inputs["x"], size=(PIXELS, PIXELS), mode="bilinear")
    return imagenet(pixels.expand(-1, 3, -1, -1).numpy()).astype(np.float32), rows.labels.numpy()


@cache
def probe() -> tuple[Tensor, Tensor, nn.Linear]:
    """(mean, deviation, linear classifier) on the float network's features, by regularised logistic regression."""
    pixels, labels = garments("probe")
    features = torch.from_numpy(reference("DINOv2-S", "probe", {"pixel_values": pixels}))
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    layer, target = nn.Linear(features.shape[1], 10), torch.from_numpy(labels)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = F.cross_entropy(layer((features - mean) / deviation), target)
        total: Tensor = fit + 1e-2 * layer.weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return mean, deviation, layer.requires_grad_(False)


def probed(run: Run, part: str) -> dict[str, float]:
    """Accuracy of the probe in %, and the mean cosine to the float features."""
    pixels, labels = garments(part)
    rows = {"pixel_values": pixels}
    expected = torch.from_numpy(reference("DINOv2-S", part, rows))
    found = torch.from_numpy(np.concatenate([run(row)[0] for row in each(rows)]))
    mean, deviation, layer = probe()
    right = layer((found - mean) / deviation).argmax(1) == torch.from_numpy(labels)
    cosine = F.cosine_similarity(found, expected).mean()
    return {"accuracy": 100 * float(right.float().mean()), "cosine": float(cosine)}


AGREE = (Metric("agreement", True, "%"), Metric("kl", False, "nats"))
PHOTOGRAPHS = "crops of 28 photographs, no photograph in two parts: 256 to calibrate, 150 to choose, 400 to test"

TASKS = (
    Task(
        "MobileNetV2",
        real._mobilenet,
        prepared("x", imagenet),
        agreement("MobileNetV2", "x", imagenet),
        AGREE,
        lambda figures: figures["kl"],
        False,
        PHOTOGRAPHS,
    ),
    Task(
        "EfficientNet-Lite0",
        real._efficientnet,
        prepared("inputs", lite),
        agreement("EfficientNet-Lite0", "inputs", lite),
        AGREE,
        lambda figures: figures["kl"],
        False,
        PHOTOGRAPHS,
    ),
    Task(
        "ESRGAN-slim",
        real._esrgan,
        lambda: {"x": torch.from_numpy(pairs("calibration")[0])},
        restoration,
        (Metric("psnr_float", True, "dB"), Metric("psnr_photo", True, "dB")),
        lambda figures: 10 ** (-figures["psnr_float"] / 10),  # mean squared error, of the range
        False,
        "crops of 64 × 64 pixels of 28 photographs, no photograph in two parts: 128, 24 and 60",
    ),
    Task(
        "DINOv2-S",
        lambda: Backbone(real._dinov2()),
        lambda: {"pixel_values": torch.from_numpy(garments("calibration")[0])},
        probed,
        (Metric("accuracy", True, "%"), Metric("cosine", True, "")),
        lambda figures: 1 - figures["cosine"],
        True,
        "Fashion-MNIST at 70 pixels, a linear probe on 1,500 float features: 256, 400 and 1,000",
    ),
)
