"""Batch norms of a network that was changed get their means and variances again, from data."""

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from tinier.graph.fold import parameter_of
from tinier.graph.rules import operator_name
from tinier.graph.walk import Walk
from tinier.methods.sampled import examples
from tinier.network import Network
from tinier.statistics.chunks import Batch

MOST = 512  # examples


def reestimate_norms(network: Network, batches: Iterable[Batch], *, most: int = MOST) -> Network:
    """Running means and variances of all batch norms, of what they read in this very network, one norm after the other.

    For networks whose weights were pruned or trained with their norms frozen, before they are folded.

    Args:
        network: left as it is.
        batches: inputs, or pairs of inputs and labels, which are not used.
        most: examples that are used; less where the values inside the network would take more than 2 GB.

    Returns:
        A copy with other buffers: the mean and the unbiased variance over examples and positions, as training's running averages estimate
        them. Norms that are shared, or that see one value a channel, keep theirs; without norms it is a plain copy.

    Raises:
        DataError: there are no examples.

    Cost:
        One run of the network; the values that are alive inside it for all examples together.
    """
    result = network.copy()
    module = network.traced.module
    data = examples(network, batches, most)
    walk = Walk(fx.GraphModule(module, module.graph), data)
    names = [str(node.target) for node in walk.nodes if node.op == "get_attr"]
    buffers = dict(result.module.named_buffers(remove_duplicate=False))
    while (node := walk.next()) is not None:
        if operator_name(node) == "batch_norm" and not node.args[5]:
            own = [parameter_of(tensor) for tensor in node.args[3:5]]
            source = node.args[0]
            if isinstance(source, fx.Node) and all(
                name in buffers and names.count(str(name)) == 1 and _readers(walk, str(name)) == 1
                for name in own
            ):
                values = [one[source] for one in walk.values]
                found = moments(values)
                if found is not None:
                    rows, mean, variance = found
                    fresh = (mean, variance * rows / (rows - 1))
                    for name, value in zip(own, fresh, strict=True):
                        buffer = buffers[str(name)]
                        buffer.copy_(value.to(buffer.dtype))
                        walk.set(str(name), buffer.clone())
        walk.step()
    return result


def _readers(walk: Walk, name: str) -> int:
    return sum(len(n.users) for n in walk.nodes if n.op == "get_attr" and n.target == name)


def moments(values: list[Tensor]) -> tuple[int, Tensor, Tensor] | None:
    """(rows, mean, variance) of each channel, the last two (C,) float64; None where there are fewer than two rows or a constant channel.

    Args:
        values: (batch, C, …) each.
    """
    rows = sum(value.numel() // value.shape[1] for value in values)
    flat = [value.double().movedim(1, 0).flatten(1) for value in values]
    mean = torch.stack([value.sum(1) for value in flat]).sum(0) / max(rows, 1)
    parts = [(value - mean[:, None]).square().sum(1) for value in flat]
    variance = torch.stack(parts).sum(0) / max(rows, 1)
    return None if rows < 2 or bool((variance <= 0).any()) else (rows, mean, variance)
