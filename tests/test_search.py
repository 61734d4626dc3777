"""The search with made-up candidates and judges: what is dropped before quality, what is tested in which order, what is taken."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tinier.data.base import Arrays, Examples
from tinier.errors import RefusedError
from tinier.measure.memory import Memory
from tinier.measure.metrics import Accuracy, Function
from tinier.measure.quality import Quality
from tinier.measure.score import Metric
from tinier.progress import Silent
from tinier.search import driver
from tinier.search.candidate import Candidate, Limits, Variant, beats
from tinier.search.driver import Search
from tinier.search.judge import Judge
from tinier.search.proof import choose, conclude, order
from tinier.targets.base import Artifact
from toy import Recorder, latency

DELTA = 0.05
N = 3000


def flips(harmful: int, helpful: int = 0, n: int = N) -> Quality:
    """An artifact's quality where the original is right on all but ``helpful`` examples; the flips come in random order."""
    scores = np.ones(n)
    scores[:harmful] = 0
    scores = np.random.default_rng(7).permutation(np.concatenate([scores, np.ones(helpful)]))[:n]
    return Quality(float(scores.mean()), scores, None, True)


class FakeJudge(Judge):
    """Knows the quality of each candidate and counts what it is asked."""

    def __init__(
        self,
        qualities: dict[int, Quality],
        metric: Metric | None = None,
        n: int = N,
        interrupt_at: int = -1,
    ) -> None:
        self.metric = metric or Accuracy()
        self.progress = Silent()
        self.part = "a part"
        self.examples = Examples(Arrays({"x": torch.zeros(n, 1)}))
        vars(self)["original"] = flips(0, n=n)
        self.qualities = qualities
        self.asked: list[Candidate] = []
        self.interrupt_at = interrupt_at

    def quality(self, session: Any, count: int | None = None) -> Quality:
        if len(self.asked) == self.interrupt_at:
            self.interrupt_at = -1
            raise KeyboardInterrupt
        self.asked.append(session)
        found = self.qualities[id(session)]
        if not count or found.scores is None:
            return found
        return Quality(float(found.scores[:count].mean()), found.scores[:count], None, True)


WORKSHOP: Any = SimpleNamespace(session=lambda candidate: candidate)


def candidate(
    ms: float, size: int, searched: Quality, *, target: str = "onnxruntime", **other: Any
) -> Candidate:
    made = Candidate(other.pop("variant", Variant(ranges="mse")), target, **other)
    made.latency, made.quality, made.loss = latency(ms), searched, 1 - searched.value
    made.artifact = Artifact(target, (Path("model.onnx"),), size)
    return made


def judges(pairs: Sequence[tuple[Candidate, Quality]], **other: Any) -> tuple[FakeJudge, FakeJudge]:
    """The judges on the search part and on the certification part."""
    searched = {id(c): c.quality for c, _ in pairs if c.quality}
    return FakeJudge(searched), FakeJudge({id(c): q for c, q in pairs}, **other)


def test_the_best_certified_is_taken() -> None:
    safe = candidate(3.0, 900, flips(0))
    fast = candidate(1.0, 300, flips(8))
    wrong = candidate(0.2, 100, flips(300))
    pairs = [(wrong, flips(290)), (safe, flips(0)), (fast, flips(9))]
    searched, unseen = judges(pairs)
    result = conclude(
        [c for c, _ in pairs], Limits(max_drop=0.01), WORKSHOP, searched, unseen, DELTA
    )
    assert (result.best, result.met) == (fast, True)
    assert unseen.asked == [safe, fast, wrong]
    assert [c.status for c in (safe, fast, wrong)] == ["front", "taken", "front"]
    assert fast.certificate and fast.certificate.holds and fast.certificate.harmful == 9
    assert safe.certificate and "certified too" in safe.reason and "3.0" in safe.reason
    assert wrong.certificate and wrong.certificate.holds is False
    assert "cannot be certified: measured 9.67 points on 3,000 unseen" in wrong.reason
    assert "more examples would not help" in wrong.reason


