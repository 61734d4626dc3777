"""Distill: a student of any shape learns to answer like its teacher."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinier.edits.base import Plan
from tinier.errors import InputError
from tinier.modules.ensemble import Ensemble
from tinier.network import Example, Network
from tinier.recovery.choose import as_losses
from tinier.recovery.inside import AnyLoss
from tinier.recovery.loop import recover as train_student
from tinier.targets.base import is_quantized
from tinier.verbs.calibration import ended_early, trained_on
from tinier.verbs.smaller import Smaller, examples_of, network_of


def distill(
    student: Any,
    teacher: Any,
    data: Any = None,
    *,
    example: Example | None = None,
    losses: AnyLoss | str | Sequence[AnyLoss | str] | None = None,
    pairs: Mapping[str, str] | None = None,
    valid: Any = None,
    epochs: float | None = None,
    seconds: float | None = None,
    batch: int = 64,
    accumulate: int = 1,
    lr: float | None = None,
    seed: int = 0,
    precision: str = "float32",
    recompute: bool = False,
    ema: float | None = None,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> Smaller:
    """Train a student to answer like a teacher.

    Args:
        student: an ``nn.Module``, a path, or what another step gave; never changed: a copy is trained.
        teacher: likewise, with the same inputs and outputs, in evaluation mode. Of a list of several, the means of their outputs teach.
        data: training examples; labels are used by losses of labels alone. None where there are none: inputs are made up from what the
            teacher's batch norms remember, which is far from real data.
        example: example inputs; None where the models bring their own.
        losses: what is minimized, their sum: objects, or texts such as "soft_targets:temperature=2"; None for soft targets where the first
            output has an axis of classes, else for the error of the outputs.
        pairs: student's place → teacher's, a module's name each, for losses of features; None to find them (printed by ``pair_layers``).
        valid: examples that are not trained on, for the choice of the best epoch.
        epochs: passes over the data, or
        seconds: time to train.
        batch: examples in a step.
        accumulate: parts that a step is computed in, for memory.
        lr: the highest learning rate; None for 0.05 where there are batch norms (SGD), else 0.002 (AdamW).
        seed: of the order of the examples.
        precision: of products: "float32", "bfloat16" or "float16".
        recompute: whether the activations of blocks are computed again instead of kept, for memory.
        ema: decay of the average of the weights that is the result, such as 0.999; None for the last weights.
        patience: epochs without a smaller loss on ``valid`` after which training ends.
        checkpoint: folder in which the state is kept, from which the same call goes on when it was killed.
        progress: called after each step with the part done, in [0, 1], and the loss.

    Returns:
        The trained student. Its ``original`` is the teacher and its plan empty; of what another step gave, they are those of that step.

    Raises:
        InputError: student and teacher take other inputs, the student is quantized, or an argument is out of its range.
        DataError: the data cannot be trained on, or a loss needs labels that they have not.
        ModelError: the outputs have other shapes.

    Cost:
        For each example of each epoch a run of the student forward and backward and, in the first, one of the teacher.

    Source:
        Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network".
    """
    original = _taught_by(teacher, example, data)
    network = network_of(student, example if example is not None else original.example)
    if is_quantized(network):
        raise InputError(
            "the student is quantized: recover() trains what quantize() gave, towards its original"
        )
    chosen = None if losses is None else as_losses(losses)
    examples, made_up = trained_on(data, network, original, chosen, seed)
    held = None if valid is None else examples_of(valid, network)
    done = train_student(
        network,
        original,
        examples,
        losses=chosen,
        pairs=pairs,
        valid=held,
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
        progress=progress,
    )
    note = f"distilled for {done.epochs:.2g} epochs in {done.seconds:.0f} s, loss {done.history[-1]:.3g}"
    notes = (note, *made_up, *ended_early(done))
    if isinstance(student, Smaller):
        return Smaller(done.network, student.original, student.plan, notes=(*student.notes, *notes))
    return Smaller(done.network, original, Plan(), notes=notes)


def _taught_by(teacher: Any, example: Example | None, data: Any) -> Network:
    """The network of one teacher, or that of the means of several."""
    if not isinstance(teacher, list | tuple):
        return network_of(teacher, example, data)
    if not teacher:
        raise InputError("distill: the list of teachers is empty")
    networks = [network_of(one, example, data) for one in teacher]
    first = networks[0]
    others = [list(one.example) for one in networks if list(one.example) != list(first.example)]
    if others:
        raise InputError(
            f"distill: the teachers take other inputs: {', '.join(first.example)} and {', '.join(others[0])}"
        )
    module = Ensemble([one.module for one in networks])
    return Network(module, first.example, name=f"{len(networks)} teachers")
