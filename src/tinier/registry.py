"""Adding a technique is adding a file: a folder is scanned and its final classes register themselves."""

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def implementations(package: ModuleType, base: type[T]) -> dict[str, type[T]]:
    """The final subclasses of ``base`` that the modules of a package define, by their ``name``.

    Args:
        package: the folder to scan, imported; each of its modules is imported.
        base: the abstract class; every implementation has a class attribute ``name: str``.

    Returns:
        name → class, sorted by name.
    """
    found: dict[str, type[T]] = {}
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        for item in vars(importlib.import_module(module.name)).values():
            if not inspect.isclass(item) or item.__module__ != module.name:
                continue
            if issubclass(item, base) and not inspect.isabstract(item) and item is not base:
                found[item.name] = item  # type: ignore[attr-defined]
    return dict(sorted(found.items()))
