"""A folder of images, by class."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinier.data.base import Batch, Examples, Store
from tinier.data.fit import normalized
from tinier.data.reader import Options, Reader
from tinier.errors import DataError, MissingError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class Images(Store):
    """Image files, decoded when they are needed.

    Args:
        files: the images.
        labels: (n,) class of each, or None.
        name: the network's input.
        wanted: its example, (n, channels, height, width).
    """

    finite = True

    def __init__(
        self,
        files: Sequence[Path],
        labels: Tensor | None,
        name: str,
        wanted: Tensor,
        options: Options,
    ) -> None:
        self.files = list(files)
        self._labels = labels
        self.name = name
        self.channels, self.height, self.width = wanted.shape[1:]
        self.dtype = wanted.dtype
        self.options = options
        self.size = len(self.files)
        self.labelled = labels is not None

    def fetch(self, rows: Sequence[int]) -> Batch:
        raw = torch.stack([self._decode(self.files[row]) for row in rows])
        images = raw
        if self.dtype.is_floating_point:
            images = normalized(raw.float() / 255, self.options).to(self.dtype)
        return {self.name: images}, None if self._labels is None else self._labels[list(rows)]

    def labels(self, rows: Sequence[int]) -> Tensor:
        if self._labels is None:
            raise DataError("the data have no labels")
        return self._labels[list(rows)]

    def _decode(self, file: Path) -> Tensor:
        from PIL import Image, ImageOps

        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB" if self.channels == 3 else "L")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{file}: not an image that can be read ({error}); remove it"
            ) from error
        image = ImageOps.fit(image, (self.width, self.height), Image.Resampling.BILINEAR)
        array = np.array(image, dtype=np.uint8)
        planes = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(planes))


class ImageReader(Reader):
    """A folder with one folder of images for each class, whose sorted names are the classes 0, 1, …; or images alone,
    which have no labels.

    Each image is scaled to cover the height and width of the model's input and cut at the middle (bilinear), made grey or
    RGB by the input's channels, divided by 255, then less ``mean`` and divided by ``std``. Of a Hugging Face directory mean,
    deviation and, if the folders are called as its labels, the class indices are used.
    """

    name = "images"

    def accepts(self, spec: Any) -> bool:
        return isinstance(spec, str | Path) and Path(spec).is_dir()

    def read(self, spec: Any, example: Mapping[str, Tensor], options: Options) -> Examples:
        try:
            import PIL  # noqa: F401  (optional)
        except ImportError as error:
            raise MissingError("pillow", "images", "reading images") from error
        folder = Path(spec)
        name, wanted = next(iter(example.items()))
        if len(example) != 1 or wanted.ndim != 4 or wanted.shape[1] not in (1, 3):
            shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in example.items())
            raise DataError(
                f"{folder}: a folder of images is for models with one input (n, 1 or 3, height, width); "
                f"this one takes {shapes}; write a Dataset (module:function)"
            )
        folders = sorted(
            part for part in folder.iterdir() if part.is_dir() and part.name[:1] not in "._"
        )
        alone = _images(folder)
        if alone and folders:
            raise DataError(
                f"{folder}: images beside folders; give one folder for each class, or images alone"
            )
        if not alone and not folders:
            raise DataError(
                f"{folder}: no images; one folder of images ({' '.join(ENDINGS[:3])} …) for each class "
                "is needed"
            )
        files, labels = list(alone), [0] * len(alone)
        notes: list[str] = []
        indices, named = _label_indices([part.name for part in folders], options.tokenizer_folder)
        if named:
            notes.append("class indices by the label2id of config.json")
        elif [p.name for p in folders] != sorted(
            (p.name for p in folders), key=lambda n: (int(n) if n.isdecimal() else -1, n)
        ):
            notes.append("class folders are in alphabetical order: 10 comes before 2")
        for part, index in zip(folders, indices, strict=True):
            inside = _images(part)
            if not inside:
                raise DataError(f"{part}: a class folder without images; remove it or fill it")
            files += inside
            labels += [index] * len(inside)
        used = _with_preprocessor(options, notes)
        return Examples(
            Images(files, torch.tensor(labels) if folders else None, name, wanted, used),
            origin=str(spec),
            classes=[part.name for part in folders],
            notes=notes,
        )


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)


def _label_indices(names: list[str], folder: Path | None) -> tuple[list[int], bool]:
    label2id = label_names(folder)
    if names and all(name in label2id for name in names):
        return [label2id[name] for name in names], True
    return list(range(len(names))), False


def label_names(folder: Path | None) -> dict[str, int]:
    """``label2id`` of a Hugging Face directory's config.json; empty where there is none."""
    if folder is None or not (folder / "config.json").is_file():
        return {}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {str(key): int(value) for key, value in (config.get("label2id") or {}).items()}


def _with_preprocessor(options: Options, notes: list[str]) -> Options:
    folder = options.tokenizer_folder
    if folder is None or options.mean or options.std:
        return options
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return options
    config = json.loads(file.read_text(encoding="utf-8"))
    if not config.get("do_normalize", True) or not config.get("image_mean"):
        return options
    notes.append(f"mean and std of {file.name}")
    return replace(
        options, mean=tuple(config["image_mean"]), std=tuple(config.get("image_std") or (1.0,))
    )
