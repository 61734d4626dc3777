"""Data from wherever they are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import tinier.data
from tinier.data.base import Examples
from tinier.data.fit import fit
from tinier.data.reader import Options, Reader
from tinier.errors import DataError
from tinier.registry import implementations

PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".joblib")
KINDS = (
    ".npz, a folder of class folders of images, .csv, .jsonl, .parquet, or module:function; "
    "in Python also a Dataset, a DataLoader, a tuple (x, y) or a dict of arrays"
)


def read(
    spec: Any,
    example: Mapping[str, Tensor],
    *,
    tokenizer_folder: Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_length: int = 128,
) -> Examples:
    """Examples for a network, of a file, a folder, a function or Python objects.

    uint8 images for a float model are divided by 255, then less ``mean`` and divided by ``std``; floats and integers are cast
    to the model's type where nothing is lost but digits; ``notes`` of the result says what was done.

    Args:
        spec: a path to ``.npz``, ``.csv``, ``.jsonl``, ``.parquet`` or a folder of images; ``module:function``; a torch
            Dataset or DataLoader; a tuple (x, y), a dict of arrays, one array.
        example: the network's example inputs by name; they say what the data must be made into.
        tokenizer_folder: the Hugging Face directory whose tokenizer, label names and image mean are used.
        mean: of each channel of an image in [0, 1].
        std: deviation of each channel of an image in [0, 1].
        max_length: texts are cut at this many tokens.

    Raises:
        DataError: the data cannot be read or do not fit; the message has the fix.
        MissingError: reading this needs a package that is not installed.
    """
    options = Options(
        Path(tokenizer_folder) if tokenizer_folder is not None else None,
        None if mean is None else tuple(map(float, mean)),
        None if std is None else tuple(map(float, std)),
        max_length,
    )
    if max_length < 1:
        raise DataError(f"max_length {max_length}; 1 or more is needed")
    for kind in implementations(tinier.data, Reader).values():  # type: ignore[type-abstract]
        reader = kind()
        if not reader.accepts(spec):
            continue
        if isinstance(spec, Path) or (isinstance(spec, str) and reader.name != "python"):
            _present(Path(spec))
        return fit(reader.read(spec, example, options), example, options)
    if isinstance(spec, str | Path):
        path = Path(spec)
        if path.suffix.lower() in PICKLES:
            raise DataError(
                f"{path}: pickles are never loaded; save the arrays with np.savez('data.npz', x=…, y=…)"
            )
        _present(path)
        raise DataError(f"{path}: data of this kind cannot be read; give {KINDS}")
    raise DataError(f"data: a {type(spec).__name__} cannot be read; give {KINDS}")


def _present(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; save the data again")
