"""Write docs/reference.md from the docstrings of the code: python scripts/reference.py"""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import tinier
from tinier.registry import implementations

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
# Title, folder, module of the abstract class, its name.
FAMILIES = [
    ("Targets", "targets", "base", "Target"),
    ("Methods", "methods", "base", "Method"),
    ("Criteria", "criteria", "base", "Criterion"),
    ("Losses", "recovery", "base", "Loss"),
    ("Losses of features", "recovery", "base", "FeatureLoss"),
    ("Penalties", "recovery", "base", "Penalty"),
    ("Data readers", "data", "reader", "Reader"),
    ("Sources", "sources", "base", "Source"),
]
# A module (all its public functions), a package (those that it names), or one function of either.
MODULES = [
    "compress",
    "verbs",
    "shrink:shrink",
    "inspect",
    "verify",
    "measure.files:measure_files",
    "statistics",
    "recovery.compensation:compensate",
]


def page() -> str:
    """The whole of docs/reference.md."""
    head = "# Reference\n\nWritten by `scripts/reference.py` from the docstrings: change those.\n"
    return "\n".join([head, *_tables(), "## Functions", *_signatures(), ""])


def _tables() -> Iterator[str]:
    for title, folder, module, name in FAMILIES:
        yield f"## {title}\n\n| name | class | what | fields and defaults |\n|---|---|---|---|"
        abstract = getattr(importlib.import_module(f"tinier.{folder}.{module}"), name)
        package = importlib.import_module(f"tinier.{folder}")
        for key, cls in implementations(package, abstract).items():
            fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
            where = f"`{cls.__module__}.{cls.__name__}`"
            cells = [f"`{key}`", where, _first_sentence(cls), ", ".join(map(_field, fields))]
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield ""


def _signatures() -> Iterator[str]:
    for entry in MODULES:
        path, _, only = entry.partition(":")
        module = importlib.import_module(f"tinier.{path}")
        for name, item in list(vars(module).items()):
            listed = name in getattr(module, "__all__", ())
            own = inspect.isfunction(item) and (listed or item.__module__ == module.__name__)
            if own and name[0] != "_" and only in ("", name):
                where = "tinier" if getattr(tinier, name, None) is item else module.__name__
                text = f"{_signature(item)}\n\n{inspect.getdoc(item)}"
                yield f"\n### {where}.{name}\n\n```text\n{text}\n```"


def _signature(function: FunctionType) -> str:
    """As the author wrote it, which does not change with the version of Python."""
    tree = ast.parse(inspect.getsource(function))
    line = ast.unparse(tree).splitlines()[0].removeprefix("def ").removesuffix(":")
    return textwrap.fill(line, 100, subsequent_indent="    ", break_long_words=False)


def _first_sentence(cls: type) -> str:
    text = " ".join((inspect.getdoc(cls) or "").split())
    return re.split(r"(?<=\.)\s", text)[0].replace("``", "`")


def _field(field: dataclasses.Field) -> str:
    made, none = field.default_factory, dataclasses.MISSING
    default = field.default if made is none else made()  # type: ignore[misc]
    return f"`{field.name}`" if default is none else f"`{field.name}={default!r}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
