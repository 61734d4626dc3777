"""Penalties from what the user gave: an object, a text, or several of them."""

import ast
import dataclasses
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import tinier.recovery
from tinier.errors import InputError
from tinier.recovery.base import Penalty
from tinier.registry import implementations


def as_penalties(value: Penalty | str | Sequence[Penalty | str]) -> tuple[Penalty, ...]:
    """The penalties that are meant.

    Args:
        value: a penalty; the name of one, with its defaults or with settings, as "l1" or "l1:weight=1e-3,proximal=true"; or several.

    Raises:
        InputError: no penalty has that name or setting, or ``value`` is none of these.
    """
    if isinstance(value, Penalty | str):
        return (_penalty(value),)
    if not isinstance(value, Sequence):
        raise InputError(
            f"penalties: {value!r} is none; give a penalty such as GroupLasso(1e-3), its name, or a list of them"
        )
    return tuple(_penalty(one) for one in value)


def _penalty(value: Any) -> Penalty:
    if isinstance(value, Penalty):
        return value
    known = implementations(tinier.recovery, Penalty)  # type: ignore[type-abstract]
    name, _, settings = value.partition(":") if isinstance(value, str) else ("", "", "")
    if name not in known:
        near = get_close_matches(name, known, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise InputError(
            f"penalty {value!r}: a penalty such as GroupLasso(1e-3), or one of {', '.join(known)}, is needed{meant}"
        )
    fields = [field.name for field in dataclasses.fields(known[name])]  # type: ignore[arg-type]
    given = {}
    for text in settings.split(",") if settings else ():
        key, equals, number = text.partition("=")
        if key not in fields or not equals:
            raise InputError(
                f"penalty {value!r}: {text!r} is no setting of {name}; there are {', '.join(fields)}: {name}:{fields[0]}=…"
            )
        given[key] = _value(number)
    try:
        return known[name](**given)
    except TypeError as error:
        raise InputError(f"penalty {value!r}: {error}") from error


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
