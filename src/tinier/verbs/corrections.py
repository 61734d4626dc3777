"""Corrections around quantization: which there are, and the folded network and plan with those that were asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tinier.edits.assign import Fold
from tinier.edits.base import Plan
from tinier.edits.outliers import SplitOutliers
from tinier.errors import InputError
from tinier.methods import batch_norm_reestimation as reestimation
from tinier.methods.bias_correction import BiasCorrection, correct_biases_noted, enough
from tinier.methods.cross_layer_equalization import CrossLayerEqualization
from tinier.methods.outlier_channels import OutlierChannels
from tinier.methods.quantization import Quantization
from tinier.methods.sampled import spread
from tinier.methods.smooth_quant import MOST, SmoothQuant
from tinier.network import Network
from tinier.statistics import Statistics

CORRECTIONS = (
    CrossLayerEqualization.name,
    SmoothQuant.name,
    OutlierChannels.name,
    reestimation.NAME,
    BiasCorrection.name,
)
NEED_DATA = frozenset(CORRECTIONS) - {CrossLayerEqualization.name}


def chosen(corrections: Sequence[str] | None, method: Quantization) -> tuple[str, ...]:
    """The corrections to make, in the order in which they are made.

    Args:
        corrections: names; None for what measured best: bias correction where activations are quantized, none for weights alone.
        method: the quantization.

    Raises:
        InputError: an unknown name, or smoothing of activations that stay float.
    """
    if corrections is None:
        return (BiasCorrection.name,) if method.activations is not None else ()
    names = (corrections,) if isinstance(corrections, str) else tuple(corrections)
    for name in names:
        if name not in CORRECTIONS:
            raise InputError(
                f"corrections: {name!r} is unknown; there are {', '.join(CORRECTIONS)}"
            )
    if SmoothQuant.name in names and method.activations is None:
        raise InputError(
            f"corrections: {SmoothQuant.name} is for activations that are quantized; they stay float here"
        )
    if OutlierChannels.name in names and method.activations is None and not method.dynamic:
        raise InputError(
            f"corrections: {OutlierChannels.name} is for activations that are rounded; they stay float here"
        )
    return tuple(name for name in CORRECTIONS if name in names)


@dataclass(frozen=True)
class Prepared:
    """A network before its quantization.

    Attributes:
        network: folded, with new weights.
        plan: what makes it of the original.
        kept: weights that must stay float.
        normed: weights that batch norms were folded into.
        notes: what there is to say.
    """

    network: Network
    plan: Plan
    kept: tuple[str, ...] = ()
    normed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def prepared(
    network: Network,
    names: Sequence[str],
    method: Quantization,
    batches: Sequence[dict[str, Tensor]],
) -> Prepared:
    """The folded network with equalized ranges and smoothed outliers.

    Args:
        network: the original; left as it is.
        names: from ``chosen``.
        method: the quantization that comes then.
        batches: inputs; needed for smoothing.
    """
    plan = Plan((Fold(),))
    folded = plan.apply(network)
    notes: tuple[str, ...] = ()
    if CrossLayerEqualization.name in names:
        edits = CrossLayerEqualization().plan(folded)
        if edits.edits:
            plan += edits
            folded = plan.apply(network)
        else:
            notes += ("no two layers follow each other so that their ranges can be made equal",)
    if SmoothQuant.name in names and method.activations is not None:
        rule = method.weight_rule if method.weight_rule != "importance" else "mse"
        smooth = SmoothQuant(
            bits=min(method.bits, 16),
            activations=method.activations,
            ranges=method.ranges if method.ranges != "importance" else "mse",
            weight_ranges=rule,
            per_tensor=method.per_tensor,
            symmetric_activations=method.symmetric_activations,
            exclude=tuple(n for n, _ in folded.module.named_parameters() if not method.bits_of(n)),
        )
        data = Statistics({}, 0, samples=tuple(spread(folded, batches, MOST)))
        edits, said = smooth.decide(folded, data)
        notes += said
        if edits.edits:
            plan += edits
            folded = plan.apply(network)
    kept: tuple[str, ...] = ()
    if OutlierChannels.name in names:
        split = _split(folded, method, batches)
        kept = tuple(n for e in split.edits if isinstance(e, SplitOutliers) for n in e.names)
        if split.edits:
            plan += split
            folded = plan.apply(network)
            what, value = zip(*(edit.row() for edit in split.edits), strict=True)
            pairs = "; ".join(f"{a}: {b}" for a, b in zip(what, value, strict=True))
            notes += (f"outliers split off: {pairs}",)
        else:
            notes += ("no channel is worth splitting off as an outlier",)
    return Prepared(folded, plan, kept, reestimation.normed(network), notes)


def _split(folded: Network, method: Quantization, batches: Sequence[dict[str, Tensor]]) -> Plan:
    rule = method.weight_ranges or method.ranges
    outliers = OutlierChannels(
        bits=min(method.bits, 16),
        activations=method.activations,
        per_token=method.per_token,
        symmetric_activations=method.symmetric_activations,
        ranges=method.ranges if method.ranges != "importance" else "mse",
        weight_ranges=rule if rule in ("minmax", "percentile") else "mse",
        per_tensor=method.per_tensor,
        exclude=tuple(n for n, _ in folded.module.named_parameters() if not method.bits_of(n)),
    )
    data = Statistics({}, 0, samples=tuple(spread(folded, batches, MOST)))
    return outliers.plan(folded, data)


def corrected(
    before: Prepared, plan: Plan, names: Sequence[str], batches: Sequence[dict[str, Tensor]]
) -> tuple[Plan, tuple[str, ...]]:
    """A quantization with its norms and biases put right, where that was asked for, and what there is to say.

    Args:
        before: the float network that ``plan`` is for.
        plan: the quantization.
        names: from ``chosen``.
        batches: inputs.
    """
    folded, notes = before.network, tuple[str, ...]()
    if reestimation.NAME in names:
        few = spread(folded, batches, reestimation.MOST)
        plan, notes = reestimation.reestimate_folded_norms(folded, plan, few, before.normed)
    if BiasCorrection.name in names:
        few = spread(folded, batches, enough(folded))
        plan, more = correct_biases_noted(folded, plan, few, aim=folded)
        notes += more
    return plan, notes