def test_half_the_size_outweighs_a_tenth_of_the_time() -> None:
    quick, small = candidate(1.0, 400, flips(0)), candidate(1.1, 200, flips(0))
    searched, unseen = judges([(quick, flips(0)), (small, flips(0))])
    best, met, _ = choose([quick, small], Limits(0.01), WORKSHOP, searched, unseen, DELTA)
    assert best is small and met


def test_testing_stops_at_the_first_failure() -> None:
    # The last one would pass on the unseen data; looking at it after a failure would break the guarantee.
    first, second = candidate(3.0, 900, flips(0)), candidate(1.0, 300, flips(25))
    third = candidate(0.5, 200, flips(40))
    searched, unseen = judges([(first, flips(0)), (second, flips(40)), (third, flips(0))])
    result = conclude(
        [third, second, first], Limits(max_drop=0.01), WORKSHOP, searched, unseen, DELTA
    )
    assert unseen.asked == [first, second] and result.best is first and result.met
    assert third.certified is None and third.certificate is None
    assert third.reason.startswith("1.33 points worse") or "not tested" in third.reason


def test_order_is_by_p_value_not_by_loss() -> None:
    # Few flips prove more than many flips that nearly cancel out, even where their sum is smaller.
    calm, wild = candidate(2.0, 10, flips(12)), candidate(1.0, 10, flips(12))
    scores = np.random.default_rng(3).permutation(np.repeat([0.0, 2.0, 1.0], [110, 100, N - 210]))
    both = np.clip(scores, 0, 1)
    wild.quality = Quality(float(both.mean()), both, None, True)
    searched = FakeJudge({})
    searched.original.scores[scores == 2.0] = 0.0  # type: ignore[index]
    calm.quality.scores[scores == 2.0] = 0.0  # type: ignore[union-attr, index]
    wild.loss, calm.loss = 10 / N, 12 / N
    limit = 0.01
    p = [searched.p_value(c.quality, limit, DELTA) for c in (calm, wild) if c.quality]
    assert p[0] < p[1] and wild.loss < calm.loss
    assert order([wild, calm], searched, limit, DELTA) == [calm, wild]
    # Of equals the faster comes first.
    a, b = candidate(2.0, 10, flips(3)), candidate(1.0, 10, flips(3))
    assert order([a, b], searched, limit, DELTA) == [b, a]


def test_nothing_inside_gives_the_nearest_miss_and_the_reason() -> None:
    near, far = candidate(6.0, 100, flips(0)), candidate(9.0, 100, flips(0))
    searched, unseen = judges([(near, flips(0)), (far, flips(0))])
    best, met, reason = choose(
        [far, near], Limits(0.01, max_latency=5.0), WORKSHOP, searched, unseen, DELTA
    )
    assert (best, met) == (near, False)
    assert reason == "no candidate keeps them; the nearest has 6 ms, 5 ms allowed"
    # A network that is wrong throughout is not near, however fast it is.
    wrong = candidate(5.2, 100, flips(2000))
    searched, unseen = judges([(near, flips(0)), (wrong, flips(2000))])
    best, *_ = choose(
        [near, wrong], Limits(0.01, max_latency=5.0), WORKSHOP, searched, unseen, DELTA
    )
    assert best is near
    best, met, reason = choose([near], Limits(max_size=50), WORKSHOP, searched, unseen, DELTA)
    assert best is near and not met and "100 bytes, 50 allowed" in reason
    # Its loss is bounded all the same.
    assert near.certificate and near.certificate.limit is None and near.certificate.bound < 0.01


