"""Recover and export: the steps after pruning and quantization."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tinier.edits.quantize import QuantizeDynamically
from tinier.errors import InputError
from tinier.network import Example
from tinier.output import check_files, whole_files
from tinier.recovery.loop import recover as train_student
from tinier.targets.base import Artifact, targets_for
from tinier.targets.base import is_quantized as quantized
from tinier.verbs.calibration import ended_early, training
from tinier.verbs.disk import OURS
from tinier.verbs.gate import lowered, takers
from tinier.verbs.quantization_aware import is_quantized, train_quantized
from tinier.verbs.smaller import Smaller, network_of

EXPORTED = OURS | {"model.null.json", "model.null.bin"}


def recover(
    pruned: Smaller,
    data: Any,
    *,
    seconds: float | None = None,
    epochs: float | None = None,
    seed: int = 0,
) -> Smaller:
    """Give quality back to a pruned or quantized network by distillation from its original.

    A quantized network is trained quantization-aware: its weights, biases and steps learn while it computes with rounded values, and what
    comes back is quantized with them.

    Args:
        pruned: what ``prune`` or ``quantize`` gave.
        data: training examples; labels are not used.
        seconds: time to train, or
        epochs: passes over the data.
        seed: of the order of the examples.
    """
    if any(isinstance(edit, QuantizeDynamically) for edit in pruned.plan.edits):
        raise InputError(
            "recover: activations that are rounded in the range of each run have no gradient; quantize with activations=8 or None to train"
        )
    if is_quantized(pruned):
        examples = training(data, pruned.original)
        return train_quantized(pruned, examples, seconds=seconds, epochs=epochs, seed=seed)
    examples = training(data, pruned.network)
    done = train_student(
        pruned.network, pruned.original, examples, seconds=seconds, epochs=epochs, seed=seed
    )
    note = f"recovered for {done.epochs:.2g} epochs in {done.seconds:.0f} s"
    notes = (*pruned.notes, note, *ended_early(done))
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
        if quantized(network):
            artifact, _ = lowered(runtime, network, made, network.example, threads=1)
        else:
            artifact = runtime.lower(network, made)
    return replace(artifact, files=tuple(path / file.name for file in artifact.files))
