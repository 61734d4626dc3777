"""Low rank: layers whose weights are nearly products of smaller ones become those."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, fx

from tinier.edits.base import Plan, Values
from tinier.edits.factorize import LAYERS, OPERATORS, Factorize
from tinier.errors import InputError, RefusedError
from tinier.graph.fold import parameter_of, read
from tinier.graph.macs import macs
from tinier.methods.base import Method, covers, must_exist
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.tensors.low_rank import decomposed, factors, rank_of_energy, tucker2, whitener
from tinier.units import is_number

COSTS = ("macs", "parameters")
FORMS = ("auto", "svd", "tucker")
TRIES = 40  # halvings of the interval in which the energy is sought


@dataclass(frozen=True)
class Factorization(Method):
    """Choose ranks of linear layers and convolutions.

    A layer's ranks keep a share of the energy, the squared singular values of W·L, L·Lᵀ being the second moments of its inputs: a share of
    the squared outputs. It is the same for all layers, so that none is spoilt; where factors would cost as much as the layer, it stays.

    Attributes:
        energy: share in (0, 1] that each layer keeps; None to find the largest with ``keep``.
        keep: share in (0, 1) of the cost that is left.
        of: "macs" or "parameters".
        form: of convolutions wider than 1: "svd", a convolution to r channels and one of 1 × 1; "tucker", 1 × 1, a convolution between few
            channels, and 1 × 1; "auto", of each layer that with the smaller error where both cost the same.
        exclude: patterns of modules or parameters that stay.

    Source:
        Zhang et al. 2016, "Accelerating very deep convolutional networks", section 3.1 (svd); Kim et al. 2016 (tucker); Wang et al. 2024,
        "SVD-LLM" (inputs).

    Differs:
        Tucker's factors are those of the kernel alone; inputs weigh in the choice between the forms.
    """

    name: ClassVar[str] = "factorization"

    energy: float | None = None
    keep: float | None = None
    of: str = "macs"
    form: str = "auto"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.energy is None) == (self.keep is None):
            raise InputError(
                "factorize: give keep, the share of the cost that is left, or energy; one of them"
            )
        if self.energy is not None and not (is_number(self.energy) and 0 < self.energy <= 1):
            raise InputError(f"energy={self.energy!r}: a share in (0, 1] is needed")
        if self.keep is not None and not (is_number(self.keep) and 0 < self.keep < 1):
            raise InputError(f"keep={self.keep!r}: a share between 0 and 1 is needed")
        if self.of not in COSTS:
            raise InputError(f"of={self.of!r}: {' or '.join(COSTS)} is possible")
        if self.form not in FORMS:
            raise InputError(f"form={self.form!r}: {', '.join(FORMS)} are known")

    def plan(self, network: Network, statistics: Statistics | None = None) -> Plan:
        """Ranks and factors.

        Args:
            network: left as it is.
            statistics: of this network with the Gram matrices of its layers' inputs (``observe(network, …, needs={"gram"})``); None for all
                directions alike.

        Raises:
            RefusedError: no layer can be factorized, ``keep`` cannot be reached, or a weight is not finite.
            InputError: a pattern to exclude is of nothing.

        Cost:
            A singular value decomposition of each layer's weight and, with data, of its moments.
        """
        network.need_values("factorize")
        found, total = self._layers(network, statistics)
        if not found:
            raise RefusedError(
                f"{network.name}: no linear layer or convolution that could be factorized"
            )
        energy = self.energy
        if energy is None:
            assert self.keep is not None
            energy = _energy(found, total, self.keep * total)
            if energy is None:
                least = total - sum(max(one.cost - one.cost_at(1), 0) for one in found)
                raise RefusedError(
                    f"keep={self.keep}: with all ranks 1 there are {least / total:.1%} of the {self.of} left; ask for more"
                )
        edits = []
        for layer in found:
            rank = layer.rank(energy)
            if layer.cost_at(rank) < layer.cost:
                made = layer.factors(rank, self.form)
                edits.append(Factorize(layer.name, tuple(Values(f) for f in made)))
        return Plan(tuple(edits))

    def _layers(
        self, network: Network, statistics: Statistics | None
    ) -> tuple[list["_Layer"], float]:
        """The layers with weights of their own, and the cost of the whole network."""
        traced = network.traced
        module, counts = traced.module, macs(traced)
        nodes = [n for n in module.graph.nodes if n.op == "call_function"]
        reads: dict[int, int] = {}
        for node in nodes:
            for source in node.all_input_nodes:
                if (tensor := read(module, str(source.target))) is not None:
                    reads[id(tensor)] = reads.get(id(tensor), 0) + 1
        own = [*dict.fromkeys(name for name, _ in network.module.named_parameters())]
        must_exist(self.exclude, network, own)
        parts = dict(network.module.named_modules())
        found = []
        for node in nodes:
            name = parameter_of(node.args[1]) if node.target in OPERATORS else None
            weight = None if name is None else read(module, name)
            if name is None or weight is None or reads[id(weight)] > 1 or name not in own:
                continue
            layer = parts.get(name.rpartition(".")[0])
            of_class = isinstance(network.module, fx.GraphModule) or type(layer) in LAYERS
            groups = node.args[6] if len(node.args) > 6 else 1
            padded = getattr(layer, "padding_mode", "zeros") != "zeros"
            if not of_class or groups != 1 or padded or covers(self.exclude, name):
                continue
            if not bool(weight.isfinite().all()):
                raise RefusedError(f"factorize: {name} has values that are not finite")
            gram = None if statistics is None else statistics.grams.get(node.name)
            matrix = weight.detach().flatten(1)
            root = whitener(
                None if gram is None else gram.products[0] / max(gram.rows, 1), matrix.shape[1]
            )
            places = counts[node.name] / weight.numel() if self.of == "macs" else 1.0
            source = node.args[0]
            assert isinstance(source, fx.Node)
            before = prod(source.meta["val"].shape[2:]) if weight.ndim > 2 else 1
            after = prod(node.meta["val"].shape[2:]) if weight.ndim > 2 else 1
            wider = before / max(after, 1) if self.of == "macs" else 1.0
            parts_of = decomposed(matrix, root)
            found.append(_Layer(name, weight.detach(), root, parts_of, float(places), float(wider)))
        total = (
            float(sum(counts.values()))
            if self.of == "macs"
            else float(sum(p.numel() for p in network.module.parameters()))
        )
        return found, total


@dataclass(frozen=True)
class _Layer:
    """A layer that may be factorized.

    Attributes:
        name: of its weight.
        weight: (m, n, *kernel).
        root: (n·kernel, n·kernel) of its inputs.
        parts: its singular value decomposition.
        places: how often the weight is used in a run.
        wider: places of its input for each of its output.
    """

    name: str
    weight: Tensor
    root: Tensor
    parts: tuple[Tensor, Tensor, Tensor]
    places: float
    wider: float

    @property
    def cost(self) -> float:
        return self.places * self.weight.numel()

    def rank(self, energy: float) -> int:
        return rank_of_energy(self.parts[1], energy)

    def cost_at(self, rank: int) -> float:
        """Of a convolution to ``rank`` channels and one of 1 × 1."""
        return self.places * rank * (len(self.weight) + self.weight[0].numel())

    def factors(self, rank: int, form: str) -> tuple[Tensor, ...]:
        """Weights of the layers in place of this one, in the order in which they run."""
        m, n, *kernel = self.weight.shape
        last, first = factors(self.parts, self.root, rank)
        plain = (first.reshape(rank, n, *kernel), last.reshape(m, rank, *[1] * len(kernel)))
        made = tuple(factor.to(self.weight.dtype).contiguous() for factor in plain)
        if prod(kernel) == 1 or form == "svd":
            return made
        other = self._tucker(self.cost_at(rank))
        if other is None or (form == "auto" and self._error(other) >= self._error(made)):
            return made
        return other

    def _tucker(self, most: float) -> tuple[Tensor, ...] | None:
        """Tucker-2 of no greater cost, ranks in the proportion of the channels; None where there is none."""
        m, n, *kernel = self.weight.shape
        best = None
        for step in range(1, 65):
            r1, r2 = max(1, round(m * step / 64)), max(1, round(n * step / 64))
            inner = r1 * r2 * prod(kernel) + r1 * m
            if self.places * (self.wider * r2 * n + inner) <= most:
                best = r1, r2
        if best is None:
            return None
        left, core, right = tucker2(self.weight, *best)
        ones = [1] * len(kernel)
        found = (right.T.reshape(best[1], n, *ones), core, left.reshape(m, best[0], *ones))
        return tuple(factor.to(self.weight.dtype).contiguous() for factor in found)

    def _error(self, made: tuple[Tensor, ...]) -> float:
        product = Factorize("", tuple(Values(f) for f in made)).product
        gap = (self.weight.double() - product.double()).flatten(1) @ self.root
        return float(torch.linalg.norm(gap))


def _energy(found: list[_Layer], total: float, most: float) -> float | None:
    """The largest energy of which the whole costs no more; None where there is none."""

    def cost(energy: float) -> float:
        saved = (layer.cost - layer.cost_at(layer.rank(energy)) for layer in found)
        return total - sum(max(one, 0.0) for one in saved)

    low, high = 0.0, 1.0
    if cost(low) > most:
        return None
    for _ in range(TRIES):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= most else (low, middle)
    return low
