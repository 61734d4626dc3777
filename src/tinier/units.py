"""Quantities as people write them: 1%, 5ms, 4MB, 10m."""

import re
from numbers import Integral, Real

from tinier.errors import InputError

SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


def parse_seconds(text: float | str, default: str = "s", name: str = "budget") -> float:
    """Seconds of a duration.

    Args:
        text: "90s", "10m", "1h", "5ms"; a plain number has the unit ``default``.
        default: unit of a plain number.
        name: what the error calls it.

    Raises:
        InputError: it is not a positive duration.
    """
    return _parse(
        text, SECONDS, default, f"{name} is {text!r}; write a duration such as 5ms, 90s or 10m"
    )


def parse_milliseconds(text: float | str) -> float:
    """Milliseconds of a latency ("5ms", "0.1s", or a plain number of milliseconds)."""
    return 1e3 * parse_seconds(text, "ms", "max-latency")


def parse_bytes(text: float | str, name: str = "max-size") -> int:
    """Bytes of a size ("4MB", "512KiB", or a plain number of bytes)."""
    return int(_parse(text, BYTES, "b", f"{name} is {text!r}; write a size such as 300kB or 4MB"))


def is_number(value: object) -> bool:
    """Whether a value is a real number, not a text, None, NaN or a truth value."""
    return isinstance(value, Real) and not isinstance(value, bool) and value == value


def is_whole(value: object) -> bool:
    """Whether a value is an integer, of Python or numpy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def parse_drop(text: float | str) -> float:
    """A loss of quality in units of the metric: "1%" is 0.01, as is 0.01.

    Raises:
        InputError: it is not a number, or negative.
    """
    value = str(text).strip()
    try:
        drop = float(value[:-1]) / 100 if value.endswith("%") else float(value)
    except ValueError:
        drop = -1.0
    if not 0 <= drop < float("inf"):
        raise InputError(f"max-drop is {text!r}; write a share such as 1% or 0.01")
    return drop


def _parse(
    text: float | str, units: dict[str, float] | dict[str, int], default: str, error: str
) -> float:
    match = re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = (match[2].lower() or default) if match else ""
    try:
        value = float(match[1]) * units[unit] if match else 0.0
    except (KeyError, ValueError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError(error)
    return value
