"""Examples as they are, in small batches, for methods that run a network operator by operator."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tinier.errors import DataError, InputError
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.statistics.chunks import Batch, chunk_size, chunks, largest_value

CHUNK = 16  # examples that one operator runs on at once at most
MEMORY = 2 * 2**30  # bytes that the values of all examples may take
ALIVE = 8  # times the largest value that are alive in the float and the quantized graph


def examples(
    network: Network, batches: Iterable[Batch], most: int, memory: int | None = MEMORY
) -> list[list[Tensor]]:
    """The first examples in batches of at most 16, each a list of inputs in the order of the graph.

    Args:
        network: whose inputs they are.
        batches: input name → tensor, or pairs of these and labels.
        most: examples; less where the values inside the network would take more than ``memory``.
        memory: bytes; None for no limit, where not all values are kept.

    Raises:
        DataError: there are none, or an input is missing.
    """
    result: list[list[Tensor]] = []
    count = 0
    if memory is not None:
        most = min(most, max(memory // (largest_value(network) * ALIVE), 1))
    for inputs, _ in chunks(network, batches, chunk_size(network, CHUNK)):
        if count >= most:
            break
        result.append([inputs[name] for name in network.traced.inputs])
        count += len(result[-1][0])
    if not result:
        raise DataError(f"{network.name}: no examples; a hundred or more are needed")
    return result


def samples_of(
    network: Network,
    statistics: Statistics | None,
    most: int,
    what: str,
    memory: int | None = MEMORY,
) -> list[list[Tensor]]:
    """The examples inside statistics.

    Raises:
        InputError: there are none.
    """
    if statistics is None or not statistics.samples:
        raise InputError(f"{what} needs examples: statistics=Statistics({{}}, n, samples=batches)")
    return examples(network, statistics.samples, most, memory)


def spread(network: Network, batches: Sequence[Batch], most: int) -> list[dict[str, Tensor]]:
    """At most so many examples, evenly from all batches; whole batches, at least one, where the batch size is fixed.

    Args:
        network: whose inputs they are.
        batches: input name → tensor, or pairs of these and labels.
        most: 1 or more.
    """
    sizes = [len(next(iter(_inputs(batch).values()))) for batch in batches]
    if not network.traced.batched:
        step = max(-(-sum(sizes) // most), 1)
        return [_inputs(batch) for batch in batches[::step]]
    every = max(-(-sum(sizes) // most), 1)
    start, result = 0, list[dict[str, Tensor]]()
    for batch, size in zip(batches, sizes, strict=True):
        chosen = slice(-start % every, None, every)
        start += size
        part = {name: value[chosen] for name, value in _inputs(batch).items()}
        if len(next(iter(part.values()))):
            result.append(part)
    return result


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return dict(batch[0] if isinstance(batch, tuple) else batch)


def relative_error(
    expected: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Tensor]]
) -> float:
    """√(Σ (y − ŷ)² / Σ y²) over all float outputs, where y is finite.

    Args:
        expected: y, the outputs for each batch.
        found: ŷ, of the same shapes.
    """
    error = total = 0.0
    for want, got in zip(expected, found, strict=True):
        for y, z in zip(want, got, strict=True):
            if y.is_floating_point():
                fine = torch.isfinite(y)
                error += float((y[fine].double() - z[fine].double()).square().sum())
                total += float(y[fine].double().square().sum())
    return (error / total) ** 0.5 if total else float(error > 0)
