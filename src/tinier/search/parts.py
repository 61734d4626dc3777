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
        notes: what was left out.
    """

    searched: Examples
    unseen: Examples
    train: Examples | None
    fractions: tuple[float, float] | None
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(
        network: Network, data: Any, train: Any, certify: Any, seed: int, options: dict[str, Any]
    ) -> "Parts":
        """Read, check and split the data; each part is in random order.

        Raises:
            DataError: the data cannot be read, do not fit the network, or most of one part is in another.
        """
        whole, unseen, learned = (
            _examples(one, network, options) for one in (data, certify, train)
        )
        if whole is None:
            raise DataError("there are no data; give some to judge quality by")
        if unseen is not None and unseen.labelled != whole.labelled:
            raise DataError(
                "the search and the certification data must both have labels, or neither"
            )
        fractions = None
        if unseen is None:
            fractions = (SEARCHED, 1 - SEARCHED)
            searched, unseen = split(whole, fractions, seed)
        else:
            searched = whole
        if searched.classes and unseen.classes and searched.classes != unseen.classes:
            raise DataError(
                f"the data have the classes {', '.join(searched.classes[:5])}, …, those for the certificate "
                f"{', '.join(unseen.classes[:5])}, …; labels would be numbered differently: give numbers as labels"
            )
        notes: list[str] = []
        seen = set(unseen.fingerprints())
        if fractions is None:
            searched = _without(searched, seen, "data", notes)
        if learned is not None:
            seen |= set(searched.fingerprints())
            # The beginning of the training data calibrates, and may be of one class.
            learned = shuffled(_without(learned, seen, "training data", notes), seed)
        parts = shuffled(searched, seed), shuffled(unseen, seed), learned
        return Parts(*parts, fractions, tuple(notes))


def _without(examples: Examples, seen: set[bytes], name: str, notes: list[str]) -> Examples:
    """The examples whose inputs are not among those that were seen.

    A few may be twice in a collection; if most are, somebody has handed in the same data twice.
    """
    kept = [index for index, mark in enumerate(examples.fingerprints()) if mark not in seen]
    left_out = len(examples) - len(kept)
    if 2 * left_out > len(examples):
        raise DataError(
            f"{left_out:,} of {len(examples):,} examples of the {name} are among those that judge; a certificate on data "
            "that anything was tuned on proves nothing: hand in data that are not in it"
        )
    if not left_out:
        return examples
    notes.append(
        f"{left_out:,} examples of the {name} were left out: they are among those that judge"
    )
    return examples.subset(kept)


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
