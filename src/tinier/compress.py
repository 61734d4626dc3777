"""The main job: the best version of a network inside the limits, measured on the real runtime, its loss certified."""

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tinier.data.base import Examples
from tinier.errors import DataError, InputError, OutputError
from tinier.measure.machine import WIDTH, default_threads, machine, width_for
from tinier.measure.metrics import Metric
from tinier.measure.metrics import metric as metric_of
from tinier.network import Example
from tinier.output import FULL, check_output
from tinier.progress import Progress, Silent
from tinier.recovery.output_mse import OutputMSE
from tinier.report.folder import write
from tinier.search.candidate import Limits, Result
from tinier.search.certificate import least_examples
from tinier.search.driver import Search
from tinier.search.judge import Judge
from tinier.search.parts import Parts
from tinier.search.proof import conclude
from tinier.search.workshop import Workshop
from tinier.sources.load import load_for
from tinier.targets.base import targets_for
from tinier.units import parse_bytes, parse_drop, parse_milliseconds, parse_seconds
from tinier.version import VERSION

EVALUATED = 64  # examples in one run while quality is measured


def compress(
    model: Any,
    data: Any,
    *,
    example: Example | None = None,
    train: Any = None,
    certify: Any = None,
    metric: str | Callable[..., Any] | None = None,
    max_drop: float | str | None = None,
    max_latency: float | str | None = None,
    max_size: int | str | None = None,
    target: str | Sequence[str] = "cpu",
    budget: float | str = "10m",
    out: str | Path | None = None,
    batch: int = 1,
    threads: int | None = None,
    delta: float = 0.05,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Find, measure and certify the best version of a model inside the limits.

    Args:
        model: an ``nn.Module``, the path of an ONNX file, or of a Hugging Face directory; never changed.
        data: examples to judge by: a path (.npz, folder of class folders, .csv, .jsonl, .parquet), "module:function", a ``Dataset``,
            a ``DataLoader`` or arrays. 30 % of it compares candidates, 70 % certifies, split by ``seed``.
        example: example inputs of an ``nn.Module``: a tensor, a tuple or a dict; taken from the data if None.
        train: examples to recover pruned networks with; without it nothing is trained.
        certify: examples for the certificate alone; then all of ``data`` compares candidates.
        metric: "accuracy", "agreement" (with the original), a torchmetrics name, "module:function" or a function. Accuracy where there
            are labels, agreement where there are none.
        max_drop: greatest loss of the metric in its own units (0.01 or "1%"). 1 % if no limit is given at all.
        max_latency: milliseconds, or text with a unit ("5ms").
        max_size: bytes, or text with a unit ("4MB").
        target: "cpu" (every installed runtime, the fastest wins), or names of runtimes.
        budget: seconds, or text with a unit ("10m").
        out: folder for the result; ``Result.save`` names one later if None.
        batch: batch size that is timed.
        threads: of the runtimes; the cores of this process if None.
        delta: the certificate is wrong with at most this probability.
        seed: of the split, the training and the timing order.
        progress: receives what happens; silent if None.
        **options: how data are read: ``mean``, ``std``, ``max_length``.

    Returns:
        The result; printing it shows the table. ``met`` is False when no candidate keeps the limits: ``best`` is the nearest then.

    Raises:
        InputError: something that was handed in is wrong; nothing has been written.
        MissingError: an optional dependency is needed; the message has the install command.

    Cost:
        About ``budget``, and as long as it takes to build the candidates if that is longer.
    """
    started = time.monotonic()
    progress = progress or Silent()
    limits = _limits(max_drop, max_latency, max_size)
    seconds = parse_seconds(budget)
    targets = {one.name: one for one in targets_for(target)}
    if not targets:
        raise InputError("no runtime is installed: pip install 'tinier[onnxruntime]'")
    if not 0 < delta < 1:
        raise InputError(f"delta is {delta}; a probability between 0 and 1 is needed, such as 0.05")
    for name, value in (("batch", batch), ("threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; 1 or more is needed")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}; a number of 0 or more is needed")
    folder = check_output(out) if out is not None else None

    # Everything that was handed in is looked at before anything long starts.
    with progress.task("reading model and data"):
        network = load_for(model, example, data)
        parts = Parts.of(network, data, train, certify, seed, options)
        judged = metric_of(
            metric or ("accuracy" if parts.searched.labelled else "agreement"),
            parts.searched.labelled,
        )
    _enough(limits, judged, len(parts.unseen), len(parts.searched), delta)
    for note in (*network.notes, *parts.searched.notes, *parts.notes):
        progress.say(note)
    fixed = None if network.traced.batched else len(next(iter(network.example.values())))

    with _working_folder() as work, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        workshop = Workshop(
            original=network,
            calibration=parts.train or parts.searched,
            train=parts.train,
            targets=targets,
            folder=work,
            threads=threads or default_threads(),
            batch=fixed or batch,
            saturation_free=not machine().vnni,
            seed=seed,
            progress=progress,
            losses=(OutputMSE(),) if judged.classifies is False else None,
            # Whichever runtime wins is not known where all are tried.
            width=WIDTH if target == "cpu" else max(map(width_for, targets.values())),
        )
        searched = Judge(network, parts.searched, judged, fixed or EVALUATED, progress)
        unseen = Judge(
            network, parts.unseen, judged, fixed or EVALUATED, progress, "certification part"
        )
        facts = _facts(workshop, searched, unseen, delta, seconds, parts, options)
        search = Search(workshop, searched, limits, started + seconds, progress)
        table = search.run()
        result = conclude(table, limits, workshop, searched, unseen, delta)
        result.interrupted = result.interrupted or search.interrupted
        result.facts.update(facts, seconds=time.monotonic() - started)
        if search.noisy:
            result.facts["timing"] = (
                "the machine was busy: intervals are wide, ratios are by their careful ends"
            )
        result.facts["compensated"] = sorted(workshop.compensated)
        result.facts["recovery"] = {f"{keep:g}": done for keep, done in workshop.trained.items()}
        if folder is None:
            kept = tempfile.mkdtemp(prefix="tinier-result-")
            weakref.finalize(result, shutil.rmtree, kept, ignore_errors=True)
            folder = Path(kept) / "result"
        if result.best is not None:
            try:
                _save(result, folder, workshop, unseen)
            except KeyboardInterrupt:
                result.interrupted = True
                _save(result, folder, workshop, unseen)  # it takes seconds; a second Ctrl-C ends it
    return result


@contextmanager
def _working_folder() -> Iterator[Path]:
    """A folder for what is built on the way; it vanishes with all that is in it."""
    try:
        with tempfile.TemporaryDirectory(prefix="tinier-") as work:
            yield Path(work)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OutputError(
            f"no space left in {tempfile.gettempdir()}, where candidates are built; free some, or set TMPDIR to "
            "a folder on another disk"
        ) from error


def _limits(
    max_drop: float | str | None,
    max_latency: float | str | None,
    max_size: int | str | None,
) -> Limits:
    if max_drop is None and max_latency is None and max_size is None:
        max_drop = 0.01
    return Limits(
        None if max_drop is None else parse_drop(max_drop),
        None if max_latency is None else parse_milliseconds(max_latency),
        None if max_size is None else parse_bytes(max_size),
    )


def _enough(limits: Limits, judged: Metric, unseen: int, searched: int, delta: float) -> None:
    """Refuse a limit that not even perfect agreement on so few examples could certify, and one that says nothing."""
    if limits.max_drop is None or judged.bounds is None:
        return
    spread = judged.bounds[1] - judged.bounds[0]
    if limits.max_drop >= spread:
        raise InputError(
            f"max-drop {limits.max_drop:g} allows everything: {judged.name} goes from {judged.bounds[0]:g} to "
            f"{judged.bounds[1]:g}; one point is 1% or 0.01"
        )
    needed = least_examples(limits.max_drop / spread, delta)
    if needed is not None and unseen < needed:
        whole = -(-needed * (unseen + searched) // unseen)
        raise DataError(
            f"{unseen:,} examples certify, of {unseen + searched:,} in all; a loss of at most {limits.max_drop:g} needs {needed:,} even "
            f"if every answer agrees: give about {whole:,} examples, or allow a greater loss"
        )


def _facts(
    workshop: Workshop,
    searched: Judge,
    unseen: Judge,
    delta: float,
    budget: float,
    parts: Parts,
    options: dict[str, Any],
) -> dict[str, Any]:
    """What a reader needs to repeat the run, and to believe it."""
    here = machine()
    return {
        "model": workshop.original.name,
        "metric": searched.metric.name,
        "higher_is_better": searched.metric.higher_is_better,
        "points": searched.metric.bounds == (0.0, 1.0),
        "data": parts.searched.origin or "Python objects",
        "search_examples": len(parts.searched),
        "certify_examples": len(parts.unseen),
        "train_examples": len(parts.train) if parts.train else None,
        "data_parts": {
            "search": _part(parts.searched),
            "certify": _part(parts.unseen),
            "train": _part(parts.train) if parts.train else None,
            "split": parts.fractions and list(parts.fractions),
            "seed": workshop.seed,
            "batch": unseen.batch,
            "options": {key: value for key, value in options.items() if value is not None},
        },
        "batch": workshop.batch,
        "threads": workshop.threads,
        "seed": workshop.seed,
        "delta": delta,
        "budget": budget,
        "machine": f"{here.cpu}, {here.cores} cores, {', '.join(here.flags)}",
        "runtimes": {
            name: here.runtimes[name].version for name in workshop.targets if name in here.runtimes
        },
        "versions": {"tinier": VERSION, "torch": torch.__version__, "python": here.python},
        "original_bytes": sum(
            tensor.numel() * tensor.element_size()
            for tensor in workshop.original.module.state_dict().values()
        ),
    }


def _part(examples: Examples) -> dict[str, Any]:
    return {"origin": examples.origin, "examples": len(examples), "sha256": examples.digest()}


def _save(result: Result, folder: Path, workshop: Workshop, unseen: Judge) -> None:
    best = result.best
    assert best is not None
    network, plan = workshop.build(best.variant)
    scores = {}
    if best.certified is not None and best.certified.scores is not None:
        assert unseen.original.scores is not None
        scores = {"original": unseen.original.scores, "artifact": best.certified.scores}
        if unseen.reference is not None:
            scores["reference"] = unseen.reference[0]
    write(
        result,
        folder,
        target=workshop.targets[best.target],
        network=network,
        plan=plan,
        trainable=workshop.pruned(best.variant.keep)[0],
        source=workshop.original.folder,
        scores=scores,
    )
