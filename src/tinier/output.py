"""Output folders: never somebody else's, and whole or not at all."""

import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tinier.errors import OutputError

MARK = "result.json"  # the file that says that tinier made a folder
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_SPACE = "no space left to write {}; free some, or name a folder on another disk"


def check_output(out: str | Path, ours: Callable[[Path], bool] | None = None) -> Path:
    """The output folder as an absolute path, once it is known that it can be written.

    Args:
        out: where the result goes; a folder with something in it is replaced only if tinier made it.
        ours: whether tinier made a folder; by default whether it holds a result.

    Raises:
        OutputError: it is a file, a folder that tinier did not make, or its parent does not exist or cannot be written.
    """
    folder = Path(out).absolute()
    if folder.is_file():
        raise OutputError(f"{out} is a file; name a folder that tinier may make")
    if folder.is_dir() and any(folder.iterdir()) and not (ours or _is_result)(folder):
        raise OutputError(
            f"{out} exists and was not made by tinier; name another folder, or empty this one"
        )
    parent = folder.parent
    if not parent.is_dir():
        raise OutputError(f"{out}: the folder {parent} does not exist; make it first")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{out}: no permission to write in {parent}")
    return folder


def check_files(out: str | Path, ours: Callable[[Path], bool]) -> Path:
    """The absolute path of a folder that files go into, which is made with its parents if need be.

    Args:
        out: a folder; what is in it stays.
        ours: whether tinier made all that is in a folder.

    Raises:
        OutputError: it is a file, has files of somebody else, or cannot be written.
    """
    folder = Path(out).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise OutputError(f"{out}: {there} is a file; name a folder that tinier may make")
    if there == folder and any(folder.iterdir()) and not ours(folder):
        raise OutputError(
            f"{out} exists and was not made by tinier; name another folder, or empty this one"
        )
    if not os.access(there, os.W_OK):
        raise OutputError(f"{out}: no permission to write in {there}")
    return folder


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A new folder whose files go into ``folder`` when the block ends well, and vanish when it does not.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    made: Path | None = None
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=there))
        yield made
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(made.iterdir()):
            file.replace(folder / file.name)
    except OSError as error:
        if error.errno in FULL:
            raise OutputError(NO_SPACE.format(folder)) from error
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A name beside ``file`` to write to, which takes its place when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: it is a folder, its folder does not exist, the disk is full, or it cannot be written.
    """
    folder = file.absolute().parent
    if file.is_dir():
        raise OutputError(f"{file} is a folder; name a file")
    if not folder.is_dir():
        raise OutputError(f"{file}: the folder {folder} does not exist; make it first")
    made = folder / f".{file.name}-{secrets.token_hex(4)}"
    try:
        yield made
        made.replace(file)
    except OSError as error:
        if error.errno in FULL:
            raise OutputError(NO_SPACE.format(file)) from error
        raise OutputError(f"{file} cannot be written: {error.strerror or error}") from error
    finally:
        made.unlink(missing_ok=True)


def _is_result(folder: Path) -> bool:
    """Whether the folder has the mark of a result; a file of that name alone is none."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(mark, dict) and {"tinier", "summary", "table"} <= mark.keys()


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder`` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    made: Path | None = None
    old: Path | None = None
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        yield made
        made.chmod(0o755)
        if folder.exists():
            old = made.with_name(f"{made.name}-replaced")
            folder.rename(old)
        made.rename(folder)
    except OSError as error:
        if error.errno in FULL:
            raise OutputError(NO_SPACE.format(folder)) from error
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:  # its only sign of what went wrong is its text
        if any(f"(os error {number})" in str(error) for number in FULL):
            raise OutputError(NO_SPACE.format(folder)) from error
        raise OutputError(f"{folder} cannot be written: {error}") from error
    finally:
        if made is not None and made.exists():
            shutil.rmtree(made, ignore_errors=True)
        if old is not None and not folder.exists():
            old.rename(folder)  # what was there stays, unless something whole took its place
        elif old is not None:
            shutil.rmtree(old, ignore_errors=True)
