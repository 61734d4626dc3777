"""What every way of reading data has in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tinier.data.base import Examples

LABELS = ("y", "label", "labels")


@dataclass(frozen=True)
class Options:
    """How to read.

    Attributes:
        tokenizer_folder: the Hugging Face directory whose tokenizer and label names text is read with.
        mean: taken from each channel of an image after the scaling to [0, 1].
        std: divides each channel of an image after that.
        max_length: texts are cut at this many tokens.
    """

    tokenizer_folder: Path | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    max_length: int = 128


class Reader(ABC):
    """One way to read data; each is a file of this folder."""

    name: ClassVar[str]

    @abstractmethod
    def accepts(self, spec: Any) -> bool:
        """Whether it is this kind of data, by the look of it (a file's ending, an object's type)."""

    @abstractmethod
    def read(self, spec: Any, example: Mapping[str, Tensor], options: Options) -> Examples:
        """Read it for a network with these example inputs.

        Raises:
            DataError: it cannot be read.
        """


def has_label_name(key: str, inputs: Sequence[str]) -> bool:
    """Whether an array or column holds the labels: it is called so, and the network has no input of that name."""
    return key in LABELS and key not in inputs


def plain_labels(labels: Tensor) -> Tensor:
    """Labels as int64 or float32; a column (n, 1) of integers becomes a row (n,)."""
    if labels.is_floating_point():
        return labels.float()
    return (labels.squeeze(1) if labels.ndim == 2 and labels.shape[1] == 1 else labels).to(
        torch.int64
    )
