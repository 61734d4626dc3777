"""NumPy files, without pickles."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tinier.data.base import Arrays, Examples
from tinier.data.python import by_name
from tinier.data.reader import Options, Reader, has_label_name
from tinier.errors import DataError


class NumpyReader(Reader):
    """``.npz``: arrays by input name (for one input also ``x`` or the first array), labels as ``y``, ``label`` or
    ``labels``. ``.npy``: the one input, no labels."""

    name = "npz"

    def accepts(self, spec: Any) -> bool:
        return isinstance(spec, str | Path) and Path(spec).suffix.lower() in (".npz", ".npy")

    def read(self, spec: Any, example: Mapping[str, Tensor], options: Options) -> Examples:
        path = Path(spec)
        names = tuple(example)
        arrays = arrays_of(path)
        classes: list[str] = []
        for key, value in arrays.items():
            if has_label_name(key, names) and value.dtype.kind in "US":
                found, index = np.unique(value, return_inverse=True)
                classes = [str(name) for name in found.astype(str)]
                arrays[key] = index.reshape(value.shape)
        try:
            store = Arrays(*by_name(arrays, names))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        return Examples(store, origin=str(spec), classes=classes)


def arrays_of(path: Path) -> dict[str, Any]:
    """The arrays of an ``.npz`` file by name; the one of an ``.npy`` file is called x.

    Raises:
        DataError: not a NumPy file, one with pickles in it, or one without arrays.
    """
    arrays: dict[str, Any] = {}
    with path.open("rb") as stream:
        start = stream.read(6)
    if not start.startswith((b"PK", b"\x93NUMPY", b"\x80")):  # a zip, a NumPy header, or a pickle
        raise DataError(f"{path}: not a NumPy file; save it with np.savez(path, x=…, y=…)")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            arrays = {"x": loaded}
        else:
            with loaded:
                arrays = {key: loaded[key] for key in loaded.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error) or "pickled" in str(error):
            raise DataError(
                f"{path}: it holds Python objects (a pickle), which are never loaded; save arrays of "
                "numbers with np.savez(path, x=…, y=…)"
            ) from error
        raise DataError(f"{path}: not a NumPy file ({error}); save it with np.savez") from error
    if not arrays:
        raise DataError(f"{path}: it has no arrays; save it with np.savez(path, x=…, y=…)")
    return arrays
