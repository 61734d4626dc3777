"""Whether the arguments of ``quantize`` fit together, the network and its target: known before data is read."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tinier.edits.base import Plan
from tinier.edits.quantize import QuantizeWeight
from tinier.errors import InputError, RefusedError
from tinier.graph.fold import fold, read
from tinier.methods.layer_patterns import resolved
from tinier.methods.quantization import Quantization
from tinier.methods.weight_integers import GROUPED
from tinier.network import Network
from tinier.targets.base import Target, known_targets, targets_for
from tinier.tensors.grid import group_count
from tinier.units import is_number, is_whole


def check_together(given: Mapping[str, Any]) -> None:
    """Refuse arguments of which one would be passed over, and those of a wrong kind that no method checks.

    Args:
        given: argument → value, None where it was left out.

    Raises:
        InputError: what was got, what is possible, and what to do.
    """
    restore, threads, dynamic = (
        given["restore"],
        given["threads"],
        isinstance(given["activations"], str),
    )
    if restore is not None and (not is_number(restore) or not 0 < restore < 1):
        raise InputError(f"restore={restore!r}: a share of the loss in (0, 1) is needed")
    if threads is not None and (not is_whole(threads) or threads < 1):
        raise InputError(f"threads={threads!r}: a whole number, at least 1, is needed")
    if given["bits"] is not None and given["max_size"] is not None:
        raise InputError(
            f"bits={given['bits']!r} and max_size: the size chooses bits of each layer; leave bits out, and give "
            "choices=(…) or layers={pattern: bits} to say which may be"
        )
    limited = given["max_size"] is not None or given["max_latency"] is not None
    if given["sensitivity"] != "kl" and not limited:
        raise InputError(
            f"sensitivity={given['sensitivity']!r}: it is what max_size and max_latency choose by; give one of them, or leave it out"
        )
    if restore is not None and limited:
        raise InputError(
            "restore leaves layers float, which max_size and max_latency limit; leave one out"
        )
    if given["target"] is None and given["max_latency"] is not None:
        raise InputError(
            "max_latency: the target that it is measured on is needed, such as onnxruntime"
        )
    if threads is not None and given["target"] is None:
        raise InputError("threads are those of the target that is measured; give that, too")
    alone = given["activations"] is None or dynamic
    if given["target"] is not None and alone and given["max_size"] is None:
        raise InputError(
            "target: weights alone are computed in float; there is nothing to measure; "
            "give max_size for a file of that size, or leave it out"
        )
    if dynamic and str(given["rounding"]).startswith("learned"):
        raise InputError(
            f"rounding={given['rounding']!r}: the roundings of each run have no gradient; give activations=8 or None"
        )
    for name in ("exclude", "layers"):
        value = given[name] or ()
        if not isinstance(value, str) and not all(isinstance(one, str) for one in value):
            raise InputError(f"{name}={value!r}: names or patterns of layers, as texts, are needed")
    if given["layers"] is not None and not isinstance(given["layers"], Mapping):
        raise InputError(
            f"layers={given['layers']!r}: a dict is needed, of a pattern to bits, such as {{'head': 8}}"
        )


def runtime_for(
    target: str | None, method: Quantization, choices: Sequence[int] | None = None
) -> Target | None:
    """The runtime, once it is known that it takes the bits.

    Args:
        target: name; None for none.
        method: the quantization.
        choices: bits that a size chooses from.

    Raises:
        InputError: it is unknown, or takes other bits; the message lists them.
        MissingError: it is not installed.
    """
    if target is None:
        return None
    runtime = targets_for(target)[0]
    check_bits(runtime, method, choices)
    return runtime


def check_bits(runtime: Target, method: Quantization, choices: Sequence[int] | None = None) -> None:
    """Refuse bits that a runtime does not take."""
    bits = {b for _, b in method.layers if b} | (set(choices or ()) - {0} or {method.bits})
    rounded = () if method.activations is None else (method.activations,)
    refusal = runtime.precision.refuses(bits, rounded, method.dynamic)
    if refusal:
        raise InputError(f"{runtime.name} cannot take {refusal}")


def fitted(network: Network, method: Quantization) -> tuple[Quantization, tuple[str, ...]]:
    """The method with patterns in the names of the folded graph, once it is known that they and its groups fit the network.

    Args:
        network: the float network.
        method: the quantization.

    Returns:
        The method, and what there is to say of what is meant.

    Raises:
        InputError: a pattern is of nothing, or a group fits no layer.
        RefusedError: nothing is left to quantize.
    """
    exclude, said = resolved(method.exclude, network, "exclude")
    found, more = resolved([pattern for pattern, _ in method.layers], network, "layers")
    layers = tuple(
        (one, bits)
        for patterns, (_, bits) in zip(found, method.layers, strict=True)
        for one in patterns
    )
    names = tuple(one for patterns in exclude for one in patterns)
    method = replace(method, exclude=names, layers=layers)
    stores = method.stores(network)
    if not stores:
        raise RefusedError(
            f"{network.name} has no weight to quantize"
            + ("; exclude and layers leave none" if exclude or layers else "")
        )
    notes = [*said, *more]
    if method.group is not None:
        module = fold(network.traced.module)
        whole = []
        for store in stores:
            weight = read(module, store.name)
            assert weight is not None
            if store.kind not in GROUPED or weight.ndim != 2:
                whole.append(store.name)
                continue
            try:
                group_count(weight.numel() // weight.shape[store.axis], method.group)
            except InputError as error:
                raise InputError(f"{store.name}: {error}, or exclude this layer") from error
        if len(whole) == len(stores):
            raise InputError(
                f"group={method.group}: inputs of linear layers and embeddings share scales in groups, and there are none here; "
                "leave group out for one scale a channel"
            )
        if whole:
            notes.append(
                f"{', '.join(whole)}: one scale a channel; groups are for linear layers and embeddings"
            )
    return method, tuple(notes)


def container_notes(network: Network, plan: Plan) -> tuple[str, ...]:
    """What the files of runtimes keep integers of other bits in, with both sizes.

    Args:
        network: the folded float network.
        plan: its quantization.
    """
    module = fold(network.traced.module)
    sizes: list[tuple[int, int]] = []  # numbers, bits
    for edit in plan.edits:
        weight = read(module, edit.tensor) if isinstance(edit, QuantizeWeight) else None
        if weight is not None and isinstance(edit, QuantizeWeight):
            sizes.append((weight.numel(), (edit.high - edit.low).bit_length()))
    exact = sum(count * bits for count, bits in sizes) // 8
    notes: dict[int, list[str]] = {}
    for name, target in known_targets().items():
        if target.precision.weights and target.package:
            kept = sum(count * target.precision.container(bits) for count, bits in sizes) // 8
            if kept > exact:
                notes.setdefault(kept, []).append(name)
    return tuple(
        f"integers of weights take {exact:,} bytes without gaps, as tinier.pack stores them, and {kept:,} in the file for "
        f"{' or '.join(names)}, which has containers of 4 and 8 bits"
        for kept, names in notes.items()
    )
