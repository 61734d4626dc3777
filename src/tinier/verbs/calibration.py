"""The examples that steps without training look at: few, spread over the data, in batches that the network takes."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tinier.data.base import Examples
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.verbs.smaller import examples_of

CALIBRATION = 512  # examples that criteria and compensation see
BATCH = 64


def calibration(data: Any, network: Network) -> Examples:
    """At most 512 examples, spread over the data, which may be sorted by class."""
    examples = examples_of(data, network)
    if len(examples) <= CALIBRATION:
        return examples
    return examples.subset([i * len(examples) // CALIBRATION for i in range(CALIBRATION)])


def labelled(
    examples: Examples, network: Network
) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """Batches of inputs and labels; whole ones only where the network's batch size is fixed."""
    size = BATCH
    if not network.traced.batched:
        size = len(next(iter(network.example.values())))
        examples = examples.subset(range(len(examples) - len(examples) % size))
    return examples.batches(size)


def batches_of(examples: Examples, network: Network) -> list[dict[str, Tensor]]:
    """Batches of inputs."""
    return [inputs for inputs, _ in labelled(examples, network)]


def few(examples: Examples, network: Network) -> Statistics:
    """A batch of examples as they are, for methods that try what a change does."""
    first = examples.subset(range(min(len(examples), BATCH)))
    return Statistics({}, len(examples), samples=tuple(batches_of(first, network)))
