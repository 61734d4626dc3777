"""A criterion from what the user gave: an object, a name or a function."""

from collections.abc import Callable
from difflib import get_close_matches
from inspect import isclass
from pathlib import Path
from typing import Any

import tinier.criteria
from tinier.criteria.base import Criterion
from tinier.data.python import FUNCTION, import_function
from tinier.errors import InputError
from tinier.registry import implementations


def as_criterion(value: Criterion | str | Callable[..., Any] | None) -> Criterion:
    """The criterion that is meant.

    Args:
        value: a criterion; the name of one, with its defaults; a function (network, group) → scores, one for each channel, or
            "module:function" that names it, which imports the user's module; None for L2 magnitude.

    Raises:
        InputError: no criterion has that name, there is no such module or function, or ``value`` is none of these.
    """
    if isinstance(value, Criterion):
        return value
    if isinstance(value, str) and FUNCTION.fullmatch(value) and not Path(value).exists():
        value = import_function(value)
        if isclass(value) and issubclass(value, Criterion):
            return value()
    known = implementations(tinier.criteria, Criterion)  # type: ignore[type-abstract]
    if value is None:
        return known["magnitude"]()
    if isclass(value) and issubclass(value, Criterion):
        raise InputError(f"criterion {value.__name__}: a class; write {value.__name__}()")
    if callable(value):
        make: Any = known.pop("function")
        wrapped: Criterion = make(value)
        return wrapped
    names = [name for name in known if name != "function"]
    if value in names:
        return known[value]()
    near = get_close_matches(value, names, 1) if isinstance(value, str) else []
    meant = f"; did you mean {near[0]}?" if near else ""
    raise InputError(
        f"criterion {value!r}: one of {', '.join(names)}, or a function (network, group) → scores, is needed{meant}"
    )
