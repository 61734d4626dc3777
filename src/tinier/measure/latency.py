"""How long one run takes, measured in turns: what else the machine does then hits every artifact alike."""

import gc
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from tinier.errors import InputError
from tinier.targets.base import Session

WARM_UP_RUNS = 3
LEAST_ROUNDS = 5
BURST = 0.008  # seconds of measured runs of one session before the next one has its turn
SETTLE = 0.002  # seconds of unmeasured runs before: threads of the session before spin for about a millisecond
SLOW = 0.1  # seconds; runs this long need no unmeasured ones before them
RESAMPLES = 1000


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run.

    Attributes:
        median: over rounds, of each round's median run.
        low, high: bootstrap 95 % interval of the median, over rounds.
        p95: 95 of 100 runs were at most as long.
        runs: how many runs were measured.
        threads: of the session.
        rounds: the median run of each round; rounds of sessions measured together belong together by index.
    """

    median: float
    low: float
    high: float
    p95: float
    runs: int
    threads: int
    rounds: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class Ratio:
    """How many times as long one session takes as another, with a bootstrap 95 % interval."""

    value: float
    low: float
    high: float


def interleaved(
    sessions: Mapping[str, Session],
    inputs: Mapping[str, np.ndarray],
    *,
    seconds: float,
    seed: int = 0,
    clock: Callable[[], float] = perf_counter,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Latency]:
    """Measure sessions in rounds A B A B …, each round in an order of its own.

    In a round every session has unmeasured runs for 2 ms, in which its threads wake, those of the session before go to sleep
    and the caches fill, then measured runs for about 8 ms, or for a quarter of the slowest session's run, at least one.
    Clock speed, heat and other processes change over seconds, and so change every session of a round together.

    Args:
        sessions: name → opened artifact.
        inputs: input name → array; the same for all sessions.
        seconds: time to spend on all sessions together, warm-up included; at least 5 rounds are run whatever it takes.
        seed: of the order within rounds and of the bootstrap.
        clock: seconds, ever growing.
        progress: called after each round with the seconds spent, at most ``seconds``.

    Returns:
        name → latency in milliseconds.

    Raises:
        InputError: no sessions, or ``seconds`` is not positive.

    Differs:
        The bootstrap resamples rounds, not runs: runs of one round are not independent.
    """
    if not sessions:
        raise InputError("latency: there is nothing to measure; give at least one artifact")
    if not seconds > 0:
        raise InputError(f"latency: seconds is {seconds}; more than 0 is needed")
    start = clock()
    rng = random.Random(seed)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        # Warm-up has a fifth of the time: runtimes choose kernels and allocate memory in the first runs.
        share = seconds / 5 / len(sessions)
        single = {
            name: _warm_up(session, inputs, share, clock) for name, session in sessions.items()
        }
        burst = max(BURST, max(single.values()) / 4)
        times: dict[str, list[list[float]]] = {name: [] for name in sessions}
        order = list(sessions)
        while True:
            rng.shuffle(order)
            for name in order:
                if single[name] < SLOW:
                    _timed(sessions[name], inputs, SETTLE, clock)
                times[name].append(_timed(sessions[name], inputs, burst, clock))
            spent = clock() - start
            if progress:
                progress(min(spent, seconds))
            done = len(times[order[0]])
            if done >= LEAST_ROUNDS and spent + spent / done >= seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(rounds, sessions[name].threads, seed) for name, rounds in times.items()}


def ratio(numerator: Latency, denominator: Latency, seed: int = 0) -> Ratio:
    """How many times as long ``numerator`` takes as ``denominator``.

    Args:
        numerator, denominator: measured together by `interleaved`; their rounds are pairs.
        seed: of the bootstrap.

    Returns:
        The ratio of the medians over rounds, and its bootstrap 95 % interval from resampled pairs of rounds.

    Raises:
        InputError: the two were not measured together.
    """
    if len(numerator.rounds) != len(denominator.rounds):
        raise InputError(
            f"ratio: {len(numerator.rounds)} rounds against {len(denominator.rounds)}; "
            "measure both in one call of interleaved"
        )
    a, b = np.array(numerator.rounds), np.array(denominator.rounds)
    drawn = _draws(len(a), seed)
    ratios = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high))


def _warm_up(
    session: Session,
    inputs: Mapping[str, np.ndarray],
    share: float,
    clock: Callable[[], float],
) -> float:
    """Run until three runs in a row agree within 10 %, or the share of time is spent; the shortest of the three."""
    start = clock()
    times: list[float] = []
    while True:
        times += _timed(session, inputs, 0, clock)
        last = times[-WARM_UP_RUNS:]
        stable = max(last) <= 1.1 * min(last)
        if len(times) >= WARM_UP_RUNS and (stable or clock() - start >= share):
            return min(last)


def _timed(
    session: Session,
    inputs: Mapping[str, np.ndarray],
    burst: float,
    clock: Callable[[], float],
) -> list[float]:
    """Seconds of each run, for as long as a burst lasts; at least one run."""
    times = []
    begin = clock()
    while True:
        start = clock()
        session.run(inputs)
        end = clock()
        times.append(end - start)
        if end - begin >= burst:
            return times


def _summary(rounds: list[list[float]], threads: int, seed: int) -> Latency:
    runs = 1000 * np.concatenate([np.array(times) for times in rounds])
    medians = 1000 * np.array([np.median(times) for times in rounds])
    drawn = np.median(medians[_draws(len(medians), seed)], axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    median = float(np.median(medians))
    return Latency(
        median=median,
        low=float(low),
        high=float(high),
        p95=float(np.quantile(runs, 0.95)),
        runs=len(runs),
        threads=threads,
        rounds=tuple(float(value) for value in medians),
    )


def _draws(count: int, seed: int) -> np.ndarray:
    """Indices of resampled rounds, shape (RESAMPLES, count)."""
    return np.random.default_rng(seed).integers(0, count, size=(RESAMPLES, count))
