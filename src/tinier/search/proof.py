"""Choosing one artifact and proving its loss on data that nothing was chosen on."""

from collections.abc import Sequence

from tinier.search.candidate import Candidate, Limits, Result, beats
from tinier.search.certificate import Certificate
from tinier.search.judge import Judge
from tinier.search.workshop import Workshop


def order(
    candidates: Sequence[Candidate], searched: Judge, limit: float, delta: float
) -> list[Candidate]:
    """The order in which candidates are certified: safest first, as the search part sees it; of equals the faster first.

    Source:
        Pareto Testing (Laufer-Goldshtein et al. 2023): the order is fixed on other data, so that testing in it needs no correction.
    """
    return sorted(
        candidates,
        key=lambda c: (
            searched.p_value(c.quality, limit, delta) if c.quality else 1.0,
            c.loss,
            c.latency.median if c.latency else 0.0,
        ),
    )


def conclude(
    table: list[Candidate],
    limits: Limits,
    workshop: Workshop,
    searched: Judge,
    unseen: Judge,
    delta: float,
) -> Result:
    """Choose from the front of what was measured, and say of every candidate what became of it."""
    result = Result(table, None, False, "", limits, {})
    if not result.front and result.original is not None:
        # Interrupted before any quality was measured: the original on its fastest runtime is an answer.
        searched.look(result.original, workshop.session(result.original), None)
    front = result.front
    try:
        chosen = choose(front, limits, workshop, searched, unseen, delta)
    except KeyboardInterrupt:
        result.interrupted = True
        chosen = _so_far(front, limits)
    result.best, result.met, result.reason = chosen
    for candidate in table:
        if candidate.status != "waiting":
            continue
        if candidate.original and candidate is not result.best:
            candidate.status, candidate.reason = "original", "what the others are compared with"
            continue
        if candidate is result.best:
            candidate.status, candidate.reason = "taken", candidate.reason or result.reason
        elif any(candidate is other for other in front):
            candidate.status = "front"
            candidate.reason = candidate.reason or _why_not(candidate, result, searched)
        elif candidate.coordinates is None:
            candidate.drop("the run ended before it was measured")
        else:
            rival = next(other for other in front if beats(other, candidate))
            candidate.drop(f"{rival.name} on {rival.target} is nowhere worse and somewhere better")
    return result


def _why_not(candidate: Candidate, result: Result, searched: Judge) -> str:
    """Why a candidate of the front was not taken."""
    best, limit = result.best, result.limits.max_drop
    assert best is not None
    broken = _broken(candidate, result.limits)
    if broken:
        return broken
    if limit is not None and candidate.loss is not None and candidate.loss > limit:
        return f"{searched.said(candidate.loss)} worse, {searched.said(limit)} allowed"
    if candidate.certificate is not None:
        return (
            f"certified too, with {_speed(candidate) / _speed(best):.2f}× the latency and "
            f"{(candidate.size or 0) / (best.size or 1):.2f}× the size of the one taken"
        )
    if best.certificate is None and result.met:
        return f"{_speed(candidate) / _speed(best):.1f}× as slow as the one taken"
    if result.interrupted:
        return "not tested: the run was interrupted"
    if limit is None:
        return f"{searched.said((candidate.loss or 0) - (best.loss or 0))} worse than the one taken"
    return "not tested: a safer candidate had failed before it"


def choose(
    candidates: Sequence[Candidate],
    limits: Limits,
    workshop: Workshop,
    searched: Judge,
    unseen: Judge,
    delta: float,
) -> tuple[Candidate | None, bool, str]:
    """Take the best candidate inside the limits and certify it.

    With a limit on the loss: candidates that keep the other limits are tested in a fixed order on unseen data, up to the first
    that fails; of those that passed, the one with the least latency × size is taken. Each of them is certified at level 1 − δ at once.
    Without one: the least loss on the search part among those inside the limits, the faster of equals; its
    loss is then bounded on unseen data.

    Args:
        candidates: those with loss, latency and size.
        limits: what was asked.
        workshop: has their sessions.
        searched: the judge on the search part.
        unseen: the judge on the certification part.
        delta: error probability.

    Returns:
        The one taken or, where nothing keeps the limits, the nearest miss; whether the limits are kept; the reason.
    """
    if not candidates:
        return None, False, "nothing was measured before the run ended"
    inside = [c for c in candidates if not _broken(c, limits)]
    if not inside:
        nearest = min(candidates, key=lambda c: (_excess(c, limits), c.loss))
        _test(nearest, None, workshop, unseen, delta)
        return (
            nearest,
            False,
            f"no candidate keeps them; the nearest has {_broken(nearest, limits)}",
        )
    if limits.max_drop is None:
        best = min(inside, key=lambda c: (c.loss, _speed(c)))
        verdict = _test(best, None, workshop, unseen, delta)
        return best, True, verdict if isinstance(verdict, str) else "least loss inside the limits"
    passed: list[Candidate] = []
    for candidate in order(inside, searched, limits.max_drop, delta):
        verdict = _test(candidate, limits.max_drop, workshop, unseen, delta)
        if isinstance(verdict, str):
            return _uncertified(inside, limits, searched, verdict)
        if not verdict.holds:
            candidate.reason = _failure(candidate, verdict, unseen, limits.max_drop)
            if not passed:
                return candidate, False, candidate.reason
            break
        passed.append(candidate)
    best = min(passed, key=_cost)
    if len(inside) > 1 and best.certified is not None:
        # The bound is to hold for the one that is chosen, though others could be on the same examples.
        again = unseen.certificate(best.certified, limits.max_drop, delta, len(inside))
        best.certificate = again if isinstance(again, Certificate) else best.certificate
    return best, True, "the least latency × size of those certified inside the limits"


