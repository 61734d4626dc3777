"""Quantization-aware training: a quantized network learns to answer like the original, and stays what the runtime computes."""

from collections.abc import Mapping
from typing import Any

from tinier.data.base import Examples
from tinier.edits.base import Plan
from tinier.edits.fake_quantize import plan_of, repair_saturation, split, trainable
from tinier.edits.quantize import Quantize, QuantizeWeight
from tinier.edits.unfold import unfolded
from tinier.errors import RefusedError
from tinier.measure.machine import machine
from tinier.modules.fake_quantize import LearnSteps
from tinier.network import Network
from tinier.recovery.loop import recover
from tinier.verbs.calibration import ended_early
from tinier.verbs.smaller import Smaller

# Weights that are already trained, and steps whose logarithm is learned, take smaller steps than new ones.
LEARNING_RATE = 5e-3


def is_quantized(smaller: Smaller) -> bool:
    """Whether the last step was ``quantize``, so that there is a plan of integers to train."""
    return smaller.trainable is not None and any(
        isinstance(edit, Quantize | QuantizeWeight) for edit in smaller.plan.edits
    )


def train_quantized(
    quantized: Smaller,
    examples: Examples,
    training: Mapping[str, Any],
) -> Smaller:
    """Train weights, biases and steps of a quantized network by distillation from its original.

    Args:
        quantized: what ``quantize`` gave.
        examples: training data.
        training: keywords of ``recovery.loop.recover``.

    Returns:
        The network quantized with the trained weights, and its plan; ``trainable`` is the trained float network, of the user's class where
        that has a place for every weight, else its folded graph.

    Cost:
        As ``recovery.loop.recover``, and about half as much again for the quantizers.
    """
    assert quantized.trainable is not None
    edits = quantized.plan.edits
    first = next(number for number, edit in enumerate(edits) if edit.of_artifact)
    earlier, own = Plan(edits[:first]), Plan(edits[first:])
    student = trainable(quantized.trainable, own)
    done = recover(
        student,
        quantized.original,
        examples,
        **{**training, "lr": training["lr"] or LEARNING_RATE},
        each_step=LearnSteps(),
    )
    notes = list(ended_early(done))
    static = any(isinstance(edit, Quantize) for edit in own.edits)
    if static and not machine().vnni:
        notes += repair_saturation(done.network, own)
    plan = plan_of(done.network, own)
    parent, said = _parent(quantized.trainable, plan)
    note = f"trained quantized for {done.epochs:.2g} epochs in {done.seconds:.0f} s"
    return Smaller(
        plan.apply(quantized.trainable),
        quantized.original,
        earlier + plan,
        parent,
        (*quantized.notes, note, *said, *notes),
    )


def _parent(network: Network, plan: Plan) -> tuple[Network, tuple[str, ...]]:
    """The float network with the weights that were trained."""
    folded = split(plan)[0].apply(network)
    try:
        return unfolded(network, folded), ()
    except RefusedError as error:
        note = (
            f"the trained float network is a graph with its norms folded, not of its class: {error}"
        )
        return folded, (note,)
