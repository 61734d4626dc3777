"""Linearize: activation functions leave, and layers that become neighbours are merged."""

from dataclasses import replace
from typing import Any

from tinier.edits.base import Plan
from tinier.edits.linearize import Linearize
from tinier.errors import InputError
from tinier.methods.activation_removal import ActivationRemoval
from tinier.network import Example, Network
from tinier.statistics.base import Statistics
from tinier.statistics.lines import fit_lines
from tinier.verbs.calibration import batches_of, calibration, few
from tinier.verbs.smaller import Smaller, network_of, since


def linearize(
    model: Any,
    example: Example | None = None,
    data: Any = None,
    *,
    keep: float | None = None,
    count: int | None = None,
    score: str = "output",
    merge: bool = True,
) -> Smaller:
    """Replace the activation functions that matter least by straight lines, and merge layers that become neighbours.

    Args:
        model: an ``nn.Module``, a path, or what another step gave; never changed.
        example: example inputs; None where the model brings its own.
        data: a few hundred examples that lines are fitted to; labels are not used.
        keep: share of the activation functions that stay, in [0, 1]. Unless this or ``count`` is given, at most a quarter leaves, and
            only such as two layers become one of fewer MACs without; where there are none, the network stays as it is.
        count: how many leave instead.
        score: "output" measures what each line changes at the end; "fit" is how straight the function is on the data.
        merge: whether two layers become one where that takes fewer MACs.

    Raises:
        InputError: there is no data, or an argument is out of its range.
        RefusedError: there are fewer activation functions than asked for.

    Cost:
        A pass over the data; with "output" a run on 64 examples for each function that is left, for each that leaves.
    """
    if data is None:
        raise InputError("linearize needs data: a few hundred examples that lines are fitted to")
    network = network_of(model, example, data)
    examples = calibration(data, network)
    batches = batches_of(examples, network)
    statistics = replace(few(examples, network), lines=fit_lines(network, batches))
    method = ActivationRemoval(keep=keep, count=count, score=score, merge=merge)
    plan = method.plan(network, statistics)
    straight = plan.apply(network)
    notes = (*straight.notes, *_gain(network, plan, statistics, method))
    original, plan = since(model, network, plan)
    return Smaller(straight, original, plan, notes=notes)


def _gain(
    network: Network, plan: Plan, statistics: Statistics, method: ActivationRemoval
) -> tuple[str, ...]:
    """What was gained, and how well a line replaces each activation function on the data."""
    gone = [edit.activation for edit in plan.edits if isinstance(edit, Linearize)]
    merged = sum(edit.kind == "merge" for edit in plan.edits)
    errors = sorted((fit.error, name) for name, fit in statistics.lines.items())
    fits = "what a line leaves of the variance (1 − R²): " + ", ".join(
        f"{name} {error:.2g}{'' if name in gone else ' (stays)'}" for error, name in errors
    )
    if not errors:
        return ("there are no activation functions",)
    if not gone and not method.asked:
        return (
            "nothing leaves: no activation function stands alone between two layers that would take fewer MACs as one; "
            "keep= or count= ask for lines all the same",
            fits,
        )
    gain = f"{len(gone)} of {len(errors)} activation functions left, {merged} pair{'s' * (merged != 1)} of layers became one"
    if gone and not merged:
        gain += ": lines alone save no MACs"
    return (gain, fits)
