"""Recovery: train a smaller network until it answers like the original again."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from tinier.data.base import Examples
from tinier.data.check import class_axis
from tinier.errors import InputError
from tinier.network import Network
from tinier.recovery.base import Loss, Penalty
from tinier.recovery.batches import Augment
from tinier.recovery.inside import AnyLoss
from tinier.recovery.output_mse import OutputMSE
from tinier.recovery.settings import Recovered, Settings
from tinier.recovery.soft_targets import SoftTargets
from tinier.recovery.training import EachStep, Run


def recover(
    student: Network,
    teacher: Network,
    train: Examples,
    *,
    losses: Sequence[AnyLoss] | None = None,
    pairs: Mapping[str, str] | None = None,
    penalties: Sequence[Penalty] = (),
    valid: Examples | None = None,
    seconds: float | None = None,
    epochs: float | None = None,
    batch: int = 64,
    accumulate: int = 1,
    lr: float | None = None,
    seed: int = 0,
    precision: str = "float32",
    recompute: bool = False,
    ema: float | None = None,
    patience: int | None = None,
    checkpoint: Path | None = None,
    every: float = 60.0,
    device: str | torch.device | None = None,
    augment: Augment | None = None,
    each_step: EachStep | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> Recovered:
    """Train a copy of ``student`` to answer like ``teacher``.

    Networks with batch norms, whose gradients those keep in scale, learn by SGD with Nesterov momentum, all others and traced
    graphs by AdamW, both without weight decay. The learning rate rises linearly for the first twentieth and falls to zero as a cosine,
    over the steps or over the time, so that it always ends at zero. The student runs in evaluation mode, apart from its
    batch norms: dropout would only add noise to what is matched. Traced graphs keep the statistics of their batch norms.

    Several processes, as ``accelerate launch`` or ``torchrun`` start them, compute the gradients of their shares of a batch and take the
    means; each one's batch norms see its share, and their statistics are averaged.

    Args:
        student: the network to train; left as it is.
        teacher: the original, with the same inputs and outputs.
        train: the data; labels are needed by losses of labels only.
        losses: their sum is minimized; None for soft targets where the first output has an axis of classes, else the output error.
        pairs: student's place → teacher's, whose features are compared by losses of those; None for those that `pair_layers` finds.
        penalties: what pulls weights to zero meanwhile. Their gradients are added to those of the losses after these were clipped,
            so that their strengths mean what they say.
        valid: examples that are not trained on: after each epoch the loss on them is computed, and the weights with the smallest are taken.
        seconds: most time to take, above 0.
        epochs: most passes over the data, above 0; alone, the result is the same at every run.
        batch: examples in a step, of all processes together.
        accumulate: parts that a step is computed in, one after the other; batch norms see a part.
        lr: the highest learning rate; None for 0.05 with SGD and 0.002 with AdamW.
        seed: of the order of the examples and of ``augment``.
        precision: in which products are computed: "float32", "bfloat16" or "float16" (with a scale of the loss that adapts).
        recompute: compute the activations of blocks again for the backward pass instead of keeping them.
        ema: decay of the moving average of the weights, in (0, 1), which is the result then; None for the last weights.
        patience: epochs without a smaller loss on ``valid`` after which training ends.
        checkpoint: folder in which the state is kept, from which the same call goes on: bit for bit, where ``epochs`` alone ends it.
        every: seconds between two states.
        device: where to compute; None for the GPU that accelerate finds, or the CPU. Not yet run on a GPU.
        augment: makes other inputs of a batch's inputs, drawing from the generator; student and teacher see the same ones.
        each_step: called before each step with the module that is trained and the part done.
        progress: called after each step with the part done, in [0, 1], and the loss.

    Returns:
        The trained copy, on the CPU. When the loss is not finite any more, the last good weights, and ``stopped`` names loss and step.

    Raises:
        InputError: neither ``seconds`` nor ``epochs``, a number out of its range, or a checkpoint of another training.
        DataError: no examples, or no labels for a loss that needs them.
        ModelError: nothing in the student can be trained, or its outputs are not the teacher's.
        OutputError: the checkpoint cannot be written.

    Cost:
        A step is a forward and a backward pass of the student on ``batch`` examples and, in the first epoch or with
        ``augment``, a forward pass of the teacher. Memory: the optimizer's one or two and one more copy of the weights (one more each for
        ``ema`` and ``valid``), the activations of a batch, and at most 256 MB for the teacher's answers.
    """
    settings = Settings(
        seconds=seconds,
        epochs=epochs,
        batch=batch,
        accumulate=accumulate,
        lr=lr,
        seed=seed,
        precision=precision,
        recompute=recompute,
        ema=ema,
        patience=patience,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        every=every,
        device=device,
    )
    losses = default_losses(teacher, train) if losses is None else losses
    settings.check(student, train, losses, valid)
    if settings.checkpoint is not None and penalties:
        raise InputError("checkpoint: what penalties count is not kept in it; leave it out")
    run = Run(student, teacher, train, tuple(losses), valid, settings, augment, each_step, pairs)
    return run.trained(student, penalties, progress)


def default_losses(teacher: Network, train: Examples) -> tuple[Loss, ...]:
    """Soft targets over the axis of classes of the first output; the output error where it has none (one logit, plain values)."""
    if not len(train):
        return (SoftTargets(),)
    inputs, _ = (
        next(train.subset([0]).batches(1)) if teacher.traced.batched else (teacher.example, None)
    )
    axis = class_axis(teacher(inputs)[0].shape)
    return (OutputMSE(),) if axis is None else (SoftTargets(dim=axis),)
