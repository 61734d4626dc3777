"""Linearize: activation functions leave, and layers that become neighbours are merged."""

from dataclasses import replace
from typing import Any

from tinier.errors import InputError
from tinier.methods.activation_removal import ActivationRemoval
from tinier.network import Example
from tinier.statistics.lines import fit_lines
from tinier.verbs.calibration import batches_of, calibration, few
from tinier.verbs.smaller import Smaller, network_of, since


def linearize(
    model: Any,
    example: Example | None = None,
    data: Any = None,
    *,
    keep: float = 0.75,
    count: int | None = None,
    score: str = "output",
    merge: bool = True,
) -> Smaller:
    """Replace the activation functions that matter least by straight lines, and merge layers that become neighbours.

    Args:
        model: an ``nn.Module``, a path, or what another step gave; never changed.
        example: example inputs; None where the model brings its own.
        data: a few hundred examples that lines are fitted to; labels are not used.
        keep: share of the activation functions that stay, in [0, 1].
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
    notes = straight.notes
    if not any(edit.kind == "merge" for edit in plan.edits):
        notes = (*notes, "no layers were merged: lines alone save no MACs")
    original, plan = since(model, network, plan)
    return Smaller(straight, original, plan, notes=notes)
