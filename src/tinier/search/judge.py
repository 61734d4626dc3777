"""How good an artifact is against the original, on one part of the data."""

from functools import cached_property

import numpy as np
import torch

from tinier.data.base import Examples
from tinier.errors import DataError
from tinier.measure.metrics import Metric
from tinier.measure.quality import Quality, evaluate, whole_batches
from tinier.network import Network
from tinier.progress import Progress
from tinier.search.candidate import Candidate
from tinier.search.certificate import Certificate, certify, p_value
from tinier.targets.base import Session

FIRST = 500  # examples of the first, cheap look at quality
HOPELESS = 3.0  # standard errors beyond the limit at which a first look ends a candidate


class Judge:
    """The metric on one part of the data, for the original and for artifacts, example by example.

    Args:
        original: the network as the user brought it, run in torch.
        examples: the part; random order, so that its beginning is a fair sample.
        metric: how answers are scored.
        part: what the part is called.
        batch: examples in one run; 1 where the network's batch size is fixed.
    """

    def __init__(
        self,
        original: Network,
        examples: Examples,
        metric: Metric,
        batch: int,
        progress: Progress,
        part: str = "search part",
    ) -> None:
        self.network = original
        self.examples = examples
        self.metric = metric
        self.batch = batch
        self.progress = progress
        self.part = part

    @cached_property
    def reference(self) -> list[np.ndarray] | None:
        """The original's first output where it stands in for labels, else None."""
        if self.examples.labelled and not self.metric.against_original:
            return None
        rows = []
        run = whole_batches(self._answer, self.batch)
        with self.progress.task(f"the original on the {self.part}", len(self.examples)) as step:
            for inputs, _ in self.examples.batches(self.batch):
                rows.append(run({name: value.numpy() for name, value in inputs.items()})[0])
                step.add(len(rows[-1]))
        return [np.concatenate(rows)]

    @cached_property
    def original(self) -> Quality:
        """The original's own quality, in float32 in torch."""
        answered = self.reference
        done = 0

        def run(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            nonlocal done
            if answered is None:
                return whole_batches(self._answer, self.batch)(inputs)
            # It has answered these examples already, in this order.
            start, done = done, done + len(next(iter(inputs.values())))
            return [output[start:done] for output in answered]

        with self.progress.task(
            f"quality of the original on the {self.part}", len(self.examples)
        ) as step:
            return evaluate(
                run,
                self.examples,
                self.metric,
                batch=self.batch,
                reference=answered,
                progress=step,
            )

    def _answer(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return [output.numpy() for output in self.network(tensors)]

    def quality(self, session: Session, count: int | None = None) -> Quality:
        """The quality of an artifact on the first ``count`` examples, or on all."""
        part = self.examples.subset(range(count)) if count else self.examples
        run = whole_batches(session.run, self.batch)
        return evaluate(run, part, self.metric, batch=self.batch, reference=self.reference)

    def look(self, candidate: Candidate, session: Session, limit: float | None) -> str:
        """Fill in the candidate's quality and loss; a hopeless one is given up after a first few examples.

        Returns:
            Why it was given up; empty if it was not.
        """
        whole = self.original.scores
        try:
            if limit is not None and whole is not None and len(self.examples) > 2 * FIRST:
                quality = self.quality(session, FIRST)
                if quality.scores is not None:
                    lost = self.sign * (whole[:FIRST] - quality.scores)
                    error = max(float(lost.std()), 1 / FIRST) / FIRST**0.5
                    if lost.mean() > limit + HOPELESS * error:
                        candidate.quality, candidate.loss = quality, float(lost.mean())
                        return f"{self.said(lost.mean())} worse on the first {FIRST} examples"
            candidate.quality = self.quality(session)
        except DataError as error:
            return str(error)
        candidate.loss = self.sign * (self.original.value - candidate.quality.value)
        return ""

    def certificate(
        self, quality: Quality, limit: float | None, delta: float, tested: int = 1
    ) -> Certificate | str:
        """The certificate of an artifact from its quality on this part, or the reason why there can be none."""
        if self.original.scores is None or quality.scores is None:
            return (
                f"{self.metric.name} is not a mean over examples, so that no certificate can be given; "
                "a metric with one score for each example can be certified"
            )
        if self.metric.bounds is None:
            return (
                f"the score of one example under {self.metric.name} has no known bounds, so that no "
                "certificate can be given; a function with an attribute `bounds` can be certified"
            )
        try:
            return certify(
                self.original.scores,
                quality.scores,
                bounds=self.metric.bounds,
                limit=limit,
                delta=delta,
                higher_is_better=self.metric.higher_is_better,
                tested=tested,
            )
        except ValueError as error:  # the bounds that the metric declares are wrong
            return f"{self.metric.name}: {error}, so that no certificate can be given"

    def p_value(self, quality: Quality, limit: float, delta: float) -> float:
        """P-value of "the loss is larger than the limit" on this part; 1 where it cannot be tested."""
        if self.original.scores is None or quality.scores is None or self.metric.bounds is None:
            return 1.0
        spread = self.metric.bounds[1] - self.metric.bounds[0]
        loss = self.sign * (self.original.scores - quality.scores)
        mean = (limit / spread + 1) / 2
        return 0.0 if mean >= 1 else p_value((loss / spread + 1) / 2, mean, delta)

    @property
    def sign(self) -> int:
        """1 where a higher value is better, else −1."""
        return 1 if self.metric.higher_is_better else -1

    def said(self, loss: float) -> str:
        """A loss as people say it: points for shares, plain numbers otherwise."""
        if self.metric.bounds == (0.0, 1.0):
            return f"{100 * loss:.2f} points"
        return f"{loss:.4g}"
