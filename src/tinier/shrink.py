"""Zeros become a smaller model: whatever tool wrote them, channels that cannot change the output leave."""

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune

from tinier.edits.base import Plan
from tinier.edits.proof import TOLERANCE, difference, random_inputs
from tinier.edits.slice import Slice
from tinier.errors import RefusedError
from tinier.methods.dead_channels import DeadChannels
from tinier.modules.masked import release
from tinier.network import Example, Network
from tinier.sources.load import load
from tinier.verbs import Smaller
from tinier.verbs.smaller import since

CHECKS = 3  # random batches on which the smaller network must equal the original


def shrink(model: Any, example: Example | None = None) -> Smaller:
    """Remove the channels that zeros have killed: those that are zero, unread, or a constant that a bias can take up.

    Masks of ``torch.nn.utils.prune`` and of tinier are made permanent first; zeros that another tool wrote into the weights count as they
    are. Nothing is judged by size: without dead channels the model comes back as it is.

    Args:
        model: an ``nn.Module``, a path, or what ``prune`` or ``recover`` gave; never changed.
        example: example inputs; None where the model brings its own.

    Returns:
        The smaller model; printing it shows how many channels of each group are left. ``original`` has the
            masks made permanent, or is what the steps before started from.

    Raises:
        RefusedError: the model is on the meta device; or the smaller one does not equal the original to 1e-5 of its largest output on
            random inputs; the message has the channel group.

    Cost:
        A few runs of the network, and those of applying the plan.
    """
    network = _network(model, example)
    network.need_values("look for zeros in")
    plan = DeadChannels().plan(network)
    smaller = plan.apply(network)
    if not _equal(network, smaller):
        raise RefusedError(f"{network.name}: the smaller model is another; {_where(network, plan)}")
    if isinstance(model, Smaller):
        original, whole = since(model, network, plan)
        return Smaller(smaller, original, whole, notes=(*model.notes, *smaller.notes))
    return Smaller(smaller, network, plan, notes=smaller.notes)


def _network(model: Any, example: Example | None) -> Network:
    if isinstance(model, Smaller):
        model = model.network
    if isinstance(model, Network):
        return Network(
            permanent(model.module), model.example, model.name, model.folder, model.notes
        )
    return load(permanent(model) if isinstance(model, nn.Module) else model, example)


def permanent(module: nn.Module) -> nn.Module:
    """A copy whose masks, of ``torch.nn.utils.prune`` or of tinier, are plain zeros under the weights' own names."""
    # A pruned layer keeps its weight as the result of a product, which torch will not copy with a gradient to come.
    results = {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    made = copy.deepcopy(module, results)
    for part in made.modules():
        names = [
            hook._tensor_name
            for hook in part._forward_pre_hooks.values()
            if isinstance(hook, prune.BasePruningMethod)
        ]
        for name in names:
            prune.remove(part, name)
    release(made)
    return made


def _equal(original: Network, smaller: Network) -> bool:
    batches = [random_inputs(original, seed) for seed in range(CHECKS)]
    return all(difference(smaller(inputs), original(inputs)) <= TOLERANCE for inputs in batches)


def _where(network: Network, plan: Plan) -> str:
    """The channel groups that cannot leave by themselves."""
    fixed = tuple(edit for edit in plan.edits if not isinstance(edit, Slice))
    wrong = []
    for edit in plan.edits:
        if isinstance(edit, Slice):
            without = tuple(other for other in plan.edits if other is not edit)
            if _equal(network, Plan(without).apply(network)):
                wrong.append(edit.group)
    if wrong:
        return f"removing {', '.join(wrong)} changes the output"
    return f"no one group does it alone; {len(fixed)} biases took up constants"
