"""The demo: everything that tinier does, on a network and data that come with it."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load

from tinier.compress import compress
from tinier.demo.resnet import ResNet20
from tinier.progress import Progress
from tinier.search.candidate import Result

HERE = files("tinier.demo")


def network() -> ResNet20:
    """The trained ResNet-20 (93.99 % on the 10,000 test images), in evaluation mode."""
    model = ResNet20()
    model.load_state_dict(load(HERE.joinpath("resnet20.safetensors").read_bytes()))
    return model.eval()


def test() -> tuple[torch.Tensor, torch.Tensor]:
    """The 10,000 test images of Fashion-MNIST, (10000, 1, 28, 28) float32 in [0, 1], and their labels."""
    return _read("test.npz")


def train() -> tuple[torch.Tensor, torch.Tensor]:
    """14,000 of the 60,000 training images and their labels."""
    return _read("train.npz")


def demo(
    *, out: str | Path | None, budget: str | float = "205s", progress: Progress | None = None
) -> Result:
    """Compress the ResNet-20 to at most one point less accuracy, on every installed runtime.

    Args:
        out: folder for the result; ``Result.save`` names one later if None.
        budget: time to spend.
        progress: receives what happens.
    """
    return compress(
        network(),
        "tinier.demo.run:test",
        train="tinier.demo.run:train",
        example=torch.rand(2, 1, 28, 28),
        metric="accuracy",
        max_drop="1%",
        budget=budget,
        out=out,
        progress=progress,
    )


def _read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    with HERE.joinpath(name).open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return (
            torch.from_numpy(arrays["x"])[:, None].float() / 255,
            torch.from_numpy(arrays["y"]).long(),
        )
