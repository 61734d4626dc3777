"""ResNet-20 for 28 × 28 grey images (He et al. 2015, section 4.2), the network of the demo."""

from itertools import pairwise

import torch
from torch import nn


class Block(nn.Module):
    """Two 3 × 3 convolutions and a shortcut; the shortcut is a 1 × 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """Three stages of three blocks with 16, 32 and 64 channels; 272 k parameters, 31 M MACs.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.blocks = nn.Sequential(*(Block(a, b, 2 if a != b else 1) for a, b in pairwise(widths)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images.

        Args:
            x: (batch, 1, 28, 28) float32 in [0, 1].

        Returns:
            (batch, classes) float32 logits.
        """
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.pool(self.blocks(y))
        return self.fc(y.flatten(1))
