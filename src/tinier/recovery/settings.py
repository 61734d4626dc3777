"""How a network is trained: the numbers, and what is wrong with them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tinier.data.base import Examples
from tinier.errors import DataError, InputError, ModelError
from tinier.network import Network
from tinier.recovery.base import FeatureLoss, Loss
from tinier.units import is_number

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARM_UP = 0.05  # part of the training in which the learning rate rises


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    Attributes:
        seconds: most time to take, above 0; None for no limit.
        epochs: most passes over the data, above 0; None for no limit.
        batch: examples in a step, of all processes and all its parts together.
        accumulate: parts that a step's batch is computed in, one after the other, for memory.
        lr: the highest learning rate; None for the optimizer's default.
        seed: of the order of the examples and of what is drawn.
        precision: in which products are computed: "float32", "bfloat16" or "float16". Weights and losses stay float32.
        recompute: compute the activations of blocks again for the backward pass, for memory.
        ema: decay of the average of the weights that is the result, in (0, 1); None for the last weights.
        patience: epochs without a smaller loss on the validation part after which training ends; None for never.
        checkpoint: folder of the state that a killed run goes on from; None for none.
        every: seconds between two states.
        device: where to compute; None for the one that accelerate finds.
    """

    seconds: float | None = None
    epochs: float | None = None
    batch: int = 64
    accumulate: int = 1
    lr: float | None = None
    seed: int = 0
    precision: str = "float32"
    recompute: bool = False
    ema: float | None = None
    patience: int | None = None
    checkpoint: Path | None = None
    every: float = 60.0
    device: str | torch.device | None = None

    def check(
        self,
        student: Network,
        train: Examples,
        losses: Sequence[Loss | FeatureLoss],
        valid: Examples | None,
    ) -> None:
        """Refuse before any work what cannot be.

        Raises:
            InputError: a number out of its range, no end, or arguments that do not go together.
            DataError: no examples, or no labels for a loss that needs them.
            ModelError: no parameter can be trained.
        """
        if self.seconds is None and self.epochs is None:
            raise InputError("recovery needs an end: give seconds, epochs or both")
        numbers = {
            "seconds": self.seconds,
            "epochs": self.epochs,
            "batch": self.batch,
            "accumulate": self.accumulate,
            "lr": self.lr,
            "patience": self.patience,
            "every": self.every,
        }
        for name, value in numbers.items():
            if value is not None and not (is_number(value) and 0 < value < math.inf):
                raise InputError(f"recovery: {name} is {value!r}; it must be above 0 and finite")
        if self.precision not in PRECISIONS:
            raise InputError(f"precision={self.precision!r}: {', '.join(PRECISIONS)} are known")
        if self.ema is not None and not (is_number(self.ema) and 0 < self.ema < 1):
            raise InputError(f"ema={self.ema!r}: a decay between 0 and 1 is needed, such as 0.999")
        if self.patience is not None and not (valid and len(valid)):
            raise InputError(
                "patience: early stopping looks at the loss on data that are not trained on; give valid, too"
            )
        if not losses:
            raise InputError("recovery needs a loss, such as SoftTargets()")
        if not len(train):
            raise DataError("recovery: there are no training examples")
        for loss in losses:
            for part, examples in (("training", train), ("validation", valid)):
                if loss.needs_labels and examples is not None and not examples.labelled:
                    raise DataError(
                        f"recovery: the loss {loss.name} needs labels, the {part} data have none"
                    )
        if not any(p.requires_grad for p in student.module.parameters()):
            raise ModelError(
                "recovery: no parameter of the student can be trained; call requires_grad_(True) on those to train"
            )


@dataclass(frozen=True)
class Recovered:
    """A trained network and how it got there.

    Attributes:
        network: the student's copy, trained.
        history: mean loss of each epoch, the last one possibly in part.
        epochs: passes over the data, with the fraction of the last.
        seconds: time taken, that of the runs it went on from included.
        stopped: why training ended before its time; empty when it did not.
        validation: loss on the validation part after each epoch; empty without one.
    """

    network: Network
    history: tuple[float, ...]
    epochs: float
    seconds: float
    stopped: str = ""
    validation: tuple[float, ...] = ()


def schedule(done: float) -> float:
    """Factor of the learning rate when a part ``done`` of the training is over: linear warm-up, then half a cosine."""
    if done < WARM_UP:
        return 0.05 + 0.95 * done / WARM_UP
    return (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2


def same_outputs(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> None:
    """Raise ModelError where the outputs have other shapes."""
    ours, theirs = ([tuple(output.shape) for output in outputs] for outputs in (student, teacher))
    if ours != theirs:
        raise ModelError(
            f"the student returns tensors of shapes {ours}, the teacher {theirs}; they must be the same"
        )


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
