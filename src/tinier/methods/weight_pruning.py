"""Weight pruning: single weights, n of m, or blocks become zero and stay zero; the shapes stay."""

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor

from tinier.criteria.base import Criterion
from tinier.criteria.magnitude import Magnitude
from tinier.edits.base import Plan
from tinier.edits.mask import Mask
from tinier.errors import InputError, RefusedError
from tinier.graph.groups import named_tensors
from tinier.graph.weights import Weight, weights
from tinier.methods.base import Method, covers, must_exist
from tinier.modules.masked import masks_of, plain_name
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.tensors.masks import (
    blocks,
    largest,
    largest_of_all,
    largest_of_rows,
    n_of_m,
    of_blocks,
)
from tinier.units import is_number

RANKINGS = ("local", "global", "kind", "row")
SMALL = (2, 4, 8, 16)  # neighbourhoods that a refusal offers


@dataclass(frozen=True)
class WeightPruning(Method):
    """Rank the weights and hold the lowest at zero.

    Attributes:
        keep: share of the weights that stays, in (0, 1]; with n of m it follows from the pattern.
        pattern: "unstructured"; "n:m", as "2:4": n of each m neighbours along the input dimension stay; "r x c", as "4x1": blocks of r
            outputs and c inputs stay or leave whole, by their mean score.
        threshold: instead of ``keep``: weights (or blocks) with a lower score leave.
        ranking: within what the weights compete: "local" (a parameter), "global" (all), "kind" (all linear, all convolutions), or
            "row" (an output, as in Wanda; unstructured only).
        criterion: scores the weights.
        min_keep: the smallest share of a parameter that stays, so that no layer is cut through.
        include: patterns of names, as "*.attention.*"; empty for all weights of linear layers and convolutions. Biases, norms,
            embeddings and recurrent weights are pruned only where a pattern without wildcard names them.
        exclude: patterns of names of parameters, or of modules, that are left alone.

    Source:
        Han et al. 2015, "Learning both weights and connections for efficient neural networks"; Mishra et al. 2021, "Accelerating sparse
        deep neural networks" (n of m); Gray et al. 2017, "GPU kernels for block-sparse weights" (blocks).
    """

    name: ClassVar[str] = "weight_pruning"

    keep: float = 0.5
    pattern: str = "unstructured"
    threshold: float | None = None
    ranking: str = "local"
    criterion: Criterion = field(default_factory=Magnitude)
    min_keep: float = 0.01
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not is_number(self.keep) or not 0 < self.keep <= 1:
            raise InputError(
                f"keep={self.keep!r}: a share in (0, 1] is needed, 0.5 for half the weights"
            )
        if not is_number(self.min_keep) or not 0 <= self.min_keep <= 1:
            raise InputError(f"min_keep={self.min_keep!r}: a share in [0, 1] is needed")
        if self.threshold is not None and not is_number(self.threshold):
            raise InputError(f"threshold={self.threshold!r}: a number is needed")
        if self.ranking not in RANKINGS:
            raise InputError(f"ranking={self.ranking!r}: {', '.join(RANKINGS)} are known")
        shape = self._shape()
        if self._n_of_m() and self.threshold is not None:
            raise InputError(f"pattern={self.pattern!r} needs no threshold: it says what stays")
        if self.ranking == "row" and (shape != (1, 1) or self.threshold is not None):
            raise InputError("ranking='row' is for unstructured pruning by keep rate")

    def plan(self, network: Network, statistics: Statistics | None = None) -> Plan:
        """One mask for each parameter that loses weights.

        Raises:
            RefusedError: nothing can be masked, m does not divide any input dimension or that of a parameter that ``include`` names in
                full, or a score is not finite; the layer is named.

        Cost:
            The criterion's, and one sort of all weights.
        """
        chosen = self._fitting(network, self._chosen(network))
        if not chosen:
            raise RefusedError(
                f"{network.name}: no weight to prune; include={self.include} and exclude={self.exclude} leave none"
            )
        if self.keep == 1 and self.threshold is None and not self._n_of_m():
            return Plan()
        scores = self._scores(network, chosen, statistics)
        edits = []
        for name, mask in self._masks(chosen, scores).items():
            if not mask.all():
                edits.append(Mask.of(name, mask.cpu()))
        return Plan(tuple(edits))

    def _chosen(self, network: Network) -> list[Weight]:
        known = weights(network.traced)
        tied = _tied(network)
        must_exist(self.exclude, network, list(_all_names(network)))
        chosen: list[Weight] = []
        seen: set[str] = set()
        for name, tensor in named_tensors(network.traced.module).items():
            if name in seen:
                continue
            names = tied.get(name, {name})
            seen |= names
            weight = next((w for n, w in known.items() if n in names), None)
            plain = weight is not None and weight.kind != "recurrent" and not weight.shared
            if any(covers(self.exclude, name) for name in names):
                continue
            if names.intersection(self.include) or (
                plain and (not self.include or _matches(names, self.include))
            ):
                chosen.append(weight or Weight(name, "other", min(1, tensor.ndim - 1), 0, False))
        missing = [name for name in self.include if not _wild(name) and name not in seen]
        if missing:
            raise InputError(f"{network.name} has no parameter {', '.join(missing)}")
        return chosen

    def left_whole(self, network: Network) -> tuple[str, ...]:
        """What n of m passes over because m does not divide its inputs, a sentence for each parameter; as the first layer of a CNN."""
        misfits = self._misfits(network, self._chosen(network))
        return tuple(
            f"{name} keeps all its weights: {why.partition(';')[0]}"
            for name, why in misfits.items()
        )

    def _fitting(self, network: Network, chosen: list[Weight]) -> list[Weight]:
        misfits = self._misfits(network, chosen)
        wrong = [name for name in misfits if name in self.include]
        if misfits and len(misfits) == len(chosen):
            wrong = list(misfits)
        if wrong:
            more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise RefusedError("; ".join(f"{name}: {misfits[name]}" for name in wrong[:4]) + more)
        return [weight for weight in chosen if weight.name not in misfits]

    def _misfits(self, network: Network, chosen: list[Weight]) -> dict[str, str]:
        """Parameter that n of m does not fit → why, and what would."""
        n, m = self._n_of_m() or (1, 1)
        tensors, result = named_tensors(network.traced.module), {}
        for weight in chosen:
            width = tensors[weight.name].shape[weight.inputs] if m > 1 else m
            if width % m:
                fits = [f"{max(1, n * s // m)}:{s}" for s in SMALL if width % s == 0]
                offer = f"use {' or '.join(fits)}, or exclude it" if fits else "exclude it"
                result[weight.name] = f"{m} does not divide {width} inputs; {offer}"
        return result

    def _scores(
        self, network: Network, chosen: list[Weight], statistics: Statistics | None
    ) -> dict[str, Tensor]:
        names = [weight.name for weight in chosen]
        scores = self.criterion.weights(network, names, statistics)
        held = masks_of(network.module)
        for name, score in scores.items():
            if not bool(score.isfinite().all()):
                raise RefusedError(f"{name}: {self.criterion} gives scores that are not finite")
            if name in held:  # what is held at zero already is the first to go
                low = score.min() - 1
                scores[name] = torch.where(held[name].to(score.device), score, low)
        return scores

    def _masks(self, chosen: list[Weight], scores: dict[str, Tensor]) -> dict[str, Tensor]:
        if (pattern := self._n_of_m()) is not None:
            n, m = pattern
            return {w.name: n_of_m(scores[w.name], n, m, w.inputs) for w in chosen}
        if self.ranking == "row":
            return {
                w.name: largest_of_rows(scores[w.name].movedim(w.outputs, 0), self.keep)
                .movedim(0, w.outputs)
                .contiguous()
                for w in chosen
            }
        rows, columns = self._shape()
        # Outputs first, then inputs: blocks are of these two, whatever their order in the parameter.
        turned = {w.name: _turn(scores[w.name], w) for w in chosen}
        if (rows, columns) == (1, 1):
            masks = self._rank(chosen, turned)
        else:
            means = {name: blocks(score, rows, columns) for name, score in turned.items()}
            masks = {
                name: of_blocks(mask, rows, columns, turned[name].shape)
                for name, mask in self._rank(chosen, means).items()
            }
        return {w.name: _turn(masks[w.name], w, back=True).contiguous() for w in chosen}

    def _rank(self, chosen: list[Weight], scores: dict[str, Tensor]) -> dict[str, Tensor]:
        least = {name: _share(score, self.min_keep) for name, score in scores.items()}
        if self.threshold is not None:
            limit = self.threshold
            return {
                name: (score >= limit) | largest(score, least[name])
                for name, score in scores.items()
            }
        groups: dict[str, list[str]] = {}
        for weight in chosen:
            key = {"local": weight.name, "kind": weight.kind}.get(self.ranking, "")
            groups.setdefault(key, []).append(weight.name)
        masks: dict[str, Tensor] = {}
        for names in groups.values():
            count = round(self.keep * sum(scores[name].numel() for name in names))
            found = largest_of_all(
                [scores[name] for name in names], count, [least[name] for name in names]
            )
            masks |= dict(zip(names, found, strict=True))
        return masks

    def _n_of_m(self) -> tuple[int, int] | None:
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if found is None:
            return None
        n, m = int(found[1]), int(found[2])
        if not 1 <= n <= m:
            raise InputError(f"pattern={self.pattern!r}: n of m needs 1 ≤ n ≤ m, as '2:4'")
        return n, m

    def _shape(self) -> tuple[int, int]:
        """Rows and columns of a block; 1 × 1 without blocks."""
        if self.pattern == "unstructured" or self._n_of_m():
            return 1, 1
        found = re.fullmatch(r"(\d+) ?x ?(\d+)", self.pattern)
        if found is None or not int(found[1]) or not int(found[2]):
            raise InputError(
                f"pattern={self.pattern!r}: 'unstructured', 'n:m' as '2:4', or blocks as '4x1' are possible"
            )
        return int(found[1]), int(found[2])


def _turn(tensor: Tensor, weight: Weight, back: bool = False) -> Tensor:
    """Outputs as dimension 0 and inputs as dimension 1."""
    if tensor.ndim < 2:
        return tensor
    given, wanted = (weight.outputs, weight.inputs), (0, 1)
    return tensor.movedim(wanted, given) if back else tensor.movedim(given, wanted)


def _share(scores: Tensor, share: float) -> int:
    return min(scores.numel(), max(1, round(share * scores.numel()))) if share else 0


def _tied(network: Network) -> dict[str, set[str]]:
    """Parameter → every name that it has in the module: the graph may know a tied one under a single name."""
    names: dict[int, set[str]] = {}
    for name, parameter in _all_names(network).items():
        names.setdefault(id(parameter), set()).add(name)
    return {name: same for same in names.values() for name in same}


def _all_names(network: Network) -> dict[str, Tensor]:
    named = network.module.named_parameters(remove_duplicate=False)
    return {plain_name(name): parameter for name, parameter in named}


def _matches(names: set[str], patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _wild(pattern: str) -> bool:
    return any(sign in pattern for sign in "*?[")
