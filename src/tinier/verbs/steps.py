"""Recover and export: the steps after pruning and quantization."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinier.edits.quantize import QuantizeDynamically
from tinier.errors import InputError
from tinier.network import Example
from tinier.output import check_files, whole_files
from tinier.recovery.choose import as_losses
from tinier.recovery.inside import AnyLoss
from tinier.recovery.loop import recover as train_student
from tinier.targets.base import Artifact, targets_for
from tinier.targets.base import is_quantized as computes_rounded
from tinier.verbs.calibration import ended_early, trained_on
from tinier.verbs.disk import OURS
from tinier.verbs.gate import lowered, takers
from tinier.verbs.quantization_aware import is_quantized, train_quantized
from tinier.verbs.smaller import Smaller, examples_of, network_of

EXPORTED = OURS | {"model.null.json", "model.null.bin"}


def recover(
    pruned: Smaller,
    data: Any = None,
    *,
    losses: AnyLoss | str | Sequence[AnyLoss | str] | None = None,
    pairs: Mapping[str, str] | None = None,
    valid: Any = None,
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
    checkpoint: str | Path | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> Smaller:
    """Give quality back to a pruned, factorized or quantized network by distillation from its original.

    A quantized network is trained quantization-aware: its weights, biases and steps learn while it computes with rounded values, and what
    comes back is quantized with them.

    Args:
        pruned: what another step, as ``prune`` or ``quantize``, gave.
        data: training examples; labels are used by losses of labels alone. None where there are none: inputs are made up from what the
            original's batch norms remember, which is far from real data.
        losses: as of ``distill``; None for the original's own answers.
        pairs: student's place → teacher's, a module's name each, for losses of features; None to find them (printed by ``pair_layers``).
        valid: examples that are not trained on, for the choice of the best epoch.
        seconds: time to train, or
        epochs: passes over the data.
        batch: examples in a step.
        accumulate: parts that a step is computed in, for memory.
        lr: the highest learning rate; None for the training loop's own, and 0.005 for quantized networks.
        seed: of the order of the examples.
        precision: of products: "float32", "bfloat16" or "float16".
        recompute: whether the activations of blocks are computed again instead of kept, for memory.
        ema: decay of the average of the weights that is the result, such as 0.999; None for the last weights.
        patience: epochs without a smaller loss on ``valid`` after which training ends.
        checkpoint: folder in which the state is kept, from which the same call goes on when it was killed.
        progress: called after each step with the part done, in [0, 1], and the loss.

    Raises:
        InputError: an argument is out of its range, or the network rounds dynamically.
        DataError: the data cannot be trained on, or a loss needs labels that they have not.
    """
    if any(isinstance(edit, QuantizeDynamically) for edit in pruned.plan.edits):
        raise InputError(
            "recover: activations that are rounded in the range of each run have no gradient; quantize with activations=8 or None to train"
        )
    chosen = None if losses is None else as_losses(losses)
    quantized = is_quantized(pruned)
    runs_on = pruned.original if quantized else pruned.network
    examples, made_up = trained_on(data, runs_on, pruned.original, chosen, seed)
    training_of: dict[str, Any] = {
        "losses": chosen,
        "pairs": pairs,
        "valid": None if valid is None else examples_of(valid, pruned.original),
        "seconds": seconds,
        "epochs": epochs,
        "batch": batch,
        "accumulate": accumulate,
        "lr": lr,
        "seed": seed,
        "precision": precision,
        "recompute": recompute,
        "ema": ema,
        "patience": patience,
        "checkpoint": None if checkpoint is None else Path(checkpoint),
        "progress": progress,
    }
    if quantized:
        trained = train_quantized(pruned, examples, training_of)
        return replace(trained, notes=(*trained.notes, *made_up))
    done = train_student(pruned.network, pruned.original, examples, **training_of)
    note = f"recovered for {done.epochs:.2g} epochs in {done.seconds:.0f} s"
    notes = (*pruned.notes, note, *made_up, *ended_early(done))
    return Smaller(done.network, pruned.original, pruned.plan, notes=notes)


def export(
    model: Any, folder: str | Path, *, example: Example | None = None, target: str = "onnxruntime"
) -> Artifact:
    """Write a network for a runtime.

    A quantized network is run there, at batch 1 and 16, and written if it computes what its simulation does.

    Args:
        model: an ``nn.Module``, a path, or what ``prune``, ``quantize`` or ``recover`` gave.
        folder: one to make, an empty one, or one that tinier wrote, whose other files stay.
        example: example inputs; None where the model brings its own.
        target: name of the runtime.

    Raises:
        InputError: the runtime is unknown or cannot take the network.
        OutputError: the folder has files of somebody else, or cannot be written.
        ParityError: the artifact computes something else; nothing is written.
        RefusedError: the runtime cannot take the network.
    """
    runtimes = targets_for(target)
    if len(runtimes) != 1:
        names = ", ".join(runtime.name for runtime in runtimes)
        raise InputError(f"target={target!r}: export writes for one runtime; name one of {names}")
    path = check_files(folder, lambda found: {p.name for p in found.iterdir()} <= EXPORTED)
    network = network_of(model, example)
    (runtime,) = takers(target, network)
    with whole_files(path) as made:
        if computes_rounded(network):
            artifact, _ = lowered(runtime, network, made, network.example, threads=1)
        else:
            artifact = runtime.lower(network, made)
    return replace(artifact, files=tuple(path / file.name for file in artifact.files))