def test_without_a_limit_on_the_loss_the_least_loss_inside_the_limits() -> None:
    exact = candidate(7.0, 100, flips(0))
    good, bad = candidate(4.0, 100, flips(5)), candidate(1.0, 100, flips(90))
    table = [bad, exact, good]
    searched, unseen = judges([(c, flips(6)) for c in table])
    result = conclude(table, Limits(max_latency=5.0), WORKSHOP, searched, unseen, DELTA)
    assert result.best is good and result.met and unseen.asked == [good]
    assert good.certificate and good.certificate.holds is None and good.certificate.bound < 0.01
    assert exact.reason == "7 ms, 5 ms allowed"
    assert bad.reason == "2.83 points worse than the one taken"


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_a_metric_that_cannot_be_certified_says_so(bounds: tuple[float, float] | None) -> None:
    metric = Function("mine", True, bounds, function=lambda o, y: 0.0)
    scores = None if bounds else np.ones(N)
    fast, slow = candidate(1.0, 10, flips(3)), candidate(2.0, 5, flips(3))
    poor = candidate(0.5, 2, flips(200))
    table = [fast, slow, poor]
    searched, unseen = judges([(c, Quality(1.0, scores, None)) for c in table], metric=metric)
    result = conclude(table, Limits(max_drop=0.01), WORKSHOP, searched, unseen, DELTA)
    assert result.best is fast and result.met and fast.certificate is None
    why = "no known bounds" if bounds is None else "not a mean over examples"
    assert result.reason.startswith("not certified: ") and why in result.reason
    assert slow.reason == "2.0× as slow as the one taken"
    assert "6.67 points worse, 1.00 points allowed" in poor.reason


def test_too_few_examples_say_how_many_are_needed() -> None:
    only = candidate(1.0, 10, flips(0, n=40))
    searched, unseen = judges([(only, flips(0, n=40))], n=40)
    vars(searched)["original"] = flips(0, n=40)  # the search part is as small
    best, met, reason = choose([only], Limits(0.01), WORKSHOP, searched, unseen, DELTA)
    assert (best, met) == (only, False) and only.certificate and only.certificate.needed
    assert f"about {only.certificate.needed:,} unseen examples would be needed" in reason
    # With that many it is certified indeed.
    n = only.certificate.needed
    more = candidate(1.0, 10, flips(0, n=n))
    searched, unseen = judges([(more, flips(0, n=n))], n=n)
    vars(searched)["original"] = flips(0, n=n)
    assert choose([more], Limits(0.01), WORKSHOP, searched, unseen, DELTA)[1]


def test_every_candidate_ends_with_a_status_and_a_reason() -> None:
    best, beaten = candidate(1.0, 100, flips(0)), candidate(2.0, 200, flips(1))
    unmeasured = Candidate(Variant(0.5), "onnxruntime")
    gone = Candidate(Variant(0.25), "onnxruntime", status="dropped", reason="refused")
    table = [best, beaten, unmeasured, gone]
    searched, unseen = judges([(best, flips(0)), (beaten, flips(1))])
    conclude(table, Limits(max_drop=0.01), WORKSHOP, searched, unseen, DELTA)
    assert all(c.reason and c.status in ("taken", "front", "dropped") for c in table)
    assert beaten.reason == "int8 (MSE ranges) on onnxruntime is nowhere worse and somewhere better"
    assert unmeasured.reason == "the run ended before it was measured" and gone.reason == "refused"
    assert unseen.asked == [best]


def test_nothing_measured() -> None:
    result = conclude([Candidate(Variant(), "torch")], Limits(0.01), WORKSHOP, *judges([]), DELTA)
    assert result.best is None and not result.met and "nothing was measured" in result.reason


@pytest.mark.parametrize("tested", [0, 1])
def test_an_interrupted_certification_keeps_the_best_so_far(tested: int) -> None:
    safe, fast = candidate(3.0, 900, flips(0)), candidate(1.0, 300, flips(8))
    searched, unseen = judges([(safe, flips(0)), (fast, flips(9))], interrupt_at=tested)
    result = conclude([safe, fast], Limits(0.01), WORKSHOP, searched, unseen, DELTA)
    assert result.interrupted and "interrupted" in result.reason
    assert result.met == bool(tested)
    assert result.best is (safe if tested else fast)  # uncertified, the faster of those inside
    assert all(c.reason for c in (safe, fast))


def test_the_original_keeps_its_place_when_it_is_beaten() -> None:
    # Ratios in the tables are against it.
    original = candidate(3.0, 900, flips(0), variant=Variant(), original=True)
    better = candidate(1.0, 300, flips(0))
    searched, unseen = judges([(original, flips(0)), (better, flips(0))])
    result = conclude([original, better], Limits(0.01), WORKSHOP, searched, unseen, DELTA)
    assert result.best is better and result.original is original


