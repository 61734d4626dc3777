"""Where candidates are built: each variant of the network once, each of its artifacts once."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from tinier.data.base import Examples
from tinier.edits.base import Plan
from tinier.errors import InputError, RefusedError
from tinier.measure.machine import WIDTH
from tinier.measure.parity import parity
from tinier.methods.channel_pruning import ChannelPruning
from tinier.methods.quantization import Quantization
from tinier.network import Network
from tinier.progress import Progress
from tinier.recovery.base import Loss
from tinier.recovery.compensation import compensate
from tinier.recovery.loop import recover
from tinier.search.candidate import Candidate, Variant
from tinier.statistics import Statistics, collect
from tinier.targets.base import Session, Target

CALIBRATION = 512  # examples from which ranges are taken
FEW = 16  # examples from which they are taken to time a network
QUICK = 5.0  # seconds of calibration that are spent even to time a network
LONGEST = (
    60.0  # seconds of calibration at the most; fewer examples are used on networks that take longer
)
BATCH = 64  # examples a step while calibrating
PASSES = 8  # runs of the original that compensation takes as long as


@dataclass
class Workshop:
    """Builds variants from one original and lowers them; everything is made once and kept.

    Attributes:
        original: the network as the user brought it.
        calibration: examples for the quantization ranges, never those of the certificate.
        train: examples for recovery, or None.
        targets: the runtimes, by name.
        folder: where artifacts are written.
        threads: of every session.
        batch: the batch size that is timed.
        saturation_free: shrink weights that would saturate the kernels of a CPU without VNNI.
        seed: of everything random.
        losses: what recovery minimizes; None to choose by the original's output.
        width: multiple that the widths of pruned networks are rounded to.
    """

    original: Network
    calibration: Examples
    train: Examples | None
    targets: dict[str, Target]
    folder: Path
    threads: int
    batch: int
    saturation_free: bool
    seed: int
    progress: Progress
    losses: tuple[Loss, ...] | None = None
    width: int = WIDTH
    trained: dict[float, dict[str, float]] = field(default_factory=dict)
    compensated: set[float] = field(default_factory=set)
    _tried: set[float] = field(default_factory=set)
    _rough: set[float] = field(default_factory=set)
    _rough_built: set[tuple[Variant, str]] = field(default_factory=set)
    _pruned: dict[float, tuple[Network, Plan]] = field(default_factory=dict)
    _statistics: dict[float, Statistics] = field(default_factory=dict)
    _networks: dict[Variant, tuple[Network, Plan]] = field(default_factory=dict)
    _onnx: dict[Variant, Path] = field(default_factory=dict)
    _sessions: dict[tuple[Variant, str], Session] = field(default_factory=dict)

    def pruned(self, keep: float) -> tuple[Network, Plan]:
        """The float network with ``keep`` of its MACs, and the plan that made it; trained if ``recover`` was called.

        Raises:
            RefusedError: the network cannot be pruned that far.
        """
        if keep not in self._pruned:
            plan = Plan() if keep == 1 else self._method(keep).plan(self.original)
            network = self.original if keep == 1 else plan.apply(self.original)
            self._pruned[keep] = (network, plan)
        return self._pruned[keep]

    def _method(self, keep: float) -> ChannelPruning:
        return ChannelPruning(keep=keep, round_to=self.width)

    def refine(self, candidate: Candidate) -> bool:
        """Whether the candidate's artifact must be built anew: its ranges are of a few examples, enough to time it but not to judge it."""
        keep = candidate.variant.keep
        if keep in self._rough:
            self._rough.discard(keep)
            self._forget([v for v in self._networks if v.keep == keep and v.ranges])
            self._statistics.pop(keep, None)
        built = (candidate.variant, candidate.target)
        rough = built in self._rough_built
        self._rough_built.discard(built)
        return rough

    def build(self, variant: Variant, rough: bool = False) -> tuple[Network, Plan]:
        """The network of a variant and the plan from the original to it.

        Args:
            variant: what to build.
            rough: whether ranges from a few examples will do, where all of them would take long.

        Raises:
            RefusedError: a method cannot take the network.
        """
        if variant not in self._networks:
            network, plan = self.pruned(variant.keep)
            if variant.ranges:
                if variant.keep not in self._statistics:
                    self._statistics[variant.keep] = self._collect(network, variant.keep, rough)
                method = Quantization(ranges=variant.ranges, saturation_free=self.saturation_free)
                quantization = method.plan(network, self._statistics[variant.keep])
                network, plan = quantization.apply(network), plan + quantization
            self._networks[variant] = (network, plan)
        return self._networks[variant]

    def _collect(self, network: Network, keep: float, rough: bool) -> Statistics:
        begin = time.monotonic()
        statistics = collect(network, self._calibration(FEW))
        each = (time.monotonic() - begin) / FEW
        if rough and each * CALIBRATION > QUICK:
            self._rough.add(keep)
            return statistics
        count = min(CALIBRATION, max(FEW, int(LONGEST / max(each, 1e-9))))
        with self.progress.task("calibrating", None):
            return collect(network, self._calibration(count))

    def _forget(self, variants: list[Variant]) -> None:
        for variant in variants:
            del self._networks[variant]
            self._onnx.pop(variant, None)

    def lower(self, candidate: Candidate, rough: bool = False) -> None:
        """Write the candidate's artifact and prove that it computes what the network does; a refusal drops the candidate."""
        target = self.targets[candidate.target]
        try:
            network, _ = self.build(candidate.variant, rough)
            refusal = target.refuses(network)
            if refusal:
                candidate.drop(f"{candidate.target} cannot take it: {refusal}")
                return
            if candidate.variant.ranges and candidate.variant.keep in self._rough:
                self._rough_built.add((candidate.variant, candidate.target))
            # A runtime may have mapped the file that is written again.
            self._sessions.pop((candidate.variant, candidate.target), None)
            folder = self.folder / candidate.variant.slug / candidate.target
            folder.mkdir(parents=True, exist_ok=True)
            candidate.artifact = target.lower(network, folder, self._onnx.get(candidate.variant))
            session = target.open(candidate.artifact.files[0], self.threads)
        except (RefusedError, InputError) as error:
            # Of an artifact that was just written, InputError means that the runtime has no kernel for an operator.
            candidate.drop(str(error))
            return
        if candidate.artifact.files[0].suffix == ".onnx":
            self._onnx[candidate.variant] = candidate.artifact.files[0]
        self._sessions[candidate.variant, candidate.target] = session
        sizes = (1, 8) if network.traced.batched else (len(next(iter(network.example.values()))),)
        try:
            candidate.parity = parity(network, session, [self.inputs(size) for size in sizes])
        # What runtimes raise has no common base.
        except Exception as error:
            candidate.drop(
                f"{candidate.target} cannot run it: {' '.join(str(error).split())[:200]}"
            )
            return
        if not candidate.parity.passed:
            candidate.drop(f"differs from its simulation: {candidate.parity.reason}")

    def session(self, candidate: Candidate) -> Session:
        """The open session of a lowered candidate."""
        return self._sessions[candidate.variant, candidate.target]

    def inputs(self, size: int) -> dict[str, Tensor]:
        """The first ``size`` calibration examples: real inputs, so that data-dependent speed is the real one."""
        rows = [i % len(self.calibration) for i in range(size)]
        inputs, _ = next(self.calibration.subset(rows).batches(size))
        return inputs

    def compensate(self, keep: float) -> None:
        """Fit the layers of the pruned network again, once; what was built from it is built anew when next asked for."""
        if keep == 1 or keep in self._tried:
            return
        self._tried.add(keep)
        network, plan = self.pruned(keep)
        begin = time.monotonic()
        for inputs in self._calibration(FEW):
            self.original(inputs)
        each = PASSES * (time.monotonic() - begin) / FEW
        count = min(CALIBRATION, max(FEW, int(LONGEST / max(each, 1e-9))))
        with self.progress.task(f"compensating {Variant(keep).name}", None):
            fitted = compensate(
                network, self.original, plan, self._calibration(count), seed=self.seed
            )
        self._pruned[keep] = (fitted, plan)
        self.compensated.add(keep)
        self._rough.discard(keep)
        self._statistics.pop(keep, None)
        self._forget([v for v in self._networks if v.keep == keep])

    def recover(self, keep: float, seconds: float) -> None:
        """Train the pruned network to answer as the original does; what was built from it is built anew when next asked for."""
        assert self.train is not None
        self.compensate(keep)
        network, plan = self.pruned(keep)
        with self.progress.task(f"recovering {Variant(keep).name}", 1.0) as step:
            recovered = recover(
                network,
                self.original,
                self.train,
                losses=self.losses,
                seconds=seconds,
                batch=self._batch,
                seed=self.seed,
                progress=step,
            )
        self._pruned[keep] = (recovered.network, plan)
        self.trained[keep] = {"epochs": recovered.epochs, "seconds": recovered.seconds}
        if recovered.stopped:
            self.progress.say(f"{Variant(keep).name}: {recovered.stopped}")
        self._rough.discard(keep)
        self._statistics.pop(keep, None)
        self._forget([v for v in self._networks if v.keep == keep])

    @property
    def _batch(self) -> int:
        traced, example = self.original.traced, self.original.example
        return BATCH if traced.batched else len(next(iter(example.values())))

    def _calibration(self, count: int) -> Iterator[dict[str, Tensor]]:
        size = self._batch
        count = min(max(count, size), len(self.calibration))
        # A batch size that is fixed takes whole batches only.
        rows = range(count if self.original.traced.batched else count - count % size)
        for inputs, _ in self.calibration.subset(rows).batches(size):
            yield inputs
