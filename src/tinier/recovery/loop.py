"""Recovery: train a smaller network until it answers like the original again."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tinier.data.base import Examples
from tinier.data.check import class_axis
from tinier.errors import DataError, InputError, ModelError
from tinier.graph import trace as tracing
from tinier.modules.masked import plain_name
from tinier.network import Network
from tinier.recovery.base import Loss, Penalty
from tinier.recovery.output_mse import OutputMSE
from tinier.recovery.pulls import step_size
from tinier.recovery.soft_targets import SoftTargets
from tinier.units import is_number

Inputs = dict[str, Tensor]
Augment = Callable[[Inputs, torch.Generator], Inputs]
EachStep = Callable[[nn.Module, float], None]

# The teacher's answers are kept and not computed again where they take less than this.
CACHE_BYTES = 256 * 2**20
SGD_LR = 0.05
ADAM_LR = 2e-3
WARM_UP = 0.05  # part of the training in which the learning rate rises
MOST_GRADIENT = 1.0  # norm to which larger gradients are cut
SNAPSHOT_STEPS = 50  # distance of the weights that are gone back to when training diverges
# Below this loss the student is the teacher, to the rounding of float32; Adam would follow the rounding errors.
EQUAL = 1e-7


@dataclass(frozen=True)
class Recovered:
    """A trained network and how it got there.

    Attributes:
        network: the student's copy, trained.
        history: mean loss of each epoch, the last one possibly in part.
        epochs: passes over the data, with the fraction of the last.
        seconds: time taken.
        stopped: why training ended before its time; empty when it did not.
    """

    network: Network
    history: tuple[float, ...]
    epochs: float
    seconds: float
    stopped: str = ""


def recover(
    student: Network,
    teacher: Network,
    train: Examples,
    *,
    losses: Sequence[Loss] | None = None,
    penalties: Sequence[Penalty] = (),
    seconds: float | None = None,
    epochs: float | None = None,
    batch: int = 64,
    lr: float | None = None,
    seed: int = 0,
    augment: Augment | None = None,
    each_step: EachStep | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> Recovered:
    """Train a copy of ``student`` to answer like ``teacher``.

    Networks with batch norms, whose gradients those keep in scale, learn by SGD with Nesterov momentum, all others and traced
    graphs by AdamW, both without weight decay. The learning rate rises linearly for the first twentieth and falls to zero as a cosine,
    over the steps or over the time, so that it always ends at zero. The student runs in evaluation mode, apart from its
    batch norms: dropout would only add noise to what is matched. Traced graphs keep the statistics of their batch norms.

    Args:
        student: the network to train; left as it is.
        teacher: the original, with the same inputs and outputs.
        train: the data; labels are needed by losses of labels only.
        losses: their sum is minimized; None for soft targets where the first output has an axis of classes, else the output error.
        penalties: what pulls weights to zero meanwhile. Their gradients are added to those of the losses after these were clipped,
            so that their strengths mean what they say.
        seconds: most time to take, above 0.
        epochs: most passes over the data, above 0; alone, the result is the same at every run.
        batch: examples in a step.
        lr: the highest learning rate; None for 0.05 with SGD and 0.002 with AdamW.
        seed: of the order of the examples and of ``augment``.
        augment: makes other inputs of a batch's inputs, drawing from the generator; student and teacher see the same ones.
        each_step: called before each step with the module that is trained and the part done.
        progress: called after each step with the part done, in [0, 1], and the loss.

    Returns:
        The trained copy. When the loss is not finite any more, the last good weights, and ``stopped`` says so.

    Raises:
        InputError: neither ``seconds`` nor ``epochs``, or one that is not above 0; a batch size or learning rate likewise.
        DataError: no examples, or no labels for a loss that needs them.
        ModelError: nothing in the student can be trained, or its outputs are not the teacher's.

    Cost:
        A step is a forward and a backward pass of the student on ``batch`` examples and, in the first epoch or with
        ``augment``, a forward pass of the teacher. Memory: the optimizer's one or two and one more copy of the weights, the activations of
        a batch, and at most 256 MB for the teacher's answers.
    """
    losses = default_losses(teacher, train) if losses is None else losses
    _check(student, train, losses, seconds, epochs, batch, lr)
    started = time.monotonic()
    network = student.copy()
    module = network.module
    batch = min(batch, len(train))
    # Whole batches only: batch norms cannot learn from the single example that may be left over.
    per_epoch = len(train) // batch
    total = math.inf if epochs is None else max(1, round(epochs * per_epoch))
    limit = math.inf if seconds is None else seconds
    teach = _Teacher(teacher, len(train), remember=augment is None)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = _optimizer(module, parameters, lr)
    lr = optimizer.param_groups[0]["lr"]
    batches = _batches(train, batch, seed, augment)
    steps, stopped, history = 0, "", [0.0]

    with torch.random.fork_rng(devices=[]), tracing.evaluating(module):
        torch.manual_seed(seed)
        if not penalties and _equal(network, teacher, train, losses, batch):
            return Recovered(network, (0.0,), 0.0, time.monotonic() - started)
        layout = _layout(module, train, batch)
        if batch > 1:
            for part in module.modules():
                if isinstance(part, _BatchNorm):
                    part.train()
        named = {plain_name(n): p for n, p in module.named_parameters(remove_duplicate=False)}
        trained = {name: p for name, p in named.items() if p.requires_grad}
        pulls = [penalty.on(student, trained) for penalty in penalties]
        good = _snapshot(module)
        while (done := max(steps / total, (time.monotonic() - started) / limit)) < 1:
            index, inputs, labels = next(batches)
            if each_step is not None:
                each_step(module, done)
            optimizer.param_groups[0]["lr"] = lr * schedule(done)
            targets = teach(index, inputs, first=steps < per_epoch)
            outputs = tracing.call(module, _as(inputs, layout))
            if steps == 0:
                _same_outputs(outputs, targets)
            loss = torch.stack([part(outputs, targets, labels) for part in losses]).sum()
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, MOST_GRADIENT)
            value = loss.item()
            for pull in pulls:
                if (extra := pull.loss(done)) is not None:
                    extra.backward()
                    value += extra.item()
            if not math.isfinite(value) or not math.isfinite(norm.item()):
                stopped = _diverged(value, steps, lr)
                break
            if steps % SNAPSHOT_STEPS == 0:
                good = _snapshot(module)
            optimizer.step()
            for pull in pulls:
                pull.after_step(step_size(optimizer))
            if steps and steps % per_epoch == 0:
                history.append(0.0)
            history[-1] += (value - history[-1]) / (steps % per_epoch + 1)
            steps += 1
            if steps % per_epoch == 0:
                for pull in pulls:
                    pull.after_epoch(max(steps / total, (time.monotonic() - started) / limit))
            if progress is not None:
                progress(min(1.0, max(steps / total, (time.monotonic() - started) / limit)), value)
        if not stopped and not all(value.isfinite().all() for value in _snapshot(module).values()):
            stopped = _diverged(math.nan, steps, lr)
        if stopped:
            module.load_state_dict(good)
        for pull in pulls:
            pull.finish()
        module.zero_grad(set_to_none=True)
        _store(module, torch.contiguous_format)
    took = time.monotonic() - started
    return Recovered(network, tuple(history), steps / per_epoch, took, stopped)


def schedule(done: float) -> float:
    """Factor of the learning rate when a part ``done`` of the training is over: linear warm-up, then half a cosine."""
    if done < WARM_UP:
        return 0.05 + 0.95 * done / WARM_UP
    return (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2


def _optimizer(
    module: nn.Module, parameters: list[nn.Parameter], lr: float | None
) -> torch.optim.Optimizer:
    if any(isinstance(part, _BatchNorm) for part in module.modules()):
        return torch.optim.SGD(parameters, lr or SGD_LR, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(parameters, lr or ADAM_LR, eps=1e-7, weight_decay=0.0)


class _Teacher:
    """The original's answers, kept from the first epoch on where inputs repeat and the answers are small."""

    def __init__(self, network: Network, examples: int, remember: bool) -> None:
        self.network = network
        self.examples = examples
        self.remember = remember
        self.kept: list[Tensor] = []  # of each output (examples, …)

    def __call__(self, index: Tensor, inputs: Inputs, first: bool) -> tuple[Tensor, ...]:
        # The examples that the first epoch leaves out, less than a batch, are marked by NaN.
        if self.kept and not first:
            answers = tuple(output[index] for output in self.kept)
            if not any(answer.isnan().any() for answer in answers):
                return answers
        answers = self.network(inputs)
        if self.remember and not self.kept:
            size = sum(answer.nbytes for answer in answers) // len(index) * self.examples
            self.remember = size <= CACHE_BYTES and all(
                answer.is_floating_point() and len(answer) == len(index) for answer in answers
            )
            if self.remember:
                self.kept = [
                    answer.new_full((self.examples, *answer.shape[1:]), math.nan)
                    for answer in answers
                ]
        for output, answer in zip(self.kept, answers, strict=False):
            output[index] = answer
        return answers


