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
from tinier.methods.channel_pruning import ChannelPruning
from tinier.methods.depth_pruning import DepthPruning
from tinier.methods.weight_pruning import WeightPruning
from tinier.network import Example, Network
from tinier.recovery.compensation import compensate as fit_again
from tinier.recovery.loop import recover as train_student
from tinier.search.for_latency import plan_for_latency
from tinier.statistics import Statistics, observe
from tinier.targets.base import targets_for
from tinier.units import parse_milliseconds
from tinier.verbs.calibration import batches_of, calibration, few, labelled
from tinier.verbs.smaller import Smaller, examples_of, network_of, since
from tinier.verbs.sparsity import mask_weights


def prune(
    model: Any,
    example: Example | None = None,
    *,
    keep: float = 0.5,
    of: str = "macs",
    at_most: float | None = None,
    max_latency: float | str | None = None,
    target: str = "onnxruntime",
    threads: int | None = None,
    threshold: float | None = None,
    rates: Mapping[str, float] | None = None,
    exclude: Sequence[str] = (),
    criterion: Criterion | str | Callable[..., Any] | None = None,
    ranking: str | None = None,
    uniform: bool = False,
    round_to: int = 8,
    data: Any = None,
    compensate: bool | None = None,
    depth: float = 0,
    pattern: str | None = None,
    steps: int = 1,
    epochs: float = 0.0,
    seed: int = 0,
) -> Smaller:
    """Cut channels, neurons and heads until what is left costs what was asked for; it equals its masked reference.

    Args:
        model: an ``nn.Module``, a Keras model, the path of a file or directory, or what another step gave; never changed.
        example: example inputs: a tensor, a tuple or a dict.
        keep: share of the cost that is kept, in (0, 1].
        of: "macs", "parameters", "bytes", or "channels" for the same share of each group.
        at_most: the cost as a number instead.
        max_latency: milliseconds, or a text such as "5ms", on ``target`` at batch 1 instead: the share is searched by measuring.
        target: the runtime for ``max_latency``.
        threads: of that runtime; all physical cores if None.
        threshold: cut whatever ranks at or below it instead.
        rates: group name or pattern → share of its channels that is kept.
        exclude: patterns of groups or modules that stay.
        criterion: scores the channels: a ``Criterion``, its name, or a function (network, group) → scores; None for
            reconstruction with data and L2 magnitude without.
        ranking: what channels are ranked against: "global" (all others), "kind" or "local"; for masks also "row". None for global, for
            masks local.
        uniform: the same width in every layer, so that the result is a standard checkpoint; a note says what its config cannot, if it is
            none. What is excluded, or has a rate, decides for all layers that are alike.
        round_to: multiple that widths are rounded to.
        data: examples for criteria that need them and for compensation; labels are used by gradient criteria alone.
        compensate: fit the layers behind what was cut again; None for yes when there is data.
        depth: whole residual blocks leave first: so many from 1 on, below 1 this share of their MACs; ``keep`` counts from the original.
        pattern: mask single weights instead, which keeps all shapes: "unstructured", "2:4" (n of m), or "4x1" (blocks).
        steps: cut in this many rounds of equal ratio, each of which scores, cuts and recovers.
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
    if compensate and data is None:
        raise InputError("compensate: data is needed: a few hundred examples of real inputs")
    if epochs and data is None:
        raise InputError("epochs: data is needed to train on")
    limit = None if max_latency is None else parse_milliseconds(max_latency)
    if limit is not None:
        targets_for(target)  # refuses unknown names before any work
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads}: at least 1 is needed")
    if steps < 1 or epochs < 0:
        raise InputError(f"steps={steps} must be at least 1 and epochs={epochs} at least 0")
    if steps > 1 and (threshold is not None or max_latency is not None or rates):
        raise InputError(
            "steps: rounds need a share, so threshold, rates and max_latency go in one"
        )
    _check_together(
        pattern,
        max_latency,
        {
            "of": of != "macs", "at_most": at_most is not None, "rates": bool(rates), "uniform": uniform, "depth": bool(depth),
            "steps": steps > 1, "epochs": bool(epochs), "compensate": bool(compensate), "threshold": threshold is not None,
        },
    )  # fmt: skip
    network = network_of(model, example, data)
    if pattern is not None:
        masks = WeightPruning(
            keep=keep,
            pattern=pattern,
            threshold=threshold,
            ranking=ranking or "local",
            criterion=as_criterion(criterion),
            exclude=(exclude,) if isinstance(exclude, str) else tuple(exclude),
        )
        return mask_weights(model, network, masks, data)
    method = ChannelPruning(
        keep=keep,
        of=of,
        at_most=at_most,
        threshold=threshold,
        rates=tuple((rates or {}).items()),
        exclude=(exclude,) if isinstance(exclude, str) else tuple(exclude),
        criterion=as_criterion(
            Reconstruction() if criterion is None and data is not None else criterion
        ),
        ranking=ranking or "global",
        uniform=uniform,
        round_to=round_to,
    )
    examples = None if data is None else calibration(data, network)
    if method.criterion.needs and examples is None:
        raise InputError(
            f"criterion {method.criterion.name}: it needs {', '.join(sorted(method.criterion.needs))} of data; give data=…"
        )
    if limit is not None:
        return _within(model, network, method, examples, limit, target, threads, compensate)
    dropped, notes = Plan(), []
    shallow = network
    if depth:
        dropped = _depth(depth).plan(network, few(examples, network) if examples else None)
        shallow = dropped.apply(network)
        notes.append(f"{len(dropped.edits)} blocks dropped")
        if at_most is None and of in COSTS and threshold is None:
            left = _cost(shallow, of) / _cost(network, of)
            method = replace(method, keep=min(keep / left, 1.0))
    current, slices = shallow, Plan()
    for step in range(steps):
        share = method if steps == 1 else _round(method, steps)
        found = share.plan(current, _statistics(current, method, examples))
        following = found.apply(current) if found.edits else current
        if found.edits and examples is not None and compensate is not False:
            following = fit_again(following, current, found, batches_of(examples, network))
        if epochs and examples is not None:
            whole = examples_of(data, network)
            following = train_student(following, network, whole, epochs=epochs, seed=seed).network
        slices = found if step == 0 else follow(slices, found, channel_groups(shallow.traced))
        current = following
    if steps > 1:
        notes.append(f"cut in {steps} rounds")
    return _done(
        model, current, network, dropped + slices, notes, examples, compensate, epochs, uniform
    )


def _check_together(
    pattern: str | None, max_latency: float | str | None, given: Mapping[str, bool]
) -> None:
    """Refuse what would be passed over."""
    alone = {"pattern": pattern is not None, "max_latency": max_latency is not None}
    fits = {"pattern": {"threshold"}, "max_latency": {"rates", "uniform", "compensate"}}
    for name in [name for name, asked in alone.items() if asked]:
        wrong = [other for other, asked in given.items() if asked and other not in fits[name]]
        wrong += [other for other, asked in alone.items() if asked and other != name]
        if wrong:
            raise InputError(f"{name} does not go together with {', '.join(wrong)}; leave one out")


def _depth(depth: float) -> DepthPruning:
    if not depth > 0 or (depth >= 1 and depth != int(depth)):
        raise InputError(
            f"depth={depth}: a number of blocks, or a share of them below 1, is needed"
        )
    return DepthPruning(count=int(depth)) if depth >= 1 else DepthPruning(keep=1 - depth)


def _cost(network: Network, of: str) -> float:
    channels = channel_groups(network.traced)
    return Cost(COSTS[of](network.traced, channels)).at({})


def _round(method: ChannelPruning, steps: int) -> ChannelPruning:
    """The share of what is left that one of several rounds keeps: all rounds together keep what was asked for."""
    if method.at_most is not None or method.of == "channels":
        raise InputError("steps: rounds need a share of macs, parameters or bytes")
    return replace(method, keep=method.keep ** (1 / steps))


def _within(
    model: Any,
    network: Network,
    method: ChannelPruning,
    examples: Examples | None,
    limit: float,
    target: str,
    threads: int | None,
    compensate: bool | None,
) -> Smaller:
    found = plan_for_latency(
        network,
        method,
        _statistics(network, method, examples),
        limit,
        targets_for(target)[0],
        threads=threads or psutil.cpu_count(logical=False) or 1,
    )
    pruned = found.plan.apply(network)
    if examples is not None and compensate is not False:
        pruned = fit_again(pruned, network, found.plan, batches_of(examples, network))
    note = f"{target}: {found.latency:.3g} ms at batch 1, the original {found.original:.3g} ms in the same rounds"
    return _done(
        model, pruned, network, found.plan, [note], examples, compensate, 0.0, method.uniform
    )


def _done(
    model: Any,
    pruned: Network,
    original: Network,
    plan: Plan,
    notes: list[str],
    examples: Examples | None,
    compensate: bool | None,
    epochs: float,
    uniform: bool,
) -> Smaller:
    notes = [*pruned.notes, *notes]
    if examples is not None and compensate is not False:
        notes.append(f"compensated on {len(examples)} examples")
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
