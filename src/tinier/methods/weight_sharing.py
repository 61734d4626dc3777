"""Weight sharing: the weights of each tensor take few values, so that a codebook and labels of few bits store them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.edits.base import Plan
from tinier.edits.share import Share
from tinier.errors import DataError, InputError, RefusedError
from tinier.graph.groups import named_tensors
from tinier.graph.weights import tables, weights
from tinier.methods.base import Method, covers, must_exist
from tinier.modules.masked import plain_name
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.tensors.affine import Integers, asymmetric, dequantize
from tinier.tensors.clustering import codebook, median_centred

RULES = ("kmeans", "median", "minmax")
# Share of the mean importance that every weight has at least: what a few examples do not need, others may.
FLOOR = 0.01


@dataclass(frozen=True)
class WeightSharing(Method):
    """Choose at most 2^bits values for each weight of a linear map, convolution, recurrent layer or embedding.

    Attributes:
        bits: of a label, 1 to 8; 2 or more for the rules "median" and "minmax".
        rule: "kmeans": the values of least squared error; "median": uniform steps to both sides of the median; "minmax": uniform steps from
            the least to the largest weight, 0 among them.
        exclude: patterns of names of parameters, or of modules, that are left alone.

    Source:
        Han et al. 2016, "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman Coding",
        section 3; Choi et al. 2017, "Towards the Limit of Network Quantization", section 3 (weighted by importance).

    Differs:
        The values are not trained afterwards; train first, or share again after training. Zeros of pruned weights stay exactly zero, as
        one of the values.
    """

    name: ClassVar[str] = "weight_sharing"

    bits: int = 4
    rule: str = "kmeans"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise InputError(f"rule={self.rule!r}: {', '.join(RULES)} are known")
        least = 1 if self.rule == "kmeans" else 2
        if (
            not isinstance(self.bits, int)
            or isinstance(self.bits, bool)
            or not least <= self.bits <= 8
        ):
            raise InputError(f"bits={self.bits!r}: {least} to 8 are possible for {self.rule}")

    def plan(self, network: Network, statistics: Statistics | None = None) -> Plan:
        """One codebook for each tensor; a tensor that takes so few values already is left as it is.

        Args:
            network: the network, its weights perhaps held at zero; left as it is.
            statistics: of this network, with its mean squared gradients (``observe(network, …, needs={"squares"})``): by the rule
                "kmeans" an error counts as much as they say, 1 % of their mean at least. None for all alike.

        Raises:
            RefusedError: there is no weight to share, or one is not finite; the parameter is named.
            InputError: a pattern to exclude is of nothing.

        Cost:
            That of `tinier.tensors.clustering.codebook` for each tensor.
        """
        network.need_values("share")
        traced = network.traced
        tensors = named_tensors(traced.module)
        names = self._names(network)
        if not names:
            raise RefusedError(
                f"{network.name}: no weight to share; exclude={self.exclude} leaves none"
            )
        squares = statistics.squares if statistics is not None else {}
        edits = []
        for name in names:
            values = tensors[name].detach()
            try:
                centres = self._centres(values, squares.get(name))
            except DataError as error:
                raise RefusedError(f"{name}: {error}") from error
            if not bool(torch.isin(values, centres).all()):
                edits.append(Share(name, tuple(centres.double().tolist())))
        return Plan(tuple(edits))

    def _names(self, network: Network) -> list[str]:
        """The tensors to share, a tied one once, under a name that the module knows."""
        known = [*weights(network.traced), *tables(network.traced)]
        tied: dict[int, list[str]] = {}
        for name, tensor in named_tensors(network.traced.module).items():
            tied.setdefault(id(tensor), []).append(name)
        same = {name: names for names in tied.values() for name in names}
        own = {plain_name(name) for name, _ in network.module.named_parameters(remove_duplicate=False)}  # fmt: skip
        must_exist(self.exclude, network, sorted(own))
        chosen: list[str] = []
        for name in dict.fromkeys(known):
            names = [one for one in same[name] if one in own]
            left = any(covers(self.exclude, one) for one in names)
            if names and not left and not set(names).intersection(chosen):
                tensor = named_tensors(network.traced.module)[name]
                if tensor.is_floating_point() and tensor.numel():
                    chosen.append(name if name in own else names[0])
        return chosen

    def _centres(self, values: Tensor, squares: Tensor | None) -> Tensor:
        """(k,) ascending values of the type of the weights, k ≤ 2^bits."""
        if self.rule == "kmeans":
            importance = None
            if squares is not None:
                importance = squares.to(values.device).double()
                importance = importance + FLOOR * importance.mean()
            return codebook(values, 2**self.bits, importance)[0]
        if not bool(values.isfinite().all()):
            raise DataError("weights to share must be finite")
        if self.rule == "median":
            found = median_centred(values, self.bits)
            steps = torch.arange(-(2 ** (self.bits - 1)) + 1, 2 ** (self.bits - 1))
            centres = found.median.double() + found.scale.double() * steps.double()
            if bool((values == 0).sum() * 2**self.bits >= values.numel()):
                centres[centres.abs().argmin()] = 0  # pruned weights stay zero
        else:
            integers = Integers.unsigned(self.bits)
            low, high = values.float().aminmax()
            scale, zero_point = asymmetric(low, high, integers)
            every = torch.arange(integers.low, integers.high + 1)
            centres = dequantize(every, scale, zero_point)
        return torch.unique(centres.to(values.dtype) + 0.0)
