"""One of several processes that train together; prints the loss of each step and the sum of the weights: see test_training.py."""

import json
import sys

import torch

from networks import build
from tinier.data.base import Arrays, Examples
from tinier.recovery.loop import recover


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(7)
    data = Examples(Arrays({"x": torch.randn(96, 12, generator=generator)}))
    losses: list[float] = []
    done = recover(
        build("mlp", seed=1),
        build("mlp", seed=2),
        data,
        epochs=2,
        batch=15,  # of which two processes take 8 and 7
        progress=lambda _, loss: losses.append(loss),
    )
    values = [value.double().sum().item() for value in done.network.module.state_dict().values()]
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump({"losses": losses, "weights": values}, file)


if __name__ == "__main__":
    main()
