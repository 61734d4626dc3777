"""Sparsify: train towards zeros, then remove what became zero."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tinier.edits.base import Plan
from tinier.errors import InputError
from tinier.methods.channel_pruning import ChannelPruning
from tinier.methods.dead_channels import DeadChannels
from tinier.methods.weight_pruning import WeightPruning
from tinier.network import Example, Network
from tinier.recovery.base import Loss, Penalty
from tinier.recovery.choose import as_penalties
from tinier.recovery.growing import Growing
from tinier.recovery.loop import recover as train_student
from tinier.statistics import observe
from tinier.verbs.calibration import calibration, ended_early, labelled, training
from tinier.verbs.smaller import Smaller, network_of, since


def sparsify(
    model: Any,
    example: Example | None = None,
    data: Any = None,
    *,
    penalties: Penalty | str | Sequence[Penalty | str],
    keep: float | None = None,
    losses: Sequence[Loss] | None = None,
    epochs: float | None = None,
    seconds: float | None = None,
    lr: float | None = None,
    seed: int = 0,
) -> Smaller:
    """Train a network under penalties that drive weights or channels to zero, then cut the channels that got there.

    Args:
        model: an ``nn.Module``, a path, or what another step gave; never changed.
        example: example inputs; None where the model brings its own.
        data: training examples; labels are used by losses of labels alone.
        penalties: of ``tinier.recovery``: L1, L2, elastic net, slimming, group lasso, growing, soft filters; one or several, as objects or
            as texts: "l1", "group_lasso:weight=1e-3,part=producing,proximal=true".
        keep: share of the MACs that is kept afterwards, the channels with the smallest weights leaving; None to cut only what became zero.
            For "growing" by name it says which channels are driven out.
        losses: None for staying near the network's own answers (distillation); ``CrossEntropy()`` for its labels.
        epochs: passes over the data, or
        seconds: time to train.
        lr: the highest learning rate; None for the training loop's own.
        seed: of the order of the examples.

    Returns:
        The trained network without its dead channels, or without those that ``Growing`` was given to drive out. Weights that are zero alone
        stay where they are, as zeros.

    Raises:
        InputError: there is no data, no penalty, or neither ``epochs`` nor ``seconds``; the data cannot be trained on.

    Cost:
        That of training, and of applying a plan.
    """
    if data is None:
        raise InputError("sparsify needs data to train on")
    if not penalties:
        raise InputError("sparsify: penalties are needed, such as GroupLasso(1e-3)")
    method = None if keep is None else ChannelPruning(keep=keep)
    chosen = as_penalties(penalties)
    network = network_of(model, example, data)
    if method is not None:
        chosen = tuple(_directed(penalty, method, network) for penalty in chosen)
    done = train_student(
        network,
        network,
        training(data, network, losses),
        losses=losses,
        penalties=chosen,
        epochs=epochs,
        seconds=seconds,
        lr=lr,
        seed=seed,
    )
    stopped = ended_early(done)
    grown = [penalty for penalty in chosen if isinstance(penalty, Growing)]
    cut = method or DeadChannels()
    plan = sum((g.plan for g in grown), Plan()) if grown else cut.plan(done.network)
    smaller = plan.apply(done.network)
    names = ", ".join(penalty.name for penalty in chosen)
    note = f"trained for {done.epochs:.2g} epochs in {done.seconds:.0f} s with {names}"
    original, plan = since(model, network, plan)
    return Smaller(smaller, original, plan, notes=(*smaller.notes, note, *stopped))


def _directed(penalty: Penalty, method: ChannelPruning, network: Network) -> Penalty:
    if not isinstance(penalty, Growing):
        return penalty
    if penalty.plan.edits:
        raise InputError("keep: growing has a plan that says what leaves; leave keep out")
    return replace(penalty, plan=method.plan(network))


def mask_weights(model: Any, network: Network, method: WeightPruning, data: Any) -> Smaller:
    """The network with the weights masked that a method chooses; ``data`` is for criteria that need it."""
    statistics = None
    needs = method.criterion.weight_needs
    if needs and data is None:
        raise InputError(
            f"criterion {method.criterion.name}: it needs {', '.join(sorted(needs))} of data; give data=…"
        )
    if needs:
        statistics = observe(network, labelled(calibration(data, network), network), needs=needs)
    plan = method.plan(network, statistics)
    masked = plan.apply(network)
    original, whole = since(model, network, plan)
    return Smaller(masked, original, whole, notes=(*masked.notes, *method.left_whole(network)))
