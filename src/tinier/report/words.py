"""How figures are said: the same words in the terminal, in the HTML and in the JSON."""

import math
import unicodedata
from collections.abc import Mapping
from html import escape
from typing import Any

from tinier.search.candidate import Limits
from tinier.search.certificate import Certificate

NOTHING = "–"  # what a table shows where nothing was measured


def clean(text: object) -> str:
    """Text from a model or data set without control characters, which could repaint a terminal."""
    return "".join(
        " " if unicodedata.category(sign) in ("Cc", "Zl", "Zp") else sign for sign in str(text)
    )


def escaped(text: object) -> str:
    """Text for HTML, between tags or in an attribute, without control characters."""
    return escape(clean(text))


def plain(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, never in exponent form below a million."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:,.{min(decimals, 9)}f}"


def milliseconds(value: float | None) -> str:
    """ "0.412 ms"."""
    return NOTHING if value is None else f"{plain(value)} ms"


def size(count: float | None) -> str:
    """Bytes in decimal units: "276 kB"."""
    if count is None:
        return NOTHING
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{plain(count)} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def times(ratio: float | None) -> str:
    """A ratio: "8.3×", "34×"."""
    if ratio is None:
        return NOTHING
    return f"{ratio:.0f}×" if ratio >= 19.95 else f"{ratio:.1f}×"


def compared(ratio: float, more: str, less: str) -> str:
    """A ratio in words: "8.3× faster", "1.4× slower", "no faster" where a twentieth is all there is."""
    if ratio >= 1.05:
        return f"{times(ratio)} {more}"
    return f"{times(1 / ratio)} {less}" if ratio <= 0.95 else f"no {more}"


def quality(value: float | None, facts: Mapping[str, Any]) -> str:
    """A metric's value: "93.21 %" for shares, a plain number otherwise."""
    if value is None:
        return NOTHING
    return f"{100 * value:.2f} %" if facts.get("points") else plain(value, 4)


def points(loss: float | None, facts: Mapping[str, Any], *, up: bool = False) -> str:
    """A loss: "0.57 points" for shares, a plain number otherwise.

    Args:
        loss: in units of the metric.
        facts: of the result.
        up: round towards more loss, as a bound must be.
    """
    if loss is None:
        return NOTHING
    if not facts.get("points"):
        if up and loss:
            step = 10.0 ** (math.floor(math.log10(abs(loss))) - 2)
            loss = math.ceil(loss / step - 1e-6) * step
        said = plain(loss, 3)
        return said.rstrip("0").rstrip(".") if "." in said else said
    number = 100 * loss
    number = math.ceil(100 * number - 1e-6) / 100 if up else round(number, 2)
    said = f"{number + 0.0:.2f}".rstrip("0").rstrip(".")
    return f"{said} point" if said == "1" else f"{said} points"


def percent(share: float) -> str:
    """ "95 %"."""
    return f"{100 * share:.4g} %"


def limits(asked: Limits, facts: Mapping[str, Any]) -> list[str]:
    """What the user asked for, one phrase a limit; empty when nothing was asked."""
    said = []
    if asked.max_drop is not None:
        said.append(f"at most {points(asked.max_drop, facts)} worse")
    if asked.max_latency is not None:
        said.append(f"at most {milliseconds(asked.max_latency)}")
    if asked.max_size is not None:
        said.append(f"at most {size(asked.max_size)}")
    return said


def worse(certificate: Certificate, facts: Mapping[str, Any]) -> str:
    """The bound in three words: "at most 0.57 points worse"."""
    if certificate.bound <= 0:
        return "not worse"
    return f"at most {points(certificate.bound, facts, up=True)} worse"


def certificate(proof: Certificate, facts: Mapping[str, Any]) -> list[str]:
    """A certificate in sentences that need no statistics to be read.

    Returns:
        What is proved; what was seen; what it means.
    """
    metric = facts.get("metric") or "the metric"
    sure = percent(1 - proof.delta)
    bound = points(proof.bound, facts, up=True)
    if proof.bound <= 0:
        proved = f"With {sure} confidence, {metric} is not worse than that of the original."
    else:
        proved = (
            f"With {sure} confidence, {metric} is at most {bound} worse than that of the original."
        )
    if proof.holds:
        proved += f" The limit of {points(proof.limit, facts)} holds."
    elif proof.holds is False:
        proved += f" The limit of {points(proof.limit, facts)} could not be certified."
        if proof.needed:
            proved += f" About {proof.needed:,} examples would be needed for it."
    seen = (
        f"Measured on {proof.examples:,} examples that nothing was trained or tuned on: "
        f"{_flips(proof.harmful)} answered worse than by the original, {_flips(proof.helpful)} better; "
        f"on balance {_balance(proof.loss, facts)}."
    )
    meaning = (
        f"If this were done over with fresh examples again and again, a statement like this one would be wrong in at most "
        f"{percent(proof.delta)} of the cases (δ = {proof.delta:g}). It speaks of data like the data it was measured on. "
        f"Test: {proof.test}."
    )
    return [proved, seen, meaning]


def _flips(count: int) -> str:
    return f"{count:,} {'is' if count == 1 else 'are'}"


def _balance(loss: float, facts: Mapping[str, Any]) -> str:
    if abs(loss) < 1e-12:
        return "no difference"
    return f"{points(abs(loss), facts)} {'worse' if loss > 0 else 'better'}"


def bar(share: float, width: int = 20) -> str:
    """A share in [0, 1] as a bar of blocks, with its percentage."""
    full = round(share * width)
    return f"{'█' * full}{'░' * (width - full)} {share:4.0%}"
