"""The order in which a training sees its examples: a function of the seed and the step, so that it can go on anywhere."""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tinier.data.base import Examples

Inputs = dict[str, Tensor]
Augment = Callable[[Inputs, torch.Generator], Inputs]


def batches_of(
    train: Examples, size: int, seed: int, augment: Augment | None = None, start: int = 0
) -> Iterator[tuple[Tensor, Inputs, Tensor | None]]:
    """Whole batches without end, each epoch in another order: which examples, inputs, labels.

    Args:
        train: at least ``size`` examples.
        size: of a batch.
        seed: with the number of the epoch or the step, of the order and of what is drawn.
        augment: makes other inputs of a batch's.
        start: how many batches are passed over.
    """
    per_epoch = len(train) // size
    step = start
    while True:
        epoch, inside = divmod(step, per_epoch)
        order = torch.randperm(len(train), generator=_generator(seed, "order", epoch))
        order = order[inside * size : per_epoch * size]
        parts = train.subset(order.tolist()).batches(size)
        for index, (inputs, labels) in zip(order.split(size), parts, strict=True):
            if augment is not None:
                inputs = augment(inputs, _generator(seed, "step", step))
            yield index, inputs, labels
            step += 1


def _generator(seed: int, what: str, number: int) -> torch.Generator:
    """Numbers that depend on nothing but these, so that a training can go on anywhere."""
    digest = hashlib.sha256(f"{seed} {what} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))
