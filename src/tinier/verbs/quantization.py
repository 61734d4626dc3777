"""Quantize: weights become integers, activations are rounded as the runtime does it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import psutil
from torch import Tensor

from tinier.edits.quantize import refuse_quantized
from tinier.errors import InputError
from tinier.measure.machine import machine
from tinier.methods.quantization import Quantization
from tinier.methods.weight_integers import ROUNDINGS
from tinier.network import Example, Network
from tinier.recovery.rounding import learn_rounding
from tinier.statistics import Statistics, collect, observe
from tinier.verbs.calibration import batches_of, calibration
from tinier.verbs.corrections import NEED_DATA, chosen, corrected, prepared
from tinier.verbs.mixture import Mixture, restored
from tinier.verbs.quantization_asked import check_together, container_notes, fitted, runtime_for
from tinier.verbs.smaller import Smaller, network_of, since

DYNAMIC = ("dynamic", "dynamic_per_token")
# Of each activation so many values are looked at: 200 lie outside of 99.99 % of them. The noise of a bin's count adds to a divergence.
VALUES, MORE = 2**21, 2**24
ROWS = (
    2**16
)  # that Gram matrices of convolutions are of, about: fifty times their largest number of columns
# How rounding is learned → whether in blocks.
LEARNED = {"learned": False, "learned_blocks": True}


def quantize(
    model: Any,
    example: Example | None = None,
    data: Any = None,
    *,
    bits: int | None = None,
    activations: int | str | None = 8,
    symmetric_activations: bool = False,
    ranges: str | None = None,
    weight_ranges: str | None = None,
    group: int | None = None,
    per_tensor: bool = False,
    symmetric: bool | None = None,
    rounding: str = "nearest",
    layers: Mapping[str, int] | None = None,
    exclude: Sequence[str] = (),
    corrections: Sequence[str] | None = None,
    restore: float | None = None,
    max_size: float | str | None = None,
    max_latency: float | str | None = None,
    choices: Sequence[int] | None = None,
    sensitivity: str = "kl",
    target: str | None = None,
    threads: int | None = None,
) -> Smaller:
    """Quantize weights and activations after training, with ranges taken from data.

    Args:
        model: an ``nn.Module``, a path, or what ``prune`` or ``recover`` gave; never changed.
        example: example inputs; None where the model brings its own.
        data: a few hundred examples of real inputs, of which at most 512 are used, and of each activation about two million values beside
            the smallest and the largest; labels are not. Not needed for weights alone, rounded
            to nearest or by "hqq".
        bits: of weights, 2 to 16; to 8 where activations stay float. None for 8, or those that ``max_size`` chooses.
        activations: bits of activations; None stores weights as integers and computes in float; "dynamic" rounds inputs of linear layers to
            8 bits in the range of each run, "dynamic_per_token" in that of each row of their last axis. Both need no data.
        symmetric_activations: zero points of activations are 0, for accelerators that have none.
        ranges: of activations, "minmax", "percentile", "moving_average", "mse", "importance" or "entropy"; None for "importance", or for
            "mse" where no output is a float.
        weight_ranges: of weights, "minmax", "percentile", "mse" or "importance"; None for what ``ranges`` is,
            where that is one of weights, too, else "mse".
        group: inputs that share a scale, for weights alone; None for one scale a channel.
        per_tensor: one scale for all channels of a weight, for hardware that has no scale a channel.
        symmetric: whether zero points of weights are 0; None for yes, but no for layers below 8 bits where activations stay float.
        rounding: "nearest", "error_feedback", "hqq", or learned on the data by gradient descent: "learned" layer by layer,
            "learned_blocks" all weights of a residual block together.
        layers: module or parameter pattern → bits of its weights, 0 for float.
        exclude: patterns of modules or parameters that stay float. A batch norm, here and in ``layers``, means the layer that it is folded
            into.
        corrections: any of "cross_layer_equalization", "smooth_quant", "outlier_channels", "batch_norm_reestimation" and "bias_correction";
            () for none. None for the last where activations are quantized, and none for weights alone.
        restore: share in (0, 1) of the output's error that may be left: layers stay float, those first that give back most for each weight.
        max_size: bytes, or a text such as "1MB", that the weights may take, packed without gaps; with ``target`` that its file may take,
            with all that is in it: each layer gets bits of its own, so that the outputs lose least.
        max_latency: milliseconds, or a text such as "5ms", on ``target`` instead: layers stay float where the time allows it.
        choices: bits that ``max_size`` chooses from, 0 for float; None for 2, 3, 4, 6 and 8, but 4 and 8 where activations are quantized.
        sensitivity: what is lost: "kl", "output" or "fisher".
        target: the runtime on whose profile layers stay float that are slower in integers on this machine, or with ``max_size`` whose file
            is to fit; None for no measuring.
        threads: of that runtime; all physical cores if None.

    Returns:
        The quantized network; ``trainable`` is the float one, ``plan`` has every scale, ``notes`` what stayed float and why.

    Raises:
        InputError: an argument is out of its range or contradicts another, a pattern or group fits no layer, the target does not take the
            bits, or data is missing. All of that is known before data is read.
        RefusedError: there is nothing to quantize, or it is quantized already.

    Cost:
        A run of the network over the data; for corrections about ten over 64 to 128 examples; with error feedback one more and, for each
        layer, 8 · (inputs · kernel)² bytes; with ranges by importance a run forth and back over 64
    """
    if rounding not in (*ROUNDINGS, *LEARNED):
        raise InputError(f"rounding={rounding!r}: {', '.join((*ROUNDINGS, *LEARNED))} are known")
    dynamic, per_token = activations in DYNAMIC, activations == DYNAMIC[1]
    if isinstance(activations, str) and not dynamic:
        known = " or ".join(f'"{name}"' for name in DYNAMIC)
        raise InputError(f"activations={activations!r}: bits, None, {known} are possible")
    check_together(
        {
            "bits": bits,
            "activations": activations,
            "rounding": rounding,
            "layers": layers,
            "exclude": exclude,
            "restore": restore,
            "max_size": max_size,
            "max_latency": max_latency,
            "sensitivity": sensitivity,
            "target": target,
            "threads": threads,
        }
    )
    rounded = None if isinstance(activations, str) else activations
    method = Quantization(
        bits=8 if bits is None else bits,
        activations=rounded,
        symmetric_activations=symmetric_activations,
        dynamic=dynamic,
        per_token=per_token,
        ranges=ranges or "mse",
        weight_ranges=weight_ranges,
        group=group,
        per_tensor=per_tensor,
        symmetric=symmetric,
        rounding="nearest" if rounding in LEARNED else rounding,
        layers=tuple((layers or {}).items()),
        exclude=(exclude,) if isinstance(exclude, str) else tuple(exclude),
        saturation_free=(rounded is not None or dynamic) and not machine().vnni,
    )
    names = chosen(corrections, method)
    asked = Mixture.of(max_size, max_latency, choices, sensitivity, method)
    runtime = runtime_for(target, method, asked.choices if asked.max_size else None)
    statistical = method.needs | method.collects | (set(names) & NEED_DATA)
    needed = statistical or rounding in LEARNED or asked.max_size is not None or restore
    if data is None and (rounded is not None or needed):
        raise InputError("quantize needs data: a few hundred examples that ranges are taken from")
    network = network_of(model, example, data)
    network.need_values("quantize")
    refuse_quantized(network)
    if ranges is None and rounded is not None:
        floats = any(output.is_floating_point() for output in network(network.example))
        method = replace(method, ranges="importance" if floats else "mse")
    method, meant = fitted(network, method)
    batches = [] if data is None else batches_of(calibration(data, network), network)
    before = prepared(network, names, method, batches)
    folded = before.network
    method = replace(method, exclude=(*method.exclude, *before.kept))
    statistics = None
    if batches:
        statistics = _statistics(folded, method, batches, method.needs | asked.needs)
    said = meant
    if runtime is not None and statistics is not None and asked.max_size is None:
        cores = threads or psutil.cpu_count(logical=False) or 1
        method, more = asked.fast(folded, method, statistics, batches, runtime, cores)
        said += more
    if asked.max_size is not None:
        method, more = asked.small(folded, method, statistics, batches, runtime)
        said += more
    if restore is not None:
        method, kept = restored(folded, method, statistics, batches, restore)
        said += kept
    plan, notes = method.decide(folded, statistics)
    if rounding in LEARNED:
        blocks, safe = LEARNED[rounding], method.saturation_free
        learned = learn_rounding(folded, plan, batches, blocks=blocks, saturation_free=safe)
        plan, notes = learned.plan, (*notes, *learned.notes)
    plan, added = corrected(before, plan, names, batches)
    notes = (*network.notes, *said, *notes, *container_notes(folded, plan))
    if corrections is not None:
        notes += (*before.notes, *added)  # who asked for them wants to know where they do nothing
    result = plan.apply(folded)
    original, whole = since(model, network, before.plan + plan)
    return Smaller(result, original, whole, network, notes)


def _statistics(
    network: Network,
    method: Quantization,
    batches: list[dict[str, Tensor]],
    needs: frozenset[str],
) -> Statistics:
    found = Statistics({}, 0)
    count = sum(len(next(iter(batch.values()))) for batch in batches)
    if method.activations is not None or method.collects:
        watched = None if method.activations is not None else ()  # no activation is quantized
        total = MORE if method.ranges == "entropy" else VALUES
        found = collect(network, batches, watched, method.collects, most=-(-total // count))
    if needs:
        found = replace(
            observe(network, batches, needs, rows=-(-ROWS // count)),
            activations=found.activations,
            columns=found.columns,
        )
    return found