def _test(
    candidate: Candidate, limit: float | None, workshop: Workshop, unseen: Judge, delta: float
) -> Certificate | str:
    with unseen.progress.task(f"certifying {candidate.name}"):
        quality = unseen.quality(workshop.session(candidate))
    verdict = unseen.certificate(quality, limit, delta)
    candidate.certified = quality
    if isinstance(verdict, Certificate):
        candidate.certificate = verdict
    return verdict


def _so_far(candidates: Sequence[Candidate], limits: Limits) -> tuple[Candidate | None, bool, str]:
    """The best of a run that was interrupted while it certified."""
    if not candidates:
        return None, False, "nothing was measured before the run ended"
    inside = [c for c in candidates if not _broken(c, limits)]
    passed = [c for c in inside if c.certificate and c.certificate.holds]
    if passed:
        return (
            min(passed, key=_cost),
            True,
            "interrupted; the least latency × size of those certified by then",
        )
    nearest = min(inside or candidates, key=lambda c: (_excess(c, limits), _speed(c)))
    return nearest, False, "interrupted before anything was certified"


def _uncertified(
    inside: Sequence[Candidate], limits: Limits, searched: Judge, why: str
) -> tuple[Candidate, bool, str]:
    """Where the metric allows no certificate, the measured loss has to do, and the result says so."""
    assert limits.max_drop is not None
    kept = [c for c in inside if c.loss is not None and c.loss <= limits.max_drop]
    if not kept:
        nearest = min(inside, key=lambda c: (c.loss, _speed(c)))
        return nearest, False, f"the least loss is {searched.said(nearest.loss or 0)}; {why}"
    return min(kept, key=_cost), True, f"not certified: {why}"


def _failure(candidate: Candidate, verdict: Certificate, unseen: Judge, limit: float) -> str:
    start = (
        f"a loss of at most {unseen.said(limit)} cannot be certified: measured {unseen.said(verdict.loss)} on "
        f"{verdict.examples:,} unseen examples ({verdict.harmful} became wrong or worse, {verdict.helpful} better)"
    )
    if verdict.needed is None:
        return f"{start}; the measured loss itself is not inside the limit, so that more examples would not help"
    return f"{start}; about {verdict.needed:,} unseen examples would be needed"


def _broken(candidate: Candidate, limits: Limits) -> str:
    """Which of the limits on latency and size a candidate breaks, in words; empty if none."""
    parts = []
    if limits.max_latency is not None and _speed(candidate) > limits.max_latency:
        parts.append(f"{_speed(candidate):.3g} ms, {limits.max_latency:g} ms allowed")
    if limits.max_size is not None and (candidate.size or 0) > limits.max_size:
        parts.append(f"{candidate.size:,} bytes, {limits.max_size:,} allowed")
    return "; ".join(parts)


def _excess(candidate: Candidate, limits: Limits) -> float:
    """The largest ratio of a measured cost, or loss, to its limit."""
    ratios = [1.0]
    if limits.max_drop:
        ratios.append((candidate.loss or 0.0) / limits.max_drop)
    if limits.max_latency:
        ratios.append(_speed(candidate) / limits.max_latency)
    if limits.max_size:
        ratios.append((candidate.size or 0) / limits.max_size)
    return max(ratios)


def _cost(candidate: Candidate) -> float:
    """Latency × size: twice as fast is worth as much as half the size, and neither unit matters."""
    return _speed(candidate) * (candidate.size or 0)


def _speed(candidate: Candidate) -> float:
    assert candidate.latency is not None
    return candidate.latency.median
