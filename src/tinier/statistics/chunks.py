"""Examples in chunks of one size, however the user batched them, so that no result depends on it."""

from collections.abc import Iterable, Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from tinier.errors import DataError
from tinier.graph.rules.base import hint
from tinier.network import Network

CHUNK = 32  # examples that are run at once at most, however the data are batched
# What the largest value inside a network takes of these. Memory of larger blocks comes from the system and goes back at each use, which
# takes more time than most operators.
BYTES = 2**25

Batch = Mapping[str, Tensor] | tuple[Mapping[str, Tensor], Tensor | None]


def chunks(
    network: Network, batches: Iterable[Batch], size: int
) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """The examples in chunks of one size, however they came; the last of each shape may be smaller.

    Args:
        network: whose inputs they are; where its batch size is fixed, batches stay as they are.
        batches: inputs, or pairs of inputs and labels.
        size: examples in a chunk.

    Raises:
        DataError: an input is missing, lengths differ, or the batch size is fixed at another.
    """
    if not network.traced.batched:
        for batch in batches:
            yield _checked(network, batch)
        return
    waiting: dict[str, Tensor] = {}
    waiting_labels: Tensor | None = None
    for batch in batches:
        inputs, labels = _checked(network, batch)
        alike = waiting and _alike(waiting, inputs, waiting_labels, labels)
        if waiting and not alike:
            yield waiting, waiting_labels
        if alike:
            inputs = {name: torch.cat([waiting[name], inputs[name]]) for name in inputs}
            if labels is not None and waiting_labels is not None:
                labels = torch.cat([waiting_labels, labels])
        length = len(next(iter(inputs.values())))
        for start in range(0, length - length % size, size):
            end = start + size
            yield (
                {name: value[start:end] for name, value in inputs.items()},
                None if labels is None else labels[start:end],
            )
        rest = length - length % size
        waiting = {name: value[rest:] for name, value in inputs.items()} if rest < length else {}
        waiting_labels = None if labels is None else labels[rest:]
    if waiting:
        yield waiting, waiting_labels


def chunk_size(network: Network, most: int) -> int:
    """How many examples are run at once: a power of two, so that batches of one are cut without copies.

    Args:
        network: whose values should take no more than ``BYTES`` each.
        most: 1 or more.
    """
    fit = max(min(BYTES // largest_value(network), most), 1)
    return most if fit == most else 1 << (fit.bit_length() - 1)


def largest_value(network: Network) -> int:
    """Bytes of the largest value inside a network for one example, at the sizes of those that it was traced with."""
    nodes = [node for node in network.traced.module.graph.nodes if node.op != "get_attr"]
    values = [node.meta.get("val") for node in nodes]
    sizes = [prod(hint(n) for n in v.shape) * 4 for v in values if isinstance(v, Tensor)]
    return max(max(sizes, default=1) // len(next(iter(network.example.values()))), 1)


def _alike(
    one: Mapping[str, Tensor],
    two: Mapping[str, Tensor],
    first: Tensor | None,
    second: Tensor | None,
) -> bool:
    if (first is None) != (second is None):
        raise DataError("some batches have labels and some have none; give all of them or none")
    if first is not None and second is not None and first.shape[1:] != second.shape[1:]:
        return False
    return all(one[name].shape[1:] == two[name].shape[1:] for name in one)


def _checked(network: Network, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
    inputs, labels = batch if isinstance(batch, tuple) else (batch, None)
    missing = [name for name in network.traced.inputs if name not in inputs]
    if missing:
        raise DataError(
            f"data: no input {', '.join(missing)}; there are {', '.join(inputs) or 'none'}"
        )
    chosen = {name: inputs[name] for name in network.traced.inputs}
    lengths = {name: len(value) for name, value in chosen.items()}
    if labels is not None:
        lengths["labels"] = len(labels)
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise DataError(f"data: different numbers of examples: {counts}")
    expected = len(next(iter(network.example.values())))
    if not network.traced.batched and set(lengths.values()) != {expected}:
        raise DataError(
            f"{network.name}: its batch size is fixed at {expected}, the data come in batches of {lengths[next(iter(chosen))]}"
        )
    return chosen, labels