def test_beats_is_a_strict_partial_order() -> None:
    grid = [candidate(ms, size, flips(k)) for ms in (1.0, 2.0) for size in (1, 2) for k in (0, 9)]
    for a in grid:
        assert not beats(a, a)
        for b in grid:
            assert not (beats(a, b) and beats(b, a))
            assert beats(a, b) == (
                a is not b
                and all(x <= y for x, y in zip(a.coordinates, b.coordinates, strict=True))  # type: ignore[arg-type]
            )


# The driver ---------------------------------------------------------------------------------------------------------------


class FakeWorkshop:
    """Candidates cost what a table says; (target, keep, ranges) → (ms, bytes), or text for a refusal."""

    def __init__(self, costs: dict[tuple[str, float, str], tuple[float, int] | str]) -> None:
        self.costs = costs
        self.targets = dict.fromkeys(key[0] for key in costs)
        self.train = None
        self.batch, self.seed, self.threads = 1, 0, 1
        self.lowered: list[Candidate] = []
        self.compensated: list[float] = []

    def compensate(self, keep: float) -> None:
        self.compensated.append(keep)

    def refine(self, candidate: Candidate) -> bool:
        return False

    def lower(self, candidate: Candidate, rough: bool = False) -> None:
        cost = self.costs.get(self.key(candidate), "not in the table")
        self.lowered.append(candidate)
        if isinstance(cost, str):
            candidate.drop(cost)
        else:
            candidate.artifact = Artifact(candidate.target, (Path("model"),), cost[1])

    def session(self, candidate: Candidate) -> Candidate:
        return candidate

    def inputs(self, size: int) -> dict[str, torch.Tensor]:
        return {"x": torch.zeros(size, 1)}

    @staticmethod
    def key(candidate: Candidate) -> tuple[str, float, str]:
        return candidate.target, candidate.variant.keep, candidate.variant.ranges


class Perfect(FakeJudge):
    """Everything answers as the original does."""

    def quality(self, session: Any, count: int | None = None) -> Quality:
        self.asked.append(session)
        return flips(0, n=count or N)


def search(
    patch: pytest.MonkeyPatch, shop: FakeWorkshop, limits: Limits, seconds: float = 1000.0
) -> tuple[Search, Perfect]:
    def timed(sessions: dict[str, Candidate], *_: Any, **__: Any) -> dict[str, Any]:
        costs = {key: shop.costs[shop.key(c)] for key, c in sessions.items()}
        return {key: latency(float(cost[0])) for key, cost in costs.items()}

    patch.setattr(driver, "interleaved", timed)
    patch.setattr(driver, "peak_memory", lambda *_: Memory(2, 1))
    judge = Perfect({})
    made = Search(shop, judge, limits, 0.0, Recorder())  # type: ignore[arg-type]
    made.deadline = made.started + seconds
    return made, judge


COSTS: dict[tuple[str, float, str], tuple[float, int] | str] = {
    ("onnxruntime", 1.0, ""): (2.0, 1000),
    ("onnxruntime", 1.0, "minmax"): (1.0, 300),
    ("onnxruntime", 1.0, "mse"): (1.0, 300),
    ("onnxruntime", 0.75, ""): (2.2, 1100),  # neither faster nor smaller
    ("onnxruntime", 0.75, "minmax"): (2.5, 1000),  # nor this
    ("onnxruntime", 0.5, ""): (2.4, 600),  # slower, but smaller
    ("onnxruntime", 0.5, "minmax"): "this cannot be quantized",
    ("onnxruntime", 0.25, ""): (0.4, 2000),  # larger, but faster
    ("onnxruntime", 0.25, "minmax"): (0.4, 100),
    ("onnxruntime", 0.25, "mse"): (0.4, 100),
}


