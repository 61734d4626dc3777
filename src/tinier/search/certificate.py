"""The certificate: a bound on the loss of quality that holds with probability 1 − δ, from paired differences on unseen data."""

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SIMULATED = 20_000  # below so many, the number of examples that are needed is tried out
STEP = 5e-4  # resolution of a bound, as a share of the range of a score


@dataclass(frozen=True)
class Certificate:
    """What the certification examples prove of one artifact.

    "With probability ``1 − delta`` over the draw of the ``examples`` certification examples, the expected score of the artifact is at
    most ``bound`` worse than the original's."

    Attributes:
        limit: the loss that the user allows, in units of the metric, or None when no limit was set.
        holds: the test of the limit rejects "the loss is larger than the limit"; None without a limit.
        bound: upper confidence bound of the expected loss at level ``1 − delta``.
        delta: error probability of the whole procedure.
        examples: number of certification examples.
        loss: mean paired difference, original − artifact (positive is worse).
        harmful: examples that the original answers better than the artifact.
        helpful: examples that the artifact answers better.
        tested: how many artifacts could have been chosen on these examples; the bound holds for whichever was.
        needed: examples with which the limit could be certified at the measured flip rates; None if it holds, or if no number would do.
        test: the name of the test.
    """

    limit: float | None
    holds: bool | None
    bound: float
    delta: float
    examples: int
    loss: float
    harmful: int
    helpful: int
    needed: int | None
    tested: int = 1
    test: str = "betting bound (Waudby-Smith and Ramdas 2024) on paired differences"

    def as_dict(self) -> dict[str, object]:
        """The fields as a JSON-able dict."""
        return asdict(self)


def certify(
    original: Floats,
    artifact: Floats,
    *,
    bounds: tuple[float, float],
    limit: float | None,
    delta: float,
    higher_is_better: bool = True,
    tested: int = 1,
) -> Certificate:
    """Certify the expected loss of an artifact against the original.

    Args:
        original: (n,) score of each certification example under the original.
        artifact: (n,) the same under the artifact, in the same order; the order must be random.
        bounds: least and greatest value that a score can have.
        limit: the loss that is allowed, in units of the score; None asks for the bound only.
        delta: error probability, in (0, 1).
        higher_is_better: whether a higher score is better.
        tested: artifacts that may be chosen on the same examples; the bound is at level 1 − δ / tested, so that it holds for
            the one that is. The test of the limit needs no such correction where the order of testing was fixed beforehand.

    Returns:
        The certificate.

    Raises:
        ValueError: a score lies outside ``bounds``.

    Cost:
        O(n · range / STEP) time, about half a second for 10,000 examples.

    Source:
        Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS-B 2024, section 4, one-sided.
    """
    low, high = bounds
    for scores in (original, artifact):
        if scores.min() < low - 1e-9 or scores.max() > high + 1e-9:
            raise ValueError(f"a score lies outside [{low}, {high}]")
    difference = (original - artifact) * (1 if higher_is_better else -1)
    spread = high - low
    # Differences lie in [−spread, spread]; the test wants [0, 1].
    unit = (difference / spread + 1) / 2
    bound = (2 * upper_bound(unit, delta / tested) - 1) * spread
    holds, needed = None, None
    if limit is not None:
        mean = (limit / spread + 1) / 2
        holds = mean >= 1 or bool(p_value(unit, mean, delta) <= delta)
        if not holds:
            needed = examples_needed(unit, mean, delta)
        else:
            bound = min(bound, limit)  # the test of the limit itself is finer than the grid
    return Certificate(
        limit,
        holds,
        float(bound),
        delta,
        len(unit),
        float(difference.mean()),
        int((difference > 0).sum()),
        int((difference < 0).sum()),
        needed,
        tested,
    )


def p_value(x: Floats, mean: float, delta: float) -> float:
    """P-value of "the expectation of x is at least ``mean``", for x in [0, 1] in random order.

    One over the greatest capital of a gambler who bets against the hypothesis (Ville's inequality).

    Args:
        x: (n,) values in [0, 1].
        mean: the hypothesised mean, in (0, 1).
        delta: the level for which the bets are tuned; the p-value is valid whatever it is.
    """
    wealth = _log_capital(x, np.array([mean]), _bets(x, delta))
    return float(min(1.0, math.exp(-wealth[0])))


