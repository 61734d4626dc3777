"""Quantize, recover, export: the steps after pruning."""

from pathlib import Path
from typing import Any

from tinier.edits.base import Plan
from tinier.errors import InputError
from tinier.measure.machine import machine
from tinier.methods.static_quantization import StaticQuantization
from tinier.network import Example
from tinier.recovery.loop import recover as train_student
from tinier.statistics import collect
from tinier.targets.base import Artifact, targets_for
from tinier.verbs.calibration import ended_early, training
from tinier.verbs.smaller import Smaller, network_of

BATCH = 64


def quantize(
    model: Any,
    example: Example | None = None,
    data: Any = None,
    *,
    ranges: str = "mse",
    bits: int = 8,
) -> Smaller:
    """Quantize weights and activations after training, with ranges taken from data.

    Args:
        model: an ``nn.Module``, a path, or what ``prune`` or ``recover`` gave.
        example: example inputs; None where the model brings its own.
        data: a few hundred examples of real inputs; labels are not used.
        ranges: "minmax" or "mse".
        bits: of weights and activations.
    """
    if data is None:
        raise InputError("quantize needs data: a few hundred examples that ranges are taken from")
    network = network_of(model, example, data)
    examples = training(data, network)
    batches = (inputs for inputs, _ in examples.batches(BATCH))
    method = StaticQuantization(ranges=ranges, bits=bits, saturation_free=not machine().vnni)
    plan = method.plan(network, collect(network, batches))
    before = model.plan if isinstance(model, Smaller) else Plan()
    original = model.original if isinstance(model, Smaller) else network
    return Smaller(plan.apply(network), original, before + plan, network)


def recover(
    pruned: Smaller,
    data: Any,
    *,
    seconds: float | None = None,
    epochs: float | None = None,
    seed: int = 0,
) -> Smaller:
    """Give quality back to a pruned network by distillation from its original.

    Args:
        pruned: what ``prune`` gave.
        data: training examples; labels are not used.
        seconds: time to train, or
        epochs: passes over the data.
        seed: of the order of the examples.
    """
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
