"""What the search looks at: variants of the network, and each variant on each runtime."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinier.errors import OutputError
from tinier.measure.latency import Latency
from tinier.measure.memory import Memory
from tinier.measure.parity import Parity
from tinier.measure.quality import Quality
from tinier.output import check_output, whole
from tinier.search.certificate import Certificate
from tinier.targets.base import Artifact


@dataclass(frozen=True)
class Variant:
    """One way to make the network smaller, whatever it runs on.

    Attributes:
        keep: share of the MACs that pruning keeps; 1 is no pruning.
        ranges: rule for the quantization ranges ("minmax", "mse"); empty is float.
    """

    keep: float = 1.0
    ranges: str = ""

    @property
    def name(self) -> str:
        """What tables call it."""
        parts = []
        if self.keep < 1:
            parts.append(f"pruned, {round(100 * (1 - self.keep))} % fewer MACs")
        if self.ranges:
            parts.append(
                f"int8 ({ {'minmax': 'min-max', 'mse': 'MSE'}.get(self.ranges, self.ranges) } ranges)"
            )
        return ", ".join(parts) or "float"

    @property
    def slug(self) -> str:
        """A name for files."""
        parts = [f"macs{round(100 * self.keep)}"] if self.keep < 1 else []
        return "-".join([*parts, f"int8-{self.ranges}" if self.ranges else "float32"])


@dataclass
class Candidate:
    """A variant on a runtime, with everything that was measured of it.

    Attributes:
        variant: what was done to the network.
        target: name of the runtime.
        status: "waiting", "dropped" (with the reason), "front", "taken", or "original".
        reason: why it was dropped or taken, in one sentence.
        recovered: whether it was trained after pruning.
        original: whether it is the unchanged network (its float form on some runtime).
        artifact: the files; None when the target refused.
        latency: milliseconds at the batch size and threads of the run.
        beside: runtime → latency of the original in the same interleaved run: what this latency is compared with.
        memory: peak of a fresh process.
        parity: the artifact against its simulation.
        quality: the metric on the search part of the data.
        loss: how much worse than the original on the same examples, positive is worse, in units of the metric.
        certified: the metric on the certification part.
        certificate: on the certification part; None when it was not tested.
    """

    variant: Variant
    target: str
    status: str = "waiting"
    reason: str = ""
    recovered: bool = False
    original: bool = False
    artifact: Artifact | None = None
    latency: Latency | None = None
    beside: Mapping[str, Latency] = field(default_factory=dict, repr=False)
    memory: Memory | None = None
    parity: Parity | None = None
    quality: Quality | None = None
    loss: float | None = None
    certified: Quality | None = None
    certificate: Certificate | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        kind = f"{self.variant.name}, recovered" if self.recovered else self.variant.name
        return "original" if self.original else kind

    @property
    def size(self) -> int | None:
        """Bytes on disk."""
        return self.artifact.size if self.artifact else None

    @property
    def coordinates(self) -> tuple[float, float, int] | None:
        """Loss, milliseconds, bytes; None while one of them is not measured."""
        if self.loss is None or self.latency is None or self.size is None:
            return None
        return self.loss, self.latency.median, self.size

    def drop(self, reason: str) -> None:
        """Leave the race, saying why."""
        self.status, self.reason = "dropped", reason


@dataclass(frozen=True)
class Limits:
    """What the user asked for; None is no limit.

    Attributes:
        max_drop: greatest loss of the metric, in its units (0.01 is one point of accuracy).
        max_latency: milliseconds.
        max_size: bytes.
    """

    max_drop: float | None = None
    max_latency: float | None = None
    max_size: int | None = None


@dataclass
class Result:
    """The answer of a search.

    Attributes:
        table: every candidate, the originals first.
        best: the one taken, or the nearest miss; None when nothing was measured.
        met: whether ``best`` keeps all limits.
        reason: the answer in one sentence.
        limits: what was asked.
        facts: what a report needs besides: metric, data, machine, threads, batch, seed, versions, seconds.
        folder: where it was saved; a folder that nobody has named vanishes with the result.
        interrupted: whether Ctrl-C ended the search early.
    """

    table: list[Candidate]
    best: Candidate | None
    met: bool
    reason: str
    limits: Limits
    facts: dict[str, Any]
    folder: Path | None = None
    interrupted: bool = False

    def save(self, folder: str | Path) -> Path:
        """Copy the result's folder.

        Raises:
            OutputError: ``folder`` cannot be written, or was not made by tinier.
        """
        if self.folder is None:
            raise OutputError("nothing was measured, so that there is nothing to save")
        path = check_output(folder)
        with whole(path) as made:
            shutil.copytree(self.folder, made, dirs_exist_ok=True)
        return path

    def __str__(self) -> str:
        lines = [f"{'kept' if self.met else 'NOT kept'}: {self.reason}"]
        for c in self.table:
            cost = f"{c.latency.median:.3g} ms, {c.size:,} bytes" if c.latency and c.size else "–"
            loss = f"loss {c.loss:.4g}" if c.loss is not None else "–"
            lines.append(f"{c.status:8} {c.name} on {c.target}: {cost}, {loss}; {c.reason}")
        return "\n".join(lines)

    @property
    def original(self) -> Candidate | None:
        """The float network on the fastest runtime: what candidates are compared with."""
        originals = [c for c in self.table if c.original and c.latency]
        return min(originals, key=lambda c: c.latency.median, default=None)  # type: ignore[union-attr]

    @property
    def front(self) -> list[Candidate]:
        """The measured candidates that no other beats in loss, latency and size at once, fastest first."""
        measured = [c for c in self.table if c.status != "dropped" and c.coordinates]
        kept = [c for c in measured if not any(beats(other, c) for other in measured)]
        return sorted(kept, key=lambda c: c.latency.median)  # type: ignore[union-attr]


def beats(a: Candidate, b: Candidate) -> bool:
    """Whether ``a`` is nowhere worse than ``b`` in loss, latency and size, and somewhere better."""
    x, y = a.coordinates, b.coordinates
    if x is None or y is None or a is b:
        return False
    return x != y and all(p <= q for p, q in zip(x, y, strict=True))
