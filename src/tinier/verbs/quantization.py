"""Quantize: weights become integers, activations are rounded as the runtime does it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tinier.edits.assign import Fold
from tinier.edits.base import Plan
from tinier.edits.quantize import refuse_quantized
from tinier.errors import InputError
from tinier.measure.machine import machine
from tinier.methods.quantization import Quantization
from tinier.network import Example, Network
from tinier.statistics import Statistics, collect, observe
from tinier.verbs.calibration import batches_of, calibration
from tinier.verbs.smaller import Smaller, network_of, since


def quantize(
    model: Any,
    example: Example | None = None,
    data: Any = None,
    *,
    bits: int = 8,
    activations: int | None = 8,
    ranges: str = "mse",
    weight_ranges: str | None = None,
    group: int | None = None,
    symmetric: bool | None = None,
    rounding: str = "nearest",
    layers: Mapping[str, int] | None = None,
    exclude: Sequence[str] = (),
) -> Smaller:
    """Quantize weights and activations after training, with ranges taken from data.

    Args:
        model: an ``nn.Module``, a path, or what ``prune`` or ``recover`` gave; never changed.
        example: example inputs; None where the model brings its own.
        data: a few hundred examples of real inputs, of which at most 512 are used; labels are not. Not needed for weights alone, rounded
            to nearest or by "hqq".
        bits: of weights, 2 to 16; to 8 where activations stay float.
        activations: bits of activations; None stores weights as integers and computes in float.
        ranges: of activations, "minmax" or "mse".
        weight_ranges: of weights, "minmax", "percentile", "mse" or "importance"; None for what ``ranges`` is.
        group: inputs that share a scale, for weights alone; None for one scale a channel.
        symmetric: whether zero points of weights are 0; None for yes, but no below 8 bits where activations stay float.
        rounding: "nearest", "error_feedback" or "hqq".
        layers: module or parameter pattern → bits of its weights, 0 for float.
        exclude: patterns of modules or parameters that stay float.

    Returns:
        The quantized network; ``trainable`` is the float one, ``plan`` has every scale, ``notes`` what stayed float and why.

    Raises:
        InputError: an argument is out of its range, or data is missing.
        RefusedError: there is nothing to quantize, or it is quantized already.

    Cost:
        A run of the network over the data; with error feedback a second one and, for each layer, 8 · (inputs · kernel)² bytes.
    """
    if symmetric is None:
        symmetric = activations is not None or bits >= 8
    method = Quantization(
        bits=bits,
        activations=activations,
        ranges=ranges,
        weight_ranges=weight_ranges,
        group=group,
        symmetric=symmetric,
        rounding=rounding,
        layers=tuple((layers or {}).items()),
        exclude=(exclude,) if isinstance(exclude, str) else tuple(exclude),
        saturation_free=activations is not None and not machine().vnni,
    )
    if data is None and (activations is not None or method.needs):
        raise InputError("quantize needs data: a few hundred examples that ranges are taken from")
    network = network_of(model, example, data)
    network.need_values("quantize")
    refuse_quantized(network)
    fold = Plan((Fold(),))
    folded = fold.apply(network)
    statistics = None if data is None else _statistics(folded, method, data)
    plan, notes = method.decide(folded, statistics)
    result = plan.apply(folded)
    original, whole = since(model, network, fold + plan)
    return Smaller(result, original, whole, network, (*network.notes, *notes))


def _statistics(network: Network, method: Quantization, data: Any) -> Statistics:
    batches = batches_of(calibration(data, network), network)
    found = Statistics({}, 0) if method.activations is None else collect(network, batches)
    if method.needs:
        seen = observe(network, batches, method.needs)
        found = replace(seen, activations=found.activations)
    return found
