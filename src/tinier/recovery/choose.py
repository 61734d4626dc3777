"""Losses and penalties from what the user gave: an object, a text, or several of them."""

import ast
import dataclasses
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import tinier.recovery
from tinier.errors import InputError
from tinier.recovery.base import FeatureLoss, Loss, Penalty
from tinier.registry import implementations


def as_losses(
    value: Loss | FeatureLoss | str | Sequence[Loss | FeatureLoss | str],
) -> tuple[Loss | FeatureLoss, ...]:
    """The losses that are meant.

    Args:
        value: a loss; the name of one, with its defaults or with settings, as "soft_targets" or "soft_targets:temperature=2"; or several.

    Raises:
        InputError: no loss has that name or setting, or ``value`` is none of these.
    """
    return _chosen(value, (Loss, FeatureLoss), "loss", "SoftTargets(temperature=4)")


def as_penalties(value: Penalty | str | Sequence[Penalty | str]) -> tuple[Penalty, ...]:
    """The penalties that are meant.

    Args:
        value: a penalty; the name of one, with its defaults or with settings, as "l1" or "l1:weight=1e-3,proximal=true"; or several.

    Raises:
        InputError: no penalty has that name or setting, or ``value`` is none of these.
    """
    return _chosen(value, (Penalty,), "penalty", "GroupLasso(1e-3)")


def _chosen(value: Any, bases: tuple[Any, ...], what: str, such: str) -> tuple[Any, ...]:
    if isinstance(value, (*bases, str)):
        value = (value,)
    if not isinstance(value, Sequence):
        raise InputError(
            f"{what}: {value!r} is none; give one such as {such}, its name, or a list of them"
        )
    return tuple(_one(each, bases, what, such) for each in value)


def _one(value: Any, bases: tuple[Any, ...], what: str, such: str) -> Any:
    if isinstance(value, bases):
        return value
    known = {n: k for base in bases for n, k in implementations(tinier.recovery, base).items()}
    name, _, settings = value.partition(":") if isinstance(value, str) else ("", "", "")
    if name not in known:
        near = get_close_matches(name, known, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise InputError(
            f"{what} {value!r}: one such as {such}, or one of {', '.join(known)}, is needed{meant}"
        )
    fields = [field.name for field in dataclasses.fields(known[name])]
    given = {}
    for text in settings.split(",") if settings else ():
        key, equals, number = text.partition("=")
        if key not in fields or not equals:
            raise InputError(
                f"{what} {value!r}: {text!r} is no setting of {name}; there are {', '.join(fields)}: {name}:{fields[0]}=…"
            )
        given[key] = _value(number)
    try:
        return known[name](**given)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} {value!r}: {error}") from error


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
