"""Whether a result folder still holds: its files, what its artifact answers, and what that proves."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinier.data.base import Examples
from tinier.data.python import FUNCTION
from tinier.data.read import read
from tinier.data.split import split
from tinier.errors import DataError, InputError
from tinier.measure.machine import default_threads
from tinier.measure.metrics import Metric
from tinier.measure.metrics import metric as metric_of
from tinier.measure.quality import evaluate, whole_batches
from tinier.progress import Progress, Silent
from tinier.report import words
from tinier.report.folder import CERTIFICATE, PLAN, SCORES, WEIGHTS, sha256
from tinier.search.certificate import STEP, Certificate, Floats, certify
from tinier.search.parts import shuffled
from tinier.targets.base import known_targets, targets_for

TOLERANCE = 0.002  # share of examples whose score may differ between two CPUs, whose kernels round differently


OURS = ("tinier.demo.run:test", "tinier.demo.run:train")  # functions that a record may name


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        what: what was checked.
        holds: whether it holds; None when it could not be checked.
        detail: what was found.
    """

    what: str
    holds: bool | None
    detail: str


def verify(
    folder: str | Path,
    *,
    data: Any = None,
    metric: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Check]:
    """Check a result folder: hashes of its files, hash of the data, the artifact's answers, and the certificate recomputed from them.

    Args:
        folder: what ``compress`` wrote.
        data: where the certification data are now; where they were, if None. ``module:function`` is run only if it is named here.
        metric: the metric, where it is a ``module:function``, which is run only if it is named here.
        threads: of the runtime.
        progress: receives what happens.

    Returns:
        The checks; the result holds if none of them is False.

    Raises:
        InputError: the folder is not a result, or its certificate cannot be read.
        DataError: the data cannot be read.
        MissingError: the artifact's runtime is not installed.

    Cost:
        One run of the artifact over the certification examples.
    """
    folder = Path(folder)
    progress = progress or Silent()
    record = _record(folder)
    checks = [_file(folder, name, digest) for name, digest in _hashes(record, folder).items()]
    if not all(check.holds for check in checks):
        return checks  # nothing that was tampered with is opened
    artifact = folder / _plain(record["artifact"][0])
    target = targets_for(record["target"])[0]
    session = target.open(artifact, threads or default_threads())
    checks.append(Check("artifact opens", True, f"{artifact.name} on {record['target']}"))
    if record["certificate"] is None:
        # Without a certificate nothing may be claimed.
        claims = record["statement"] != f"No certificate: {record['reason']}."
        checks.append(Check("certificate", False if claims else None, record["statement"]))
        return checks

    unseen = _certification(record, folder, data)
    digest = unseen.digest()
    same = digest == record["data"]["certify"]["sha256"]
    checks.append(Check("certification data", same, digest[:16]))
    if not same:
        return checks
    with np.load(folder / SCORES, allow_pickle=False) as stored:
        original, before = stored["original"], stored["artifact"]
        reference = [stored["reference"]] if "reference" in stored else None
    named = metric is not None
    judged = metric_of(_trusted(metric or record["metric"], named, "--metric"), unseen.labelled)
    with progress.task("running the artifact", len(unseen)) as step:
        quality = evaluate(
            whole_batches(session.run, record["data"]["batch"]),
            unseen,
            judged,
            batch=record["data"]["batch"],
            reference=reference,
            progress=step,
        )
    if quality.scores is None or len(quality.scores) != len(before):
        raise InputError(f"{folder / SCORES} does not fit the certification data")
    now = quality.scores
    # Scores that are not counts differ in their last digits from CPU to CPU.
    differing = float((~np.isclose(now, before, rtol=1e-3, atol=1e-6)).mean())
    checks.append(
        Check(
            "scores",
            differing <= TOLERANCE,
            f"{judged.name} {now.mean():.4f}, recorded {before.mean():.4f}; {differing:.2%} of the scores differ",
        )
    )
    checks.append(_stated(record, judged, original, before))
    again = _proof(record, judged, original, now)
    bound = record["certificate"]["bound"]
    # A few scores may differ from CPU to CPU, and the bound with them.
    spread = judged.bounds[1] - judged.bounds[0] if judged.bounds else 1.0
    # … by a step of its grid.
    slack = 2 * differing * spread + STEP * spread * bool((now != before).any()) + 1e-9
    holds = again.bound <= bound + slack and again.holds is not False
    if record["certificate"]["holds"] is False:
        holds = again.bound <= bound + slack
    checks.append(
        Check("certificate", holds, f"loss at most {again.bound:.4g}, recorded {bound:.4g}")
    )
    return checks


