"""Compensation: the layers behind what was cut are fitted again, in closed form and without labels."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, fx

from tinier.edits.base import Plan
from tinier.edits.slice import Slice
from tinier.errors import DataError, InputError
from tinier.graph.axes import Atom
from tinier.graph.groups import Channels, channel_groups, named_tensors
from tinier.graph.rules.base import hint
from tinier.graph.trace import Traced
from tinier.network import Network
from tinier.recovery.refit import Refit
from tinier.statistics.chunks import Batch, chunks
from tinier.tensors.least_squares import RIDGE

CHUNK = 64  # examples that are run at once
MEMORY = 2 * 2**30


def compensate(
    pruned: Network,
    original: Network,
    plan: Plan,
    batches: Iterable[Batch],
    *,
    ridge: float = RIDGE,
    memory: int = MEMORY,
    seed: int = 0,
) -> Network:
    """Fit the layers of a pruned network again so that they answer like the original's; no labels, no training.

        W̃, b̃ = argmin Σ_r w_r ‖y_r − (W̃ x̃_r + b̃)‖² + λ ‖W̃ − W_cut‖²,    λ = ridge · tr(G) / n

    for every linear layer and convolution behind a cut, in the order of the graph. x̃ is what the layer reads in the *pruned* network
    after everything before it was fitted; y what it gives in the *original*, at the channels that stay; G the Gram matrix of x̃, centred.
    Where the result goes into a residual sum, y is what makes the *sum* that of the original, so that a block corrects the error of
    those before it. w_r is how much row r matters for what the network returns (``statistics.sensitivity``): padding, and tokens that
    nothing reads, have weight 0. A convolution without a bias, before a batch norm, gets its b̃ from the running mean of the batch norm.
    Afterwards the batch norm takes the mean and the variance of its new input, and its scale and shift are changed so that its function
    stays: training goes on from there without a jump.

    Args:
        pruned: what ``plan.apply(original)`` gave, trained since or not; left as it is.
        original: the network before the plan; left as it is.
        plan: its slices.
        batches: a few hundred examples: input name → tensor, dimension 0 the batch; or pairs of these and labels, which are not used.
        ridge: strength of the shrinkage towards the cut weights, at least 0.
        memory: bytes that the values inside both networks may take at once. The first examples that fit are used, at least one batch of 64;
            ``notes`` says it where some are left out.
        seed: of the projections that weights are drawn with, and of the rows that Gram matrices of large layers are summed over.

    Returns:
        A network of the class and shapes of ``pruned``, with new weights. The error of no layer on the data is larger than with the cut
        weights. If the outputs are further from the original's than before, which parameters that cannot be fitted may cause, a copy of
        ``pruned``, and ``notes`` says it. Left as they are: layers whose weight is computed, tied or used more than once, embeddings,
        recurrent layers.

    Raises:
        DataError: there are no examples, an input is missing, or values are not finite.
        InputError: the plan is of another network, ``pruned`` of another plan, or without values (meta device).

    Cost:
        Two runs of both networks and one backward of the original over the data; for each layer a Gram matrix of 8 · (inputs · kernel)²
        bytes, from at most 32,768 rows or 16 for each input, and the solution of as many equations. Memory does not grow beyond ``memory``
        and the weights of both networks.

    Source:
        He et al. 2017, "Channel pruning for accelerating very deep neural networks", section 3.1.2, for least squares with the pruned
        network's input.

    Differs:
        Ridge towards the cut weights; weighted rows; targets behind residual sums; all layers behind a cut, not only those that read it.
    """
    if not ridge >= 0:
        raise InputError(f"compensation: ridge={ridge}; a number of at least 0 is needed")
    channels = channel_groups(original.traced)
    kept = _kept(plan, channels)
    state = named_tensors(pruned.module)
    if any(tensor.is_meta for tensor in state.values()):
        raise InputError(f"{pruned.name}: compensation needs weights; the network is on meta")
    data, left_out = _examples(original, batches, memory)
    if not kept:
        return pruned.copy()
    refit = Refit(original.traced, channels, kept, data, ridge, seed)
    try:
        refit.load(state)
    except (KeyError, RuntimeError) as error:
        raise InputError(
            f"{pruned.name}: not what the plan makes of {original.name}: {error}"
        ) from error
    before = refit.error()
    if not before < torch.inf:
        raise DataError(f"{original.name}: its outputs on the data are not finite")
    refit.run()
    result = pruned.copy()
    if not refit.error() <= before:
        note = (
            "compensation would have moved the outputs away from the original's, and was left out"
        )
        return replace(result, notes=(*result.notes, note))
    if not refit.changed:
        return replace(
            result, notes=(*result.notes, "no layer behind the cuts could be fitted again")
        )
    own = named_tensors(result.module)
    with torch.no_grad():
        for name in refit.changed:
            own[name].copy_(refit.tensors[name])
    count = sum(len(next(iter(inputs.values()))) for inputs in data)
    note = f"compensated on {count} examples"
    if left_out:
        note = (
            f"compensated with the first {count} examples; more take over {memory / 2**30:.1f} GB"
        )
    return replace(result, notes=(*result.notes, note))


def _examples(
    network: Network, batches: Iterable[Batch], memory: int
) -> tuple[list[dict[str, Tensor]], bool]:
    """The first chunks of data that fit, and whether some are left out."""
    data: list[dict[str, Tensor]] = []
    used = 0.0
    known = sum(tensor.numel() for tensor in network.example.values())
    for inputs, _ in chunks(network, batches, CHUNK):
        share = sum(tensor.numel() for tensor in inputs.values()) / known
        used += _live_bytes(network.traced) * share
        if data and used > memory:
            return data, True
        data.append(dict(inputs))
    if not data:
        raise DataError(f"{network.name}: no examples to compensate with; a few hundred are needed")
    return data, False


def _kept(plan: Plan, channels: Channels) -> Mapping[Atom, Tensor]:
    """Channels that stay of each atom that loses some."""
    result: dict[Atom, Tensor] = {}
    for edit in plan.edits:
        if not isinstance(edit, Slice) or len(edit.kept) == edit.size:
            continue
        group = channels.group(edit.group)
        if group is None or group.size != edit.size:
            raise InputError(
                f"{edit.group}: the plan slices {edit.size} channels there, the original has "
                f"{'no such group' if group is None else group.size}"
            )
        indices = torch.tensor(edit.kept, dtype=torch.int64)
        if group.atom in result:
            indices = indices[torch.isin(indices, result[group.atom])]
        result[group.atom] = indices
    return result


def _live_bytes(traced: Traced) -> int:
    """Most bytes that the values inside a network and its smaller twin take at once, for the example."""
    live, most = 0, 0
    sizes: dict[fx.Node, int] = {}
    last = fx.Interpreter(traced.module).user_to_last_uses
    for node in traced.module.graph.nodes:
        value = node.meta.get("val")
        found = value if isinstance(value, list | tuple) else [value]
        sizes[node] = 0
        if node.op != "get_attr":
            sizes[node] = sum(
                prod(hint(n) for n in item.shape) * item.element_size()
                for item in found
                if isinstance(item, Tensor)
            )
        live += sizes[node]
        most = max(most, live)
        live -= sum(sizes[done] for done in last.get(node, []))
    return 2 * most
