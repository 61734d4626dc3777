"""Prune: channels, neurons, heads, experts and hidden units leave; the layers behind them are fitted again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import psutil

from tinier.criteria.base import Criterion
from tinier.criteria.choose import as_criterion
from tinier.criteria.reconstruction import Reconstruction
from tinier.data.base import Examples
from tinier.edits.base import Plan
from tinier.edits.config import not_standard
from tinier.edits.follow import follow
from tinier.errors import InputError
from tinier.graph.groups import channel_groups
from tinier.graph.macs import COSTS, Cost
from tinier.measure.machine import width_for
from tinier.methods.channel_pruning import ChannelPruning
from tinier.methods.depth_pruning import DepthPruning
from tinier.methods.weight_pruning import WeightPruning
from tinier.network import Example, Network
from tinier.recovery.compensation import compensate as fit_again
from tinier.recovery.loop import recover as train_student
from tinier.search.for_latency import plan_for_latency
from tinier.statistics import Statistics, observe
from tinier.targets.base import Target, targets_for
from tinier.units import parse_milliseconds
from tinier.verbs.asked import amount, check_numbers, check_together, shares
from tinier.verbs.calibration import batches_of, calibration, ended_early, few, labelled, training
from tinier.verbs.smaller import Smaller, network_of, since
from tinier.verbs.sparsity import mask_weights


def prune(
    model: Any,
    example: Example | None = None,
    *,
    keep: float | None = None,
    of: str = "macs",
    at_most: float | str | None = None,
    max_latency: float | str | None = None,
    target: str | None = None,
    threads: int | None = None,
    threshold: float | None = None,
    rates: Mapping[str, float] | None = None,
    exclude: Sequence[str] = (),
    criterion: Criterion | str | Callable[..., Any] | None = None,
    ranking: str | None = None,
    uniform: bool = False,
    round_to: int | None = None,
    data: Any = None,
    compensate: bool | None = None,
    depth: float = 0,
    pattern: str | None = None,
    steps: int = 1,
    schedule: str | None = None,
    epochs: float = 0.0,
    seed: int = 0,
) -> Smaller:
    """Cut channels, neurons and heads until what is left costs what was asked for; it equals its masked reference.

    Args:
        model: an ``nn.Module``, a Keras model, the path of a file or directory, or what another step gave; never changed.
        example: example inputs: a tensor, a tuple or a dict.
        keep: share of the cost that is kept, in (0, 1]; None for half where nothing else says how much.
        of: "macs", "parameters", "bytes", or "channels" for the same share of each group.
        at_most: the cost as a number instead; of bytes also a text such as "1MB".
        max_latency: milliseconds, or a text such as "5ms", on ``target`` at batch 1 instead: the share is searched by measuring.
        target: the runtime for ``max_latency``, "onnxruntime" if None; without that, widths are rounded as it likes them on this CPU.
        threads: of that runtime; all physical cores if None.
        threshold: cut whatever ranks at or below it instead.
        rates: group name or pattern → share of its channels that is kept.
        exclude: patterns of groups or modules that stay: their channels, their weights under ``pattern``, their blocks under ``depth``.
        criterion: scores the channels: a ``Criterion``, its name, or a function (network, group) → scores; None for
            reconstruction with data and L2 magnitude without.
        ranking: what channels are ranked against: "global" (all others), "kind" or "local"; for masks also "row". None for global, for
            masks local.
        uniform: the same width in every layer, so that the result is a standard checkpoint; a note says what its config cannot, if it is
            none. What is excluded, or has a rate, decides for all layers that are alike.
        round_to: multiple that widths are rounded to; None for what ``target`` likes, 8 if that is None, too.
        data: examples for criteria that need them and for compensation; labels are used by gradient criteria alone.
        compensate: fit the layers behind what was cut again; None for yes when there is data.
        depth: whole residual blocks leave first: so many from 1 on, below 1 this share of their MACs; ``keep`` counts from the original.
        pattern: mask single weights instead, which keeps all shapes: "unstructured", "2:4" (n of m), or "4x1" (blocks).
        steps: cut in this many rounds, each of which scores, cuts and recovers.
        schedule: of the rounds: "geometric", equal ratios, if None; or "cubic", as in Zhu and Gupta 2017, most of it in the first ones.
        epochs: of training towards the original on ``data`` after each round.
        seed: of the order of the examples.

    Returns:
        The smaller network; ``plan``, ``kept`` and printing it say what left.

    Raises:
        InputError: an argument is out of its range, or data is missing.
        RefusedError: pinned layers make the target impossible; the message says the least possible one.

    Cost:
        A trace, a plan, a proof, and with data a pass for the criterion and two for the compensation.
    """
    check_numbers(steps, epochs, depth, threads, seed, schedule)
    if compensate and data is None:
        raise InputError("compensate: data is needed: a few hundred examples of real inputs")
    if epochs and data is None:
        raise InputError("epochs: data is needed to train on")
    given = {"keep": keep, "at_most": at_most, "max_latency": max_latency, "threshold": threshold, "target": target,
             "threads": threads, "ranking": ranking, "round_to": round_to, "schedule": schedule, "pattern": pattern}  # fmt: skip
    check_together(
        {name: value is not None for name, value in given.items()}
        | {"of": of != "macs", "rates": bool(rates), "uniform": uniform, "depth": bool(depth)}
        | {"steps": steps > 1, "epochs": bool(epochs), "compensate": bool(compensate)},
        pattern,
    )
    limit = None if max_latency is None else parse_milliseconds(max_latency)
    # Unknown names are refused before any work.
    runtime = targets_for(target or "onnxruntime")[0] if target or limit is not None else None
    if rates is not None and not isinstance(rates, Mapping):
        raise InputError(f"rates={rates!r}: a dict of group names or patterns and shares is needed")
    stay = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    network = network_of(model, example, data)
    if pattern is not None:
        masks = WeightPruning(
            keep=0.5 if keep is None else keep,
            pattern=pattern,
            threshold=threshold,
            ranking=ranking or "local",
            criterion=as_criterion(criterion),
            exclude=stay,
        )
        return mask_weights(model, network, masks, data)
    method = ChannelPruning(
        keep=0.5 if keep is None else keep,
        of=of,
        at_most=amount(at_most, of),
        threshold=threshold,
        rates=tuple((rates or {}).items()),
        exclude=stay,
        criterion=as_criterion(
            Reconstruction() if criterion is None and data is not None else criterion
        ),
        ranking=ranking or "global",
        uniform=uniform,
        round_to=width_for(runtime if target else None) if round_to is None else round_to,
    )
    examples = None if data is None else calibration(data, network)
    if method.criterion.needs and examples is None:
        raise InputError(
            f"criterion {method.criterion.name}: it needs {', '.join(sorted(method.criterion.needs))} of data; give data=…"
        )
    if limit is not None and runtime is not None:
        return _within(model, network, method, examples, limit, runtime, threads, compensate)
    dropped, notes = Plan(), []
    shallow = network
    if depth:
        dropped = _depth(depth, stay).plan(network, few(examples, network) if examples else None)
        shallow = dropped.apply(network)
        notes.append(f"{len(dropped.edits)} blocks dropped")
        if method.at_most is None and of in COSTS and threshold is None:
            left = _cost(shallow, of) / _cost(network, of)
            method = replace(method, keep=min(method.keep / left, 1.0))
    whole = training(data, network) if epochs else None
    current, slices = shallow, Plan()
    for number, part in enumerate(_rounds(method, shallow, steps, schedule)):
        found = part.plan(current, _statistics(current, method, examples))
        following = found.apply(current) if found.edits else current
        if found.edits and examples is not None and compensate is not False:
            following = fit_again(following, current, found, batches_of(examples, network))
        if whole is not None:
            done = train_student(following, network, whole, epochs=epochs, seed=seed)
            following, notes = done.network, [*notes, *ended_early(done)]
        slices = found if number == 0 else follow(slices, found, channel_groups(shallow.traced))
        current = following
    if steps > 1:
        notes.append(f"cut in {steps} rounds")
    return _done(model, current, network, dropped + slices, notes, epochs, uniform)


def _depth(depth: float, exclude: tuple[str, ...]) -> DepthPruning:
    if depth >= 1:
        return DepthPruning(count=int(depth), exclude=exclude)
    return DepthPruning(keep=1 - depth, exclude=exclude)


def _cost(network: Network, of: str) -> float:
    channels = channel_groups(network.traced)
    return Cost(COSTS[of](network.traced, channels)).at({})


def _rounds(
    method: ChannelPruning, network: Network, steps: int, schedule: str | None
) -> list[ChannelPruning]:
    """The method of each round: after the last one what was asked for is left."""
    if steps == 1:
        return [method]
    if method.of == "channels":
        raise InputError("steps: rounds need a share of macs, parameters or bytes")
    whole = _cost(network, method.of)
    share = method.keep if method.at_most is None else min(method.at_most / whole, 1.0)
    return [replace(method, at_most=part * whole) for part in shares(share, steps, schedule)]


def _within(
    model: Any,
    network: Network,
    method: ChannelPruning,
    examples: Examples | None,
    limit: float,
    target: Target,
    threads: int | None,
    compensate: bool | None,
) -> Smaller:
    found = plan_for_latency(
        network,
        method,
        _statistics(network, method, examples),
        limit,
        target,
        threads=threads or psutil.cpu_count(logical=False) or 1,
    )
    pruned = found.plan.apply(network)
    if examples is not None and compensate is not False:
        pruned = fit_again(pruned, network, found.plan, batches_of(examples, network))
    note = f"{target.name}: {found.latency:.3g} ms at batch 1, the original {found.original:.3g} ms in the same rounds"
    return _done(model, pruned, network, found.plan, [note], 0.0, method.uniform)


def _done(
    model: Any,
    pruned: Network,
    original: Network,
    plan: Plan,
    notes: list[str],
    epochs: float,
    uniform: bool,
) -> Smaller:
    notes = [*pruned.notes, *notes]
    if epochs:
        notes.append(f"trained towards the original for {epochs:g} epochs a round")
    why = not_standard(pruned.module, pruned.example)
    if not why:
        notes.append("standard checkpoint: from_pretrained loads it without tinier")
    elif uniform and hasattr(original.module, "save_pretrained"):
        notes.append(f"no standard checkpoint, from_pretrained alone cannot load it: {why}")
    original, plan = since(model, original, plan)
    return Smaller(pruned, original, plan, notes=tuple(dict.fromkeys(notes)))


def _statistics(
    network: Network, method: ChannelPruning, examples: Examples | None
) -> Statistics | None:
    if not method.criterion.needs or examples is None:
        return None
    return observe(network, labelled(examples, network), needs=method.criterion.needs)