def _proof(
    record: dict[str, Any], metric: Metric, original: Floats, artifact: Floats
) -> Certificate:
    """The certificate that scores give, at the recorded limit and error probability."""
    try:
        return certify(
            original,
            artifact,
            bounds=metric.bounds or (0.0, 1.0),
            limit=record["certificate"]["limit"],
            delta=record["certificate"]["delta"],
            higher_is_better=metric.higher_is_better,
            tested=int(record["certificate"]["tested"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{CERTIFICATE} cannot be recomputed: {error!r}") from error


def _stated(record: dict[str, Any], metric: Metric, original: Floats, artifact: Floats) -> Check:
    """Whether every figure and the sentence of the record follow from the recorded scores."""
    proof = _proof(record, metric, original, artifact)
    recorded, wrong = record["certificate"], []
    for name, value in proof.as_dict().items():
        got = recorded.get(name)
        close = isinstance(value, float) and isinstance(got, int | float)
        if not (abs(got - value) <= 1e-9 if close else got == value):  # type: ignore[operator]
            wrong.append(f"{name} is {got!r}, the scores give {value!r}")
    facts = {"metric": metric.name, "points": metric.bounds == (0.0, 1.0)}
    if record["statement"] != words.certificate(proof, facts)[0]:
        wrong.append("the statement is another one than the figures give")
    if record["met"] and proof.holds is False:
        wrong.append("the limit is said to be kept, the scores do not prove it")
    return Check("figures and statement", not wrong, "; ".join(wrong) or "follow from the scores")


def _hashes(record: dict[str, Any], folder: Path) -> dict[str, str]:
    """File name → recorded hash; files that a result must have and that are not recorded have none."""
    needed = [*record["artifact"], PLAN, WEIGHTS]
    if record["certificate"] is not None:
        needed.append(SCORES)
    return {**dict.fromkeys(needed, ""), **record["files"]}


def _record(folder: Path) -> dict[str, Any]:
    file = folder / CERTIFICATE
    if not file.is_file():
        raise InputError(f"{folder} is not a result of tinier: it has no {CERTIFICATE}")
    try:
        record = json.loads(file.read_text())
        needed = {
            "files",
            "artifact",
            "target",
            "certificate",
            "data",
            "metric",
            "inputs",
            "statement",
            "reason",
            "met",
        }
        missing = needed - record.keys()
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        if record["target"] not in known_targets():
            raise ValueError(f"unknown target {record['target']!r}")
        if not record["artifact"]:
            raise ValueError("it names no artifact")
        for name in [*record["artifact"], *record["files"]]:
            _plain(name)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    return record


def _plain(name: str) -> str:
    """A file name that stays inside its folder."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise InputError(f"{CERTIFICATE} names {name!r}, which is not a file of the folder")
    return name


def _file(folder: Path, name: str, digest: str) -> Check:
    file = folder / _plain(name)
    if not file.is_file():
        return Check(name, False, "the file is missing")
    now = sha256(file)
    if not digest:
        return Check(name, False, f"{CERTIFICATE} has no hash of it")
    return Check(name, now == digest, now[:16] if now == digest else "the file has changed")


def _trusted(spec: Any, named: bool, option: str) -> Any:
    """A function to import comes from the user, not from a file that may be a stranger's; tinier's own are safe.

    Raises:
        InputError: the record names code that the user did not name.
    """
    # A file of that name beside it changes nothing: a metric is imported all the same.
    code = isinstance(spec, str) and FUNCTION.fullmatch(spec)
    if code and not named and spec not in OURS:
        raise InputError(
            f"the result was made with the function {spec}; code that a file names is not run by itself: "
            f"if you trust it, say so: {option} {spec}"
        )
    return spec


def _certification(record: dict[str, Any], folder: Path, data: Any) -> Examples:
    """The certification part, read and split as it was."""
    try:
        spec = data if data is not None else record["data"]["certify"]["origin"]
        spec = _trusted(spec, data is not None, "--data")
        example = {
            name: torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]))
            for name, entry in record["inputs"].items()
        }
        options = dict(record["data"]["options"])
        fractions, seed = record["data"]["split"], int(record["data"]["seed"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{folder / CERTIFICATE} cannot be read: {error!r}") from error
    if isinstance(spec, str) and not spec:
        raise DataError("the data were Python objects; say where they are now: --data")
    tokenizer = folder if (folder / "config.json").is_file() else None
    examples = read(spec, example, tokenizer_folder=tokenizer, **options)
    if fractions:
        examples = split(examples, fractions, seed)[1]
    return shuffled(examples, seed)