def test_the_speed_gate_comes_before_any_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = FakeWorkshop(COSTS)
    made, judge = search(monkeypatch, shop, Limits(0.01))
    table = made.run()
    found = {FakeWorkshop.key(c): c for c in table}
    assert set(shop.compensated) == {0.5, 0.25}  # nor any fitting
    for keep, ranges, ms in ((0.75, "", "2.2"), (0.75, "minmax", "2.5")):
        dropped = found["onnxruntime", keep, ranges]
        assert dropped.status == "dropped" and dropped.quality is None
        assert dropped.reason == (
            f"neither faster nor smaller than the original on onnxruntime ({ms} against 2 ms, timed together)"
        )
        assert dropped not in judge.asked
    assert found["onnxruntime", 0.5, "minmax"].reason == "this cannot be quantized"
    # One look each at the original, the four that passed, and the second kind of ranges of two of them; each looks at the
    # beginning and then at the whole.
    passed = [c for c in table if c.status == "waiting"]
    assert len(passed) == 7 and len(judge.asked) == 14
    assert {id(c) for c in judge.asked} == {id(c) for c in passed}
    assert ("onnxruntime", 0.75, "mse") not in found
    assert all(c.memory for c in passed if c.original)


def test_only_the_fastest_runtime_of_a_variant_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = dict(COSTS)
    costs.update({("openvino", *key[1:]): (cost[0] / 2, cost[1]) for key, cost in COSTS.items() if not isinstance(cost, str)})  # fmt: skip
    costs["torch", 1.0, ""] = (80.0, 1000)
    shop = FakeWorkshop(costs)
    made, _ = search(monkeypatch, shop, Limits(0.01))
    table = made.run()
    reasons = {FakeWorkshop.key(c): c.reason for c in table}
    assert (
        reasons["onnxruntime", 1.0, "minmax"]
        == "the same network is 2.0× as fast on openvino, timed together"
    )
    assert not [c for c in shop.lowered if c.target == "torch" and not c.original]
    assert any("torch needs 80.0× the time of openvino" in text for text in made.progress.said)  # type: ignore[attr-defined]


def test_limits_are_checked_before_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = search(monkeypatch, FakeWorkshop(COSTS), Limits(0.01, 1.5, 500))
    table = made.run()
    found = {FakeWorkshop.key(c): c for c in table}
    assert found["onnxruntime", 0.25, ""].reason == "2,000 bytes are over the limit of 500"
    assert found["onnxruntime", 0.5, ""].reason == "2.4 ms is over the limit of 1.5 ms"
    kept = [c for c in table if c.status == "waiting" and not c.original]
    assert {FakeWorkshop.key(c)[1:] for c in kept} == {
        (1.0, "minmax"), (1.0, "mse"), (0.25, "minmax"), (0.25, "mse"),
    }  # fmt: skip


def test_an_impossible_limit_keeps_the_nearest_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    made, judge = search(monkeypatch, FakeWorkshop(COSTS), Limits(0.01, max_latency=0.1))
    result = conclude(made.run(), made.limits, WORKSHOP, judge, judge, DELTA)
    assert not result.met and result.best
    assert FakeWorkshop.key(result.best)[:2] == ("onnxruntime", 0.25)
    assert "0.4 ms, 0.1 ms allowed" in result.reason


def test_a_used_up_budget_leaves_candidates_untried(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = search(monkeypatch, FakeWorkshop(COSTS), Limits(0.01), seconds=1e-9)
    table = made.run()
    assert [c.status for c in table if c.original] == ["waiting"]
    assert {c.reason for c in table if not c.original} == {"not tried: the time budget was used up"}


def test_an_original_that_no_runtime_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = FakeWorkshop({("onnxruntime", 1.0, ""): "it has a loop"})
    made, _ = search(monkeypatch, shop, Limits(0.01))
    with pytest.raises(RefusedError, match="no runtime takes the original: onnxruntime: it has a"):
        made.run()


def test_names_and_slugs_of_variants_are_distinct() -> None:
    variants = [Variant(k, r) for k in (1.0, 0.75, 0.5, 0.25) for r in ("", "minmax", "mse")]
    assert len({v.name for v in variants}) == len({v.slug for v in variants}) == 12
    assert Variant(0.25, "mse").name == "pruned, 75 % fewer MACs, int8 (MSE ranges)"
    assert Variant().name == "float" and Variant().slug == "float32"
