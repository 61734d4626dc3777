"""Recover and export: the steps after pruning and quantization."""

from pathlib import Path
from typing import Any

from tinier.edits.quantize import QuantizeDynamically
from tinier.errors import InputError
from tinier.network import Example
from tinier.recovery.loop import recover as train_student
from tinier.targets.base import Artifact, targets_for
from tinier.verbs.calibration import ended_early, training
from tinier.verbs.quantization_aware import is_quantized, train_quantized
from tinier.verbs.smaller import Smaller, network_of


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

    Args:
        model: an ``nn.Module``, a path, or what ``prune``, ``quantize`` or ``recover`` gave.
        folder: an existing folder, or one to make.
        example: example inputs; None where the model brings its own.
        target: name of the runtime.

    Raises:
        RefusedError: the runtime cannot take the network.
    """
    network = network_of(model, example)
    one = targets_for(target)[0]
    refusal = one.refuses(network)
    if refusal:
        raise InputError(f"{target} cannot take the network: {refusal}")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    return one.lower(network, path)