def _batches(
    train: Examples, size: int, seed: int, augment: Augment | None
) -> Iterator[tuple[Tensor, Inputs, Tensor | None]]:
    """Whole batches without end, each epoch in another order: which examples, inputs, labels."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(train), generator=generator)[: len(train) // size * size]
        epoch = train.subset(order.tolist()).batches(size)
        for index, (inputs, labels) in zip(order.split(size), epoch, strict=True):
            yield index, augment(inputs, generator) if augment else inputs, labels


def default_losses(teacher: Network, train: Examples) -> tuple[Loss, ...]:
    """Soft targets over the axis of classes of the first output; the output error where it has none (one logit, plain values)."""
    if not len(train):
        return (SoftTargets(),)
    inputs, _ = (
        next(train.subset([0]).batches(1)) if teacher.traced.batched else (teacher.example, None)
    )
    axis = class_axis(teacher(inputs)[0].shape)
    return (OutputMSE(),) if axis is None else (SoftTargets(dim=axis),)


def _equal(
    student: Network, teacher: Network, train: Examples, losses: Sequence[Loss], batch: int
) -> bool:
    """Whether there is nothing to recover: no loss on the first batches, in evaluation mode."""
    few = train.subset(range(min(len(train), 4 * batch)))
    for inputs, labels in few.batches(batch):
        outputs, targets = student(inputs), teacher(inputs)
        _same_outputs(outputs, targets)
        if not all(abs(loss(outputs, targets, labels).item()) <= EQUAL for loss in losses):
            return False
    return True


def _layout(module: nn.Module, train: Examples, batch: int) -> torch.memory_format:
    """Channels last for networks of images, where they accept it: convolutions are faster in it."""
    inputs, _ = next(train.subset(range(min(2, batch))).batches(2))
    images = any(value.ndim == 4 for value in inputs.values())
    convolutions = any(p.ndim == 4 for p in module.parameters())
    if not (images and convolutions):
        return torch.contiguous_format
    try:
        _store(module, torch.channels_last)
        with torch.no_grad():
            tracing.call(module, _as(inputs, torch.channels_last))
    except RuntimeError:  # a `view` that only contiguous tensors allow
        _store(module, torch.contiguous_format)
        return torch.contiguous_format
    return torch.channels_last


def _store(module: nn.Module, layout: torch.memory_format) -> None:
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def _as(inputs: Inputs, layout: torch.memory_format) -> Inputs:
    if layout is torch.contiguous_format:
        return inputs
    return {
        name: value.contiguous(memory_format=layout) if value.ndim == 4 else value
        for name, value in inputs.items()
    }


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _diverged(loss: float, steps: int, lr: float) -> str:
    return (
        f"the loss became {loss} at step {steps + 1}; the last good weights were taken. "
        f"A learning rate below {lr:g} may help"
    )


def _same_outputs(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> None:
    ours, theirs = ([tuple(output.shape) for output in outputs] for outputs in (student, teacher))
    if ours != theirs:
        raise ModelError(
            f"the student returns tensors of shapes {ours}, the teacher {theirs}; they must be the same"
        )


def _check(
    student: Network,
    train: Examples,
    losses: Sequence[Loss],
    seconds: float | None,
    epochs: float | None,
    batch: int,
    lr: float | None,
) -> None:
    if seconds is None and epochs is None:
        raise InputError("recovery needs an end: give seconds, epochs or both")
    numbers = {"seconds": seconds, "epochs": epochs, "batch": batch, "lr": lr}
    for name, value in numbers.items():
        if value is not None and not (is_number(value) and 0 < value < math.inf):
            raise InputError(f"recovery: {name} is {value!r}; it must be above 0 and finite")
    if not losses:
        raise InputError("recovery needs a loss, such as SoftTargets()")
    if not len(train):
        raise DataError("recovery: there are no training examples")
    for loss in losses:
        if loss.needs_labels and not train.labelled:
            raise DataError(f"recovery: the loss {loss.name} needs labels, the data have none")
    if not any(p.requires_grad for p in student.module.parameters()):
        raise ModelError(
            "recovery: no parameter of the student can be trained; call requires_grad_(True) on those to train"
        )
