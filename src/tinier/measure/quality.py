"""The quality of a network or an artifact on examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tinier.data.base import Examples
from tinier.errors import DataError
from tinier.measure.metrics import Metric, metric, predictions

__all__ = ["Metric", "Quality", "evaluate", "metric"]

Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


@dataclass(frozen=True, eq=False)
class Quality:
    """What an evaluation found.

    Attributes:
        value: the metric over all examples.
        scores: (n,) float64, one for each example, whose mean is the value; None where the metric is no such mean.
        answers: the class that each example was given, (n,) or (n, positions, …) int64; None where the first
            output has no classes.
        binary: whether every score is 0 or 1 by the metric's nature, so that flips can be counted.
        outputs: all outputs, only if they were asked for.
    """

    value: float
    scores: np.ndarray | None
    answers: np.ndarray | None
    binary: bool = False
    outputs: list[np.ndarray] | None = None


def evaluate(
    run: Run,
    examples: Examples,
    metric: Metric,
    *,
    batch: int = 64,
    reference: Sequence[np.ndarray] | None = None,
    progress: Callable[[int, int], None] | None = None,
    keep_outputs: bool = False,
) -> Quality:
    """Run every example once and score the answers.

    Args:
        run: inputs by name → outputs, dimension 0 of each is the example; an artifact's session or a network.
        examples: what to run.
        metric: how answers are scored.
        batch: examples in one run; the last run may have fewer.
        reference: the original's outputs on the same examples, in order; they stand in for labels where the data
            have none, or where the metric compares with the original.
        progress: called with examples done and examples in all.
        keep_outputs: whether the result holds all outputs.

    Returns:
        Value, scores and answers.

    Raises:
        DataError: no examples; no labels and no reference; an output that is NaN, with the example; a metric that is NaN.

    Cost:
        One run of every example. Memory for scores and answers only, where the metric is a mean over examples.
    """
    if not len(examples):
        raise DataError("there are no examples to evaluate")
    given = reference is not None and (metric.against_original or not examples.labelled)
    if not given and (metric.against_original or not examples.labelled):
        raise DataError(
            f"{metric.name} needs {'the outputs of the original' if metric.against_original else 'labels'}"
            "; give labels in the data, or use the metric agreement"
        )
    running = metric.running()
    scores: list[np.ndarray] | None = []
    answers: list[np.ndarray] = []
    kept: list[list[np.ndarray]] = []
    done = 0
    for inputs, labels in examples.batches(batch):
        count = len(next(iter(inputs.values())))
        outputs = run({name: value.numpy() for name, value in inputs.items()})
        refuse_nan(outputs, done, count)
        if given and reference is not None:
            truth = metric.reference([output[done : done + count] for output in reference])
        else:
            assert isinstance(labels, torch.Tensor)  # examples.labelled
            truth = labels.numpy()
        each = metric.scores(outputs, truth) if scores is not None else None
        if each is None:
            scores = None
        elif scores is not None:
            scores.append(each)
        running.update(outputs, truth)
        answers.append(predictions(outputs[0]))
        if keep_outputs:
            kept.append(outputs)
        done += count
        if progress is not None:
            progress(done, len(examples))
    value = running.compute()
    if not np.isfinite(value):
        raise DataError(
            f"{metric.name} is {value} on these {done} examples; it is not defined for them (a class "
            "that never occurs, constant answers, or outputs that overflow)"
        )
    every = np.concatenate(scores) if scores is not None else None
    if every is not None and abs(every.mean() - value) > 1e-6 * max(1.0, abs(value)):
        # A batch can look like a mean by chance; the whole set tells.
        every = None
    return Quality(
        value,
        every,
        _joined(answers),
        metric.binary and every is not None and bool(np.isin(every, (0.0, 1.0)).all()),
        [np.concatenate(column) for column in zip(*kept, strict=True)] if keep_outputs else None,
    )


def whole_batches(run: Run, size: int) -> Run:
    """Run every batch at one size, for networks whose batch size is fixed: the last row is repeated, what it gives cut off again."""

    def padded(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        count = len(next(iter(inputs.values())))
        if count == size:
            return run(inputs)
        rows = np.minimum(np.arange(size), count - 1)
        return [
            output[:count] if output.ndim else output
            for output in run({name: value[rows] for name, value in inputs.items()})
        ]

    return padded


def refuse_nan(outputs: Sequence[np.ndarray], start: int, count: int) -> None:
    """Raise DataError for outputs with NaN, or with another number of rows than the batch.

    Args:
        outputs: of one batch.
        start: index of its first example in the data.
        count: examples in the batch.
    """
    for number, output in enumerate(outputs):
        if number == 0 and (output.ndim == 0 or len(output) != count):
            raise DataError(
                f"the network's first output has shape {output.shape} for a batch of {count}; "
                "dimension 0 must be the example"
            )
        if output.dtype.kind != "f" or not np.isnan(output).any():
            continue
        rows = np.isnan(output).reshape(len(output), -1).any(1) if output.ndim else np.array([True])
        raise DataError(
            f"the network's output {number} is NaN for example {start + int(rows.argmax())}; look at "
            "that example, and at the network in float32"
        )


def _joined(answers: list[np.ndarray]) -> np.ndarray | None:
    # Texts padded to the longest of their batch give answers of several lengths; those are not kept.
    return np.concatenate(answers) if len({part.shape[1:] for part in answers}) == 1 else None
