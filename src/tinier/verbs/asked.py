"""Whether the arguments of ``prune`` fit together: nothing that was asked for is passed over."""

from collections.abc import Mapping

from tinier.errors import InputError
from tinier.units import is_number, is_whole, parse_bytes

# Each of these says how much is left.
AMOUNTS = ("keep", "at_most", "max_latency", "threshold")
# What goes together with an argument that most others say nothing to.
FITS = {
    "pattern": {"keep", "threshold", "ranking"},
    "max_latency": {"target", "threads", "rates", "uniform", "compensate", "ranking", "round_to"},
}
SCHEDULES = ("geometric", "cubic")


def check_together(given: Mapping[str, bool], pattern: str | None) -> None:
    """Refuse arguments of which one would be passed over.

    Args:
        given: argument → whether the user gave it.
        pattern: of masks, if one was given.

    Raises:
        InputError: two of them contradict each other, or one is of no use without another; the message says what to leave out.
    """
    asked = [name for name, yes in given.items() if yes]
    amounts = [name for name in AMOUNTS if name in asked]
    if len(amounts) > 1:
        raise InputError(
            f"{' and '.join(amounts)}: each says how much is left; give one and leave out the others"
        )
    for name in FITS.keys() & set(asked):
        wrong = [other for other in asked if other != name and other not in FITS[name]]
        if wrong:
            raise InputError(f"{name} does not go together with {', '.join(wrong)}; leave one out")
    if pattern is not None and ":" in pattern:
        wrong = [name for name in ("keep", "threshold", "ranking") if name in asked]
        if wrong:
            raise InputError(
                f"pattern={pattern!r} says itself what stays; leave out {', '.join(wrong)}"
            )
    if "steps" in asked:
        wrong = [name for name in ("threshold", "rates", "max_latency") if name in asked]
        if wrong:
            raise InputError(f"steps: rounds need a share, so {', '.join(wrong)} goes in one")
    elif "schedule" in asked:
        raise InputError("schedule says how rounds share the cut: give steps, 2 or more")
    if "threads" in asked and "max_latency" not in asked:
        raise InputError("threads are those that max_latency is measured with; give that, too")
    if "target" in asked and "round_to" in asked and "max_latency" not in asked:
        raise InputError(
            "target says what max_latency is measured on, and without that how widths are rounded; leave out target or round_to"
        )


def check_numbers(
    steps: int, epochs: float, depth: float, threads: int | None, seed: int, schedule: str | None
) -> None:
    """Refuse values out of their range, or of another kind.

    Raises:
        InputError: with the argument, what it is and what is needed.
    """
    if not is_whole(steps) or steps < 1:
        raise InputError(f"steps={steps!r}: a whole number of rounds, at least 1, is needed")
    if not is_number(epochs) or epochs < 0:
        raise InputError(f"epochs={epochs!r}: a number of at least 0 is needed")
    if not is_number(depth) or depth < 0 or (depth >= 1 and depth != int(depth)):
        raise InputError(
            f"depth={depth!r}: a number of blocks, or a share of their MACs below 1, is needed"
        )
    if threads is not None and (not is_whole(threads) or threads < 1):
        raise InputError(f"threads={threads!r}: a whole number, at least 1, is needed")
    if not is_whole(seed):
        raise InputError(f"seed={seed!r}: a whole number is needed")
    if schedule is not None and schedule not in SCHEDULES:
        raise InputError(f"schedule={schedule!r}: one of {', '.join(SCHEDULES)} is needed")


def amount(at_most: float | str | None, of: str) -> float | None:
    """The number that ``at_most`` means; sizes such as "1MB" are of bytes.

    Raises:
        InputError: it is a text without a number, or a size of what has none.
    """
    if not isinstance(at_most, str):
        return at_most
    if of == "bytes":
        return parse_bytes(at_most, "at_most")
    try:
        return float(at_most)
    except ValueError:
        raise InputError(
            f"at_most={at_most!r}: a number of {of} is needed, such as 2e6; a size such as 1MB goes with of='bytes'"
        ) from None


def shares(share: float, steps: int, schedule: str | None) -> list[float]:
    """What is left after each of several rounds, the last of which leaves ``share``.

    "geometric": share^(t/n), each round keeps the same part of what it finds. "cubic": 1 − (1 − share) (1 − (1 − t/n)³), most is cut in
    the first rounds, while there is much to spare.

    Source:
        Zhu and Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression", equation 1, for "cubic".
    """
    done = [step / steps for step in range(1, steps + 1)]
    if schedule == "cubic":
        return [1 - (1 - share) * (1 - (1 - part) ** 3) for part in done]
    return [share**part for part in done]