def upper_bound(x: Floats, delta: float) -> float:
    """Upper confidence bound of the expectation of x in [0, 1] at level 1 − δ.

    Means are tested from 1 downwards on a fixed grid; the last one rejected is the bound. The first true hypothesis that is
    tested is rejected with probability at most δ, and nothing below it is reached unless it is.
    """
    bets = _bets(x, delta)
    grid = np.arange(1 - STEP / 2, 0, -STEP / 2)
    accepted = 1.0
    for part in np.array_split(grid, max(1, len(grid) * len(x) // 4_000_000)):
        rejected = _log_capital(x, part, bets) >= math.log(1 / delta)
        if not rejected.all():
            first = int(np.argmin(rejected))
            return float(part[first - 1]) if first else accepted
        accepted = float(part[-1])
    return accepted


def least_examples(limit: float, delta: float, most: int = 10_000_000) -> int | None:
    """Number of examples that certify a loss of at most ``limit`` when every answer agrees: fewer cannot, whatever happens.

    Args:
        limit: the loss, as a share of the range of a score.
        delta: error probability.
        most: where the search ends.

    Returns:
        The number; None for a limit of 0 or if it is more than ``most``.
    """
    if limit <= 0:
        return None
    mean, low, high = (limit + 1) / 2, 1, 16

    def enough(count: int) -> bool:
        return p_value(np.full(count, 0.5), mean, delta) <= delta

    while not enough(high):
        low, high = high, 2 * high
        if high > most:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


def examples_needed(x: Floats, mean: float, delta: float, most: int = 10_000_000) -> int | None:
    """Number of examples with which "expectation < mean" would be shown nine times in ten, were the world like the sample x.

    Returns:
        The number, rounded up to two digits; None when the sample's own mean is not below ``mean``.
    """
    if x.mean() >= mean:
        return None
    values, counts = np.unique(x, return_counts=True)
    share = counts / len(x)
    rate = 0.0
    spread = 0.0
    for bet in np.linspace(0.01, 0.75, 150) / (1 - mean):
        growth = np.log1p(bet * (mean - values))
        average = float(share @ growth)
        if average > rate:
            rate, spread = average, float(np.sqrt(share @ (growth - average) ** 2))
    if rate <= 0:
        return None
    # n·rate − 1.28·spread·√n = ln(1/δ), solved for √n
    root = (1.28 * spread + math.sqrt((1.28 * spread) ** 2 + 4 * rate * math.log(1 / delta))) / (
        2 * rate
    )
    needed = min(most, math.ceil(root**2))
    # The first bets are small; with few examples that counts.
    while needed <= SIMULATED and not _often(x, mean, delta, needed):
        needed = math.ceil(1.05 * needed)
    digits = 10 ** max(0, len(str(needed)) - 2)
    return math.ceil(needed / digits) * digits


def _often(x: Floats, mean: float, delta: float, n: int) -> bool:
    """Whether samples of n from x reject "expectation ≥ mean" nine times in ten."""
    random = np.random.default_rng(0)
    rejected = [p_value(random.choice(x, n), mean, delta) <= delta for _ in range(20)]
    return sum(rejected) >= 18


def _bets(x: Floats, delta: float) -> Floats:
    """Predictable bets: each depends on the examples before it only (equation 26 of the source, for a fixed n)."""
    n = len(x)
    index = np.arange(1, n + 1)
    means = (0.5 + np.cumsum(x)) / (index + 1)
    variances = (0.25 + np.cumsum((x - means) ** 2)) / (index + 1)
    before = np.concatenate([[0.25], variances[:-1]])
    return np.sqrt(2 * math.log(1 / delta) / (n * before))


def _log_capital(x: Floats, means: Floats, bets: Floats) -> Floats:
    """(k,) the greatest log-capital that was reached against each of the (k,) means."""
    # A bet above 1/(1 − m) could lose more than all; half of it keeps the loss of one example bounded.
    wager = np.minimum(bets[None, :], 0.75 / (1 - means)[:, None])
    return np.log1p(wager * (means[:, None] - x[None, :])).cumsum(1).max(1)
