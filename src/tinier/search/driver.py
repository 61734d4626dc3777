"""The search: cost first, quality second, proof last (see ``docs/compress.md``)."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tinier.errors import InputError, RefusedError
from tinier.measure.latency import interleaved
from tinier.measure.memory import peak_memory
from tinier.progress import Progress
from tinier.search.candidate import Candidate, Limits, Variant
from tinier.search.judge import Judge
from tinier.search.workshop import Workshop

NOISY = 1.5  # high end over low end of an interval of a median, beyond which the user is told
HOPELESS = 4.0  # a runtime this many times slower than the fastest is not caught up with by int8 or pruning
KEEPS = (0.75, 0.5, 0.25)  # shares of the MACs that pruning is tried at
RANGES = ("minmax", "mse")
RESERVE = 0.2  # share of the budget kept from training for measuring and certifying
SMALLER = 0.95  # share of another file's size below which a slower runtime's is worth keeping
FIRST_SHARE = 0.75  # share of the training time that is left for the network trained next
LEAST_TRAINING = 2.0  # seconds; less is not worth it


@dataclass
class Search:
    """One search over variants × runtimes under limits.

    Attributes:
        workshop: builds the candidates.
        judge: quality on the search part of the data, against the original.
        limits: what was asked.
        deadline: ``time.monotonic()`` at which the time is up.
    """

    workshop: Workshop
    judge: Judge
    limits: Limits
    deadline: float
    progress: Progress

    def __post_init__(self) -> None:
        self.table: list[Candidate] = []
        self.interrupted = False
        self.started = time.monotonic()
        self.noisy = False
        self.building = 0.0  # seconds that one candidate takes to build

    def run(self) -> list[Candidate]:
        """Every candidate with what was measured of it; Ctrl-C ends the search early and keeps what there is."""
        with self._until_interrupted():
            self._originals()
            self._costs()
            self._gate()
            self._qualities()
            self._recover()
            self._final_measurements()
        return self.table

    # Cost -------------------------------------------------------------------------------------------------------------

    def _originals(self) -> None:
        """The float network on every runtime: what everything else is compared with."""
        targets = self.workshop.targets
        with self.progress.task("original on every runtime", len(targets)) as step:
            for target in targets:
                candidate = Candidate(Variant(), target, original=True)
                self.table.append(candidate)
                self.workshop.lower(candidate)
                step.add()

    def _costs(self) -> None:
        """Lower every variant to every runtime and time them all in one interleaved run, before anything is spent on quality."""
        self._time([c for c in self.table if c.status == "waiting"], share=0.02)
        targets = self._worthwhile()
        variants = [Variant(ranges=RANGES[0])]
        for keep in KEEPS:
            variants += [Variant(keep), Variant(keep, RANGES[0])]
        begin = time.monotonic()
        with self.progress.task("building candidates", len(variants) * len(targets)) as step:
            for variant in variants:
                for target in targets:
                    candidate = Candidate(variant, target)
                    self.table.append(candidate)
                    if time.monotonic() > self.started + (1 - RESERVE) * self._budget:
                        candidate.drop("not tried: the time budget was used up")
                    else:
                        self.workshop.lower(candidate, rough=True)
                    step.add()
        self.building = (time.monotonic() - begin) / (len(variants) * len(targets))
        self._time([c for c in self.table if c.status == "waiting"], share=0.05)

    def _worthwhile(self) -> list[str]:
        """The runtimes whose time for the original is within reach of the fastest one's: what int8 or pruning can gain."""
        timed = [c for c in self.table if c.original and c.status == "waiting"]
        if not timed:
            raise RefusedError(
                "no runtime takes the original: "
                + "; ".join(f"{c.target}: {c.reason}" for c in self.table)
            )
        best = min(timed, key=_milliseconds)
        assert best.latency is not None
        highest = HOPELESS * best.latency.high  # by the intervals: a busy machine proves nothing
        slow = [c for c in timed if c.latency and c.latency.low > highest]
        for candidate in slow:
            times = _milliseconds(candidate) / _milliseconds(best)
            self.progress.say(
                f"{candidate.target} needs {times:.1f}× the time of {best.target} for the original: nothing else is built for it"
            )
        return [c.target for c in timed if c not in slow]

    def _time(self, candidates: Sequence[Candidate], share: float) -> None:
        if not candidates:
            return
        seconds = min(max(2.0, share * self._budget), 1.0 * len(candidates))
        inputs = {
            name: value.numpy() for name, value in self.workshop.inputs(self.workshop.batch).items()
        }
        with self.progress.task("timing, interleaved", seconds) as step:
            sessions = {str(i): self.workshop.session(c) for i, c in enumerate(candidates)}
            timed = interleaved(
                sessions, inputs, seconds=seconds, seed=self.workshop.seed, progress=step
            )
        for index, candidate in enumerate(candidates):
            candidate.latency = timed[str(index)]
        beside = {c.target: c.latency for c in candidates if c.original and c.latency}
        for candidate in candidates:
            candidate.beside = beside
        self.noisy = any(c.latency and c.latency.high > NOISY * c.latency.low for c in candidates)
        if self.noisy:
            self.progress.say("this machine was busy while it timed: intervals are wide")

    def _gate(self) -> None:
        """Drop what costs at least what the original costs on its best runtime, what breaks a limit, and the slower runtimes."""
        originals = [c for c in self.table if c.original and c.status == "waiting"]
        best = min(originals, key=_milliseconds)
        smallest = min(c.size or 0 for c in originals)
        # Where nothing keeps the limits, all stay: the nearest miss is the answer then.
        possible = any(self._inside(c) for c in [*originals, *self._waiting()])
        for candidate in self._waiting():
            assert candidate.latency is not None and candidate.size is not None
            ms = candidate.latency.median
            slower = candidate.latency.low >= best.latency.median  # type: ignore[union-attr]
            if slower and candidate.size >= smallest:
                candidate.drop(
                    f"neither faster nor smaller than the original on {best.target} "
                    f"({ms:.3g} against {_milliseconds(best):.3g} ms, timed together)"
                )
            elif possible and self.limits.max_latency and ms > self.limits.max_latency:
                candidate.drop(f"{ms:.3g} ms is over the limit of {self.limits.max_latency:g} ms")
            elif possible and self.limits.max_size and candidate.size > self.limits.max_size:
                candidate.drop(
                    f"{candidate.size:,} bytes are over the limit of {self.limits.max_size:,}"
                )
        for candidate in self._waiting():
            rivals = [c for c in self._waiting() if c.variant == candidate.variant]
            fastest = min(rivals, key=_milliseconds)
            assert candidate.size is not None and fastest.size is not None
            smaller = candidate.size < SMALLER * fastest.size
            if fastest is not candidate and not smaller:
                times = _milliseconds(candidate) / _milliseconds(fastest)
                faster = f"{times:.1f}× as fast" if times >= 1.05 else "as fast"
                candidate.drop(f"the same network is {faster} on {fastest.target}, timed together")
        for candidate in self._waiting():
            if candidate.variant.ranges:
                twin = Candidate(Variant(candidate.variant.keep, RANGES[1]), candidate.target)
                twin.latency, twin.beside = candidate.latency, candidate.beside
                self.table.append(twin)

    # Quality ----------------------------------------------------------------------------------------------------------

    def _qualities(self) -> None:
        """Quality on the search part of the originals and of all that will not be trained first."""
        training = self.workshop.train is not None
        todo = [c for c in self.table if c.original and c.status == "waiting"]
        todo += [c for c in self._waiting() if c.variant.keep == 1 or not training]
        with self.progress.task("quality on the search part", len(todo)) as step:
            for candidate in todo:
                self._quality(candidate)
                step.add()

    def _quality(self, candidate: Candidate) -> None:
        if candidate.original and candidate.target == "torch":
            candidate.quality, candidate.loss = self.judge.original, 0.0  # the reference itself
            return
        keep = candidate.variant.keep
        fitted = keep < 1 and not candidate.recovered
        if fitted:
            try:
                self.workshop.compensate(keep)
            except (RefusedError, InputError) as error:
                self.progress.say(f"{candidate.variant.name}: not compensated: {error}")
        # A twin shares the cost of its sibling, a pruned network has new weights by now: both need artifacts of their own.
        refined = self.workshop.refine(candidate)
        if candidate.artifact is None or candidate.recovered or fitted or refined:
            self.workshop.lower(candidate)
        if candidate.status == "dropped":
            return
        reason = self.judge.look(candidate, self.workshop.session(candidate), self.limits.max_drop)
        if reason:
            candidate.drop(reason)

    def _recover(self) -> None:
        """Train each pruned network that passed the gate, then judge it.

        Quality falls with the share of MACs that is cut. So the middle one is trained first: if it keeps the limit, the smaller
        ones are what matters, else the larger ones, and those that come first have more of the time.
        """
        if self.workshop.train is None:
            return
        keeps = sorted({c.variant.keep for c in self._waiting() if c.variant.keep < 1})
        if keeps:
            keeps.insert(0, keeps.pop(len(keeps) // 2))
        while keeps:
            keep = keeps.pop(0)
            mine = [c for c in self._waiting() if c.variant.keep == keep]
            # What is trained is built and judged again, and so will be what is still in the list.
            again = sum(c.variant.keep in (keep, *keeps) for c in self._waiting())
            left = self.deadline - time.monotonic() - RESERVE * self._budget - again * self.building
            seconds = left * (FIRST_SHARE if keeps else 1)
            if seconds < LEAST_TRAINING:
                for candidate in mine:
                    candidate.drop("not recovered: the time budget was used up")
                continue
            try:
                self.workshop.recover(keep, seconds)
            except (RefusedError, InputError) as error:
                for candidate in mine:
                    candidate.drop(str(error))
                continue
            with self.progress.task("quality on the search part", len(mine)) as step:
                for candidate in mine:
                    candidate.recovered = True
                    self._quality(candidate)
                    step.add()
            limit = self.limits.max_drop
            kept = limit is None or any(c.loss is not None and c.loss <= limit for c in mine)
            smaller, larger = [k for k in keeps if k < keep], [k for k in keeps if k > keep]
            keeps = smaller[::-1] + larger if kept else larger + smaller[::-1]

    # Proof ------------------------------------------------------------------------------------------------------------

    def _final_measurements(self) -> None:
        """Time what is left again, together and longer, and measure peak memory in fresh processes."""
        kept = [c for c in self.table if c.status == "waiting" and c.coordinates]
        self._time(kept, share=0.08)
        with self.progress.task("peak memory, each in a fresh process", len(kept)) as step:
            for candidate in kept:
                assert candidate.artifact is not None
                inputs = {
                    k: v.numpy() for k, v in self.workshop.inputs(self.workshop.batch).items()
                }
                try:
                    candidate.memory = peak_memory(
                        candidate.target, candidate.artifact.files[0], inputs, self.workshop.threads
                    )
                except InputError as error:  # a figure is missing, the result is not
                    self.progress.say(str(error))
                step.add()

    def _inside(self, candidate: Candidate) -> bool:
        """Whether a timed candidate keeps the limits on latency and size."""
        ms, size = self.limits.max_latency, self.limits.max_size
        fast = ms is None or _milliseconds(candidate) <= ms
        return fast and (size is None or (candidate.size or 0) <= size)

    def _waiting(self) -> list[Candidate]:
        return [c for c in self.table if c.status == "waiting" and not c.original]

    @property
    def _budget(self) -> float:
        return self.deadline - self.started

    @contextmanager
    def _until_interrupted(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted = True
            self.progress.say("interrupted: ending with the best so far")


def _milliseconds(candidate: Candidate) -> float:
    assert candidate.latency is not None
    return candidate.latency.median
