"""The examples that steps without training look at: few, spread over the data, in batches that the network takes."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from tinier.data.base import Examples
from tinier.data.check import check_labels, runs
from tinier.errors import InputError
from tinier.network import Network
from tinier.recovery.base import FeatureLoss, Loss
from tinier.recovery.settings import Recovered
from tinier.recovery.synthetic import synthetic_inputs
from tinier.statistics import Statistics
from tinier.verbs.smaller import examples_of

CALIBRATION = 512  # examples that criteria and compensation see
SYNTHETIC = 512  # inputs that are made up where there are no data
BATCH = 64


def calibration(data: Any, network: Network) -> Examples:
    """At most 512 examples, spread over the data, which may be sorted by class.

    Raises:
        DataError: there are none, the network does not run on them, or they are not finite.
    """
    examples = examples_of(data, network)
    if len(examples) > CALIBRATION:
        examples = examples.subset([i * len(examples) // CALIBRATION for i in range(CALIBRATION)])
    runs(examples, network)
    return examples


def training(
    data: Any, network: Network, losses: Sequence[Loss | FeatureLoss] | None = None
) -> Examples:
    """All examples, checked as those of ``calibration``; the labels too, where a loss needs them."""
    examples = examples_of(data, network)
    outputs, labels = runs(examples, network), examples.labels()
    if outputs and labels is not None and any(loss.needs_labels for loss in losses or ()):
        check_labels(labels, outputs[0])
    return examples


def trained_on(
    data: Any,
    network: Network,
    teacher: Network,
    losses: Sequence[Loss | FeatureLoss] | None,
    seed: int,
) -> tuple[Examples, tuple[str, ...]]:
    """The examples to train on, as of ``training``, and a note: made up from the teacher's batch norms where ``data`` is None.

    Raises:
        InputError: there are no data, and nothing can be made up.
        DataError: the data cannot be trained on.
    """
    if data is not None:
        return training(data, network, losses), ()
    examples = synthetic_inputs(teacher, SYNTHETIC, seed=seed)
    note = (
        f"without data: trained on {SYNTHETIC} synthetic inputs with the statistics of the original's batch norms; "
        "what that is worth on real data is not measured"
    )
    return training(examples, network, losses), (note,)


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


def ended_early(done: Recovered) -> list[str]:
    """A note where training ended before its time.

    Raises:
        InputError: it ended before it began.
    """
    if done.stopped and not done.epochs:
        raise InputError(f"nothing was trained: {done.stopped}")
    return [f"training ended early: {done.stopped}"] if done.stopped else []
