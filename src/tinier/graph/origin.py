"""Where in the user's files an error comes from."""

import sysconfig
import traceback
from pathlib import Path

import torch

_TORCH = str(Path(torch.__file__).parent)
_TINIER = str(Path(__file__).parent.parent)
_PYTHON = sysconfig.get_path("stdlib")


def line_of(error: BaseException) -> str | None:
    """The line of the user's model that an error came from, as ``file:line: source``; None if it was none of theirs.

    The innermost frame outside of torch, of tinier and of Python itself, over the error and what caused it.
    """
    found = None
    seen: BaseException | None = error
    while seen is not None:
        for frame in traceback.extract_tb(seen.__traceback__):
            if _is_model(frame.filename):
                found = frame
        if found is not None:
            break
        seen = seen.__cause__ or seen.__context__
    if found is None:
        return None
    path = Path(found.filename)
    name = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{name}:{found.lineno}: {found.line}"


def _is_model(file: str) -> bool:
    installed = "site-packages" in file
    return not file.startswith((_TORCH, _TINIER, "<")) and (
        installed or not file.startswith(_PYTHON)
    )
