"""The parts of the data, each example in one part only."""

from dataclasses import dataclass
from typing import Any

import torch

from tinier.data.base import Examples
from tinier.data.check import check
from tinier.data.read import read
from tinier.data.split import split
from tinier.errors import DataError
from tinier.network import Network

SEARCHED = 0.3  # share of the data that candidates are compared on; the rest certifies


@dataclass(frozen=True)
class Parts:
    """The data, each example in one part only.

    Attributes:
        searched: candidates are compared on it.
        unseen: only the certificate looks at it.
        train: recovery learns from it; None where nothing is trained.
        fractions: how ``searched`` and ``unseen`` were split; None where each was handed in.
    """

    searched: Examples
    unseen: Examples
    train: Examples | None
    fractions: tuple[float, float] | None

    @staticmethod
    def of(
        network: Network, data: Any, train: Any, certify: Any, seed: int, options: dict[str, Any]
    ) -> "Parts":
        """Read, check and split the data; each part is in random order.

        Raises:
            DataError: the data cannot be read, do not fit the network, or two parts are the same data.
        """
        whole, unseen, learned = (
            _examples(one, network, options) for one in (data, certify, train)
        )
        if whole is None:
            raise DataError("there are no data; give some to judge quality by")
        fractions = None
        if unseen is None:
            fractions = (SEARCHED, 1 - SEARCHED)
            searched, unseen = split(whole, fractions, seed)
        else:
            searched = whole
        digests = [part.digest() for part in (searched, unseen, learned) if part is not None]
        if len(set(digests)) < len(digests):
            raise DataError(
                "two of the parts (search, certification, training) are the same data; a certificate on data "
                "that anything was tuned on proves nothing"
            )
        return Parts(shuffled(searched, seed), shuffled(unseen, seed), learned, fractions)


def shuffled(examples: Examples, seed: int) -> Examples:
    """The examples in random order: the certificate's test goes through them one by one, and a first look takes the first few."""
    generator = torch.Generator().manual_seed(seed)
    return examples.subset(torch.randperm(len(examples), generator=generator).tolist())


def _examples(spec: Any, network: Network, options: dict[str, Any]) -> Examples | None:
    if spec is None:
        return None
    if not isinstance(spec, Examples):
        spec = read(spec, network.example, tokenizer_folder=network.folder, **options)
    check(spec, network)
    return spec
