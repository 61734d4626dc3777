"""The loss whose gradients are observed: of the labels, or of answers drawn from the network itself."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.errors import DataError, InputError

IGNORED = -100  # label of a position that does not count, as torch has it
Loss = Callable[[tuple[Tensor, ...], Tensor | None], Tensor]


def summed_loss(
    outputs: tuple[Tensor, ...],
    labels: Tensor | None,
    examples: int,
    loss: Loss | None,
    generator: torch.Generator,
) -> Tensor:
    """The losses of all examples of a batch, added up.

    Args:
        outputs: of the network; dimension 0 is the batch.
        labels: class numbers or values, dimension 0 the batch; None for answers drawn from the network's own distribution: the gradients
            are then those of the true Fisher information.
        examples: size of the batch.
        loss: the user's own: (outputs, labels) → a scalar, the mean over the batch, or one value for each example; None for the
            one that fits.
        generator: what answers are drawn with.

    Returns:
        Scalar, differentiable.

    Raises:
        DataError: labels that fit no output.
        InputError: the user's loss gives something else than a scalar or one value for each example.
    """
    if loss is not None:
        value = loss(outputs, labels)
        if not isinstance(value, Tensor) or value.shape not in ((), (examples,)):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"loss: {got}; a scalar or one value for each of the {examples} examples is needed"
            )
        return value * examples if value.ndim == 0 else value.sum()
    if labels is None:
        return _drawn(outputs, generator)
    return _labelled(outputs, labels)


def _labelled(outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    if not labels.is_floating_point():
        for logits in outputs:
            for axis in _class_axes(logits):
                if logits.shape[:axis] + logits.shape[axis + 1 :] == labels.shape:
                    return _cross_entropy(logits.movedim(axis, -1), labels)
    for values in outputs:
        if values.is_floating_point() and values.numel() == labels.numel():
            wanted = labels.view(values.shape).to(values.dtype)
            if not labels.is_floating_point() and bool(((labels == 0) | (labels == 1)).all()):
                return F.binary_cross_entropy_with_logits(values, wanted, reduction="sum")
            return 0.5 * (values - wanted).square().sum()
    shapes = ", ".join(str(tuple(output.shape)) for output in outputs)
    raise DataError(
        f"labels of shape {tuple(labels.shape)} and type {labels.dtype} fit no output of the network ({shapes}): class numbers need an "
        "output with one more dimension, values one of the same shape; or pass loss=a function of (outputs, labels)"
    )


def _drawn(outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    floating = [output for output in outputs if output.is_floating_point()]
    if not floating:
        raise DataError("the network returns no floating-point output to take a loss of")
    axis = class_axis(floating[0].shape)
    if axis is not None:
        logits = floating[0].movedim(axis, -1)
        chances = logits.detach().float().softmax(-1).flatten(0, -2)
        classes = torch.multinomial(chances.cpu(), 1, generator=generator).to(logits.device)
        return _cross_entropy(logits, classes.view(logits.shape[:-1]))
    noise = torch.randn(floating[0].shape, generator=generator).to(floating[0])
    return 0.5 * (floating[0] - (floating[0].detach() + noise)).square().sum()


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Added up over the examples, a mean over the positions of each; the class −100 does not count."""
    wrong = ((classes < 0) & (classes != IGNORED)) | (classes >= logits.shape[-1])
    if bool(wrong.any()):
        value, count = int(classes[wrong][0]), logits.shape[-1]
        raise DataError(
            f"a label is {value}, but the network has {count} classes: labels are 0 to {count - 1}"
            + ("; do yours start at 1?" if value == count else "")
        )
    each = F.cross_entropy(
        logits.flatten(0, -2), classes.flatten().long(), reduction="none", ignore_index=IGNORED
    )
    each = each.view(len(classes), -1)
    counted = (classes.view(len(classes), -1) != IGNORED).sum(1).clamp(min=1)
    return (each.sum(1) / counted).sum()


def class_axis(shape: Sequence[int]) -> int | None:
    """(n, c): 1; (n, positions, c): the last; (n, c, height, width): 1; None for one value an example."""
    if len(shape) < 2 or (len(shape) == 2 and shape[1] == 1):
        return None
    return len(shape) - 1 if len(shape) == 3 else 1


def _class_axes(logits: Tensor) -> list[int]:
    """Where classes may be: as ``class_axis`` has it first."""
    first = class_axis(logits.shape)
    if first is None or not logits.is_floating_point():
        return []
    return list(dict.fromkeys([first, 1, logits.ndim - 1]))
