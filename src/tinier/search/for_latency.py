"""How much of a network must be left so that it runs in a given time: measured on the runtime, not counted."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from tinier.edits.base import Plan
from tinier.errors import InputError, RefusedError
from tinier.measure.latency import interleaved
from tinier.methods.channel_pruning import ChannelPruning
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.targets.base import Session, Target

TRIES = 7
NEAR = 0.95  # a network this near to the limit is not worth another try
LEAST = 0.01  # the smallest share that is tried


@dataclass(frozen=True)
class Timed:
    """A plan that keeps the time, and what was measured on the way.

    Attributes:
        plan: the mildest one found.
        share: of the MACs that it keeps.
        latency: of the pruned network, median milliseconds.
        original: of the original in the same rounds.
        tried: (share, milliseconds) of each network that was measured.
    """

    plan: Plan
    share: float
    latency: float
    original: float
    tried: tuple[tuple[float, float], ...]


def plan_for_latency(
    network: Network,
    method: ChannelPruning,
    statistics: Statistics | None,
    limit: float,
    target: Target,
    *,
    threads: int,
    batch: int = 1,
    seconds: float = 1.5,
) -> Timed:
    """Search the largest share of MACs with which the artifact runs within the limit.

    What the weights are does not change the time, so nothing is trained or evaluated. Each network is measured in turns with the original.

    Args:
        network: the original.
        method: how it is pruned; its ``keep`` is what is searched.
        statistics: what the method's criterion needs.
        limit: median milliseconds.
        target: the runtime.
        threads: of the runtime.
        batch: examples a run.
        seconds: to measure each network.

    Returns:
        The mildest plan that keeps the limit; an empty one if the original does.

    Raises:
        RefusedError: the smallest network that the method can make is too slow; the message has its time.
        InputError: the target cannot take the network.

    Cost:
        At most eight exports and measurements; each export takes seconds.
    """
    refusal = target.refuses(network)
    if refusal:
        raise InputError(f"{target.name} cannot take the network: {refusal}")
    size = batch if network.traced.batched else len(next(iter(network.example.values())))
    inputs = {name: tensor.numpy() for name, tensor in network.batch(size).items()}
    with tempfile.TemporaryDirectory(prefix="tinier-") as folder:

        def session(one: Network, name: str) -> Session:
            path = Path(folder) / name
            path.mkdir()
            return target.open(target.lower(one, path).files[0], threads)

        def time(one: Session) -> tuple[float, float]:
            found = interleaved({"original": first, "pruned": one}, inputs, seconds=seconds)
            return found["pruned"].median, found["original"].median

        first = session(network, "original")
        whole = interleaved({"original": first}, inputs, seconds=seconds)["original"].median
        if whole <= limit:
            return Timed(Plan(), 1.0, whole, whole, ((1.0, whole),))
        best: Timed | None = None
        tried = [(1.0, whole)]
        least = ""
        low, high = 0.0, 1.0  # too much is cut at low, not enough at high
        share = max(limit / whole, LEAST)
        for _ in range(TRIES):
            try:
                plan = replace(method, keep=share).plan(network, statistics)
            except RefusedError as error:
                least, low = str(error), share
            else:
                pruned, original = time(session(plan.apply(network), f"{len(tried)}"))
                tried.append((share, pruned))
                if pruned <= limit:
                    best, low = Timed(plan, share, pruned, original, ()), share
                    if pruned >= NEAR * limit:
                        break
                else:
                    high = share
            if high - low < LEAST:
                break
            share = _next(tried, limit, low, high)
        if best is None:
            share, fastest = min(tried, key=lambda pair: pair[1])
            raise RefusedError(
                f"{network.name}: {limit:g} ms on {target.name} was asked for; the original takes {whole:.3g} ms, the fastest "
                f"network found {fastest:.3g} ms, with {share:.1%} of the MACs. {least}".strip()
            )
        return replace(best, tried=tuple(tried))


def _next(tried: list[tuple[float, float]], limit: float, low: float, high: float) -> float:
    """Between the bounds, where a straight line through the two nearest measurements meets the limit."""
    under = [pair for pair in tried if pair[1] <= limit]
    over = [pair for pair in tried if pair[1] > limit]
    middle = (low + high) / 2
    if not under or not over:
        return middle
    (a, below), (b, above) = max(under), min(over)
    guess = a + (b - a) * (limit - below) / max(above - below, 1e-9)
    return min(max(guess, low + 0.1 * (high - low)), high - 0.1 * (high - low))
