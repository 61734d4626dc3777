"""A result as rows for tables and machines, and as one sentence."""

import math
from dataclasses import dataclass
from typing import Any

from tinier.report import words
from tinier.search.candidate import Candidate, Result

NOISY = 1.5  # high end over low end of a 95 % interval of the median, beyond which the median is not trusted


def rows(result: Result) -> list[dict[str, Any]]:
    """One JSON-able dict a candidate, in the order of the table; what was not measured is None.

    Ratios say how many times as fast, or as small, the candidate is: ``…_than_torch`` against the float network in torch,
    ``…_than_original`` against the float network on the fastest runtime.
    """
    front = {id(candidate) for candidate in result.front}
    return [_row(candidate, result, id(candidate) in front) for candidate in result.table]


def _row(candidate: Candidate, result: Result, on_front: bool) -> dict[str, Any]:
    latency, memory, parity = candidate.latency, candidate.memory, candidate.parity
    torch, original = in_torch(result), result.original
    return {
        "name": words.clean(candidate.name),
        "runtime": words.clean(candidate.target),
        "original": candidate.original,
        "recovered": candidate.recovered,
        "status": candidate.status,
        "taken": candidate is result.best and result.met,
        "front": on_front,
        "reason": words.clean(why(candidate, result)),
        "quality": _number(candidate.quality.value if candidate.quality else None),
        "loss": _number(candidate.loss),
        "certified_quality": _number(candidate.certified.value if candidate.certified else None),
        "latency_ms": _number(latency.median if latency else None),
        "latency_low_ms": _number(latency.low if latency else None),
        "latency_high_ms": _number(latency.high if latency else None),
        "latency_p95_ms": _number(latency.p95 if latency else None),
        "size_bytes": candidate.size,
        "peak_memory_bytes": memory.peak if memory else None,
        "memory_baseline_bytes": memory.baseline if memory else None,
        "parity_passed": parity.passed if parity else None,
        "parity": words.clean(_parity(parity)) if parity else None,
        "faster_than_torch": faster(candidate, torch),
        "smaller_than_torch": smaller(candidate, torch),
        "faster_than_original": faster(candidate, original),
        "smaller_than_original": smaller(candidate, original),
        "certificate": candidate.certificate.as_dict() if candidate.certificate else None,
        "files": [file.name for file in candidate.artifact.files] if candidate.artifact else [],
    }


def in_torch(result: Result) -> Candidate | None:
    """The float network in torch: what most people run today."""
    return next((c for c in result.table if c.original and c.target == "torch" and c.latency), None)


def faster(candidate: Candidate, than: Candidate | None) -> float | None:
    """How many times as fast a candidate is, by medians; None where one of the two was not measured.

    On a machine so busy that an interval is wide, by the ends of the intervals that claim least: a median of such timings says nothing.
    """
    if than is None or than.latency is None or candidate.latency is None:
        return None
    ours = candidate.latency
    # Timings of one interleaved run are compared; those of another run had another machine.
    theirs = candidate.beside.get(than.target, than.latency) if than.original else than.latency
    if max(ours.high / ours.low, theirs.high / theirs.low) > NOISY:
        low, high = theirs.low / ours.high, theirs.high / ours.low
        return 1.0 if low <= 1 <= high else _number(min(low, high, key=lambda r: abs(math.log(r))))
    return _number(theirs.median / ours.median)


def smaller(candidate: Candidate, than: Candidate | None) -> float | None:
    """How many times as small on disk a candidate is; None where one of the two was not measured."""
    if than is None or not than.size or not candidate.size:
        return None
    return than.size / candidate.size


def why(candidate: Candidate, result: Result) -> str:
    """Why a candidate was taken, dropped or left."""
    if candidate.reason:
        return candidate.reason
    if candidate is result.best:
        return result.reason if result.met else "the nearest miss"
    if candidate.original:
        return "what candidates are compared with"
    if candidate in result.front:
        return "on the front, another was taken"
    if candidate.coordinates:
        return "another candidate is nowhere worse"
    return "not measured to the end" if candidate.status == "waiting" else ""


@dataclass(frozen=True)
class Claim:
    """The parts of the answer, for a sentence or a headline.

    Attributes:
        what: "pruned, 50 % fewer MACs, int8 (min-max ranges), recovered, on onnxruntime".
        gain: "8.3× faster and 7.9× smaller".
        than: "the float model in torch".
        cost: "at most 0.57 points worse".
        proof: "with 95 % confidence (7,000 examples)", or why there is none.
        certified: whether the cost is a certificate's bound.
    """

    what: str
    gain: str
    than: str
    cost: str
    proof: str
    certified: bool


def claim(result: Result) -> Claim | None:
    """What the result says of its best candidate; None when there is none."""
    best = result.best
    if best is None:
        return None
    than, called = in_torch(result), "the float model in torch"
    if than is None or than is best:
        than, called = result.original, "the original"
        if than is not None:
            called = f"the original on {words.clean(than.target)}"
    gains = []
    if best is not than:
        speed, bytes_ = faster(best, than), smaller(best, than)
        if speed:
            gains.append(words.compared(speed, "faster", "slower"))
        if bytes_:
            gains.append(words.compared(bytes_, "smaller", "larger"))
    cost, proof = _cost(best, result)
    name = "the original" if best.original else words.clean(best.name)
    return Claim(
        what=f"{name}, on {words.clean(best.target)}",
        gain=" and ".join(gains),
        than=called,
        cost=cost,
        proof=proof,
        certified=best.certificate is not None,
    )


def _cost(best: Candidate, result: Result) -> tuple[str, str]:
    facts, proof = result.facts, best.certificate
    if proof is not None:
        sure = words.percent(1 - proof.delta)
        return words.worse(proof, facts), f"with {sure} confidence ({proof.examples:,} examples)"
    if best.loss is None:
        return "", "its quality was not measured"
    side = "worse" if best.loss > 0 else "better"
    cost = f"{words.points(abs(best.loss), facts)} {side}" if best.loss else "not worse"
    count = facts.get("search_examples")
    on = f" on {count:,} examples" if isinstance(count, int) else ""
    return cost, f"as measured{on}, not certified"


def summary(result: Result) -> str:
    """The answer in one sentence."""
    said = claim(result)
    reason = words.clean(result.reason)
    if said is None:
        return f"No answer: {reason}." if reason else "No answer: nothing was measured."
    parts = []
    if said.gain:
        parts.append(f"{said.gain} than {said.than}")
    parts.append(f"{said.cost} {said.proof}".strip())
    sentence = f"{said.what}: {', '.join(parts)}."
    if result.met:
        return sentence
    return f"The limits are not kept: {reason}. The nearest: {sentence}"


def _parity(parity: Any) -> str:
    """The artifact against its simulation, in a few words."""
    if not parity.passed:
        return f"differs: {parity.reason}" if parity.reason else "differs"
    worst = max((abs(row.relative) for row in parity.rows), default=None)
    if worst is None:
        return "agrees"
    within = "0.001 %" if worst < 1e-5 else f"{100 * worst:.2g} %"
    return f"agrees, within {within} of the range"


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
