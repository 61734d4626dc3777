"""SmoothQuant: outlier channels of activations are made smaller, and the weights that read them larger."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tinier.edits.assign import Assign
from tinier.edits.base import Plan, Values
from tinier.edits.pairs import as_matrix, from_matrix
from tinier.errors import InputError
from tinier.graph.fold import fold, read
from tinier.graph.layers import Layer
from tinier.graph.placement import place
from tinier.graph.rescale import Site, sites
from tinier.graph.walk import Walk
from tinier.methods.base import Method
from tinier.methods.sampled import samples_of
from tinier.methods.weight_integers import Scheme
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.tensors.affine import Integers, asymmetric, fake_quantize
from tinier.tensors.grid import choose
from tinier.tensors.histogram import Histogram
from tinier.tensors.ranges import activation_range

MOST = 64  # examples
ROWS = 2048  # rows of a linear layer's input, from each half of the examples
IMAGES = 8  # examples of a convolution's input, from each half
ALPHAS = (0.2, 0.35, 0.5, 0.65, 0.8)


@dataclass(frozen=True)
class SmoothQuant(Method):
    """Divide each channel that layers read by s, and multiply their weights with it, with the best α for each place, or not at all.

        s_j = max |X_j|^α / max |W_j|^(1 − α)

    What comes before takes up 1/s: the weight and bias of a norm, a product with a parameter, or a linear layer or convolution. Layers that
    read the same (query, key and value; the two halves of a gated FFN) share s. The network computes the same to rounding.

    Attributes:
        bits: of weights.
        activations: bits of activations.
        ranges: of activations, "minmax" or "mse".
        weight_ranges: "minmax", "percentile" or "mse"; None for what ``ranges`` is.
        per_tensor: one scale for all channels of a weight.
        symmetric_activations: zero points of activations are 0.
        alphas: strengths that are tried, each in (0, 1).
        least_gain: part of a place's squared error that must go away, else it is left as it is.
        exclude: weights that stay float: places that only such layers read are left as they are.

    Source:
        Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", equation 4.

    Differs:
        α is chosen for each place by the error of the quantized layers' outputs on half of the examples, and must win on the other half.
        Values of attention, gated FFNs and chains of convolutions are smoothed, too, where the scale can move exactly.
    """

    name: ClassVar[str] = "smooth_quant"

    bits: int = 8
    activations: int = 8
    ranges: str = "mse"
    weight_ranges: str | None = None
    per_tensor: bool = False
    symmetric_activations: bool = False
    alphas: tuple[float, ...] = ALPHAS
    least_gain: float = 0.15
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.alphas or not all(0 < alpha < 1 for alpha in self.alphas):
            raise InputError(f"alphas={self.alphas}: numbers between 0 and 1 are needed")

    def plan(self, network: Network, statistics: Statistics | None = None) -> Plan:
        """Find the factors.

        Args:
            network: a float network, folded or not; left as it is.
            statistics: with ``samples`` of inputs.

        Returns:
            `Assign` edits; none where nothing gains.

        Raises:
            InputError: samples are missing.

        Cost:
            A run of the network; for each place and α the quantized layers on 2 · 2048 rows or 2 · 8 images.
        """
        return self.decide(network, statistics)[0]

    def decide(
        self, network: Network, statistics: Statistics | None = None
    ) -> tuple[Plan, tuple[str, ...]]:
        """As ``plan``, and which layers cannot be smoothed because nothing before them can take up the scale."""
        data = samples_of(network, statistics, MOST, "smoothing")
        module = fold(network.traced.module)
        placement = place(module, lambda name: name in self.exclude)
        quantized = {user for _, users in placement.weights.values() for user in users}
        found = [s for s in sites(module) if any(r.layer.node.name in quantized for r in s.readers)]
        names = {n for s in found for n in (*s.parameters, *(r.layer.weight for r in s.readers))}
        old = {str(name): _value(module, str(name)) for name in sorted(names)}
        tensors = dict(old)
        alphas: dict[str, float] = {}
        for site, seen in _walked(module, data, found):
            trial = _Trial(self, site, tensors, seen)
            alpha = trial.best()
            if alpha:
                alphas[site.name] = alpha
                site.rescale(tensors, trial.factors(alpha))
        reason = {
            n: f"smoothed, α = {alphas[s.name]:g}"
            for s in found
            if s.name in alphas
            for n in _names(s)
        }
        edits = [
            Assign(name, Values(value.float().contiguous()), reason=reason[name])
            for name, value in tensors.items()
            if value is not old[name]
        ]
        reached = {r.layer.node.name for s in found for r in s.readers}
        rest = [name for name, (_, users) in placement.weights.items() if not reached & set(users)]
        notes: tuple[str, ...] = ()
        if rest:
            notes = (
                f"nothing takes up a scale before {', '.join(rest[:5])}{_more(rest)}: not smoothed",
            )
        return Plan(tuple(edits)), notes


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 5} others" if len(names) > 5 else ""


def _names(site: Site) -> tuple[str, ...]:
    return (*site.parameters, *(reader.layer.weight for reader in site.readers))


def _value(module: fx.GraphModule, name: str) -> Tensor:
    value = read(module, name)
    assert value is not None
    return value.detach()


Seen = dict[fx.Node, tuple[Tensor, Tensor]]  # what readers read → both halves of the examples


def _walked(module: fx.GraphModule, data: Sequence[Sequence[Tensor]], found: Sequence[Site]) -> Any:
    """Each site with what its readers read, when all of it is known."""
    waiting = {site: {reader.layer.source for reader in site.readers} for site in found}
    wanted = {node for sources in waiting.values() for node in sources}
    kept: Seen = {}
    flat = {r.layer.source: r.layer.kind in ("linear", "matmul") for s in found for r in s.readers}
    walk = Walk(module, data)
    while walk.next() is not None:
        node = walk.step()
        if node not in wanted:
            continue
        kept[node] = _halves([values[node] for values in walk.values], flat[node])
        for site in [s for s, sources in waiting.items() if sources <= kept.keys()]:
            yield site, {source: kept[source] for source in waiting.pop(site)}
        left = {source for sources in waiting.values() for source in sources}
        kept = {source: value for source, value in kept.items() if source in left}


def _halves(values: Sequence[Tensor], flat: bool) -> tuple[Tensor, Tensor]:
    """Every other example; rows of a linear layer's input, images of a convolution's."""
    result = []
    for half in (0, 1):
        parts = [value[half::2] if len(value) > 1 else value for value in values]
        if flat:
            rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
            result.append(rows[:: -(-len(rows) // ROWS)].clone())
        else:
            whole = torch.cat(parts)
            result.append(whole[:: -(-len(whole) // IMAGES)].clone())
    return result[0], result[1]


class _Trial:
    """One site: its factors for each α, and the error that they leave."""

    def __init__(
        self, method: SmoothQuant, site: Site, tensors: Mapping[str, Tensor], seen: Seen
    ) -> None:
        self.method, self.site, self.tensors, self.seen = method, site, tensors, seen
        self.largest = torch.zeros(site.size)
        for reader in site.readers:
            for x in seen[reader.layer.source]:
                each = _channels(x, reader.layer).abs().amax(1)
                self.largest.scatter_reduce_(0, reader.channels, each, "amax")
        self.weights = site.read(tensors)

    def factors(self, alpha: float) -> Tensor:
        """(size,) s."""
        alive = (self.largest > 0) & (self.weights > 0)
        factors = self.largest.pow(alpha) / self.weights.pow(1 - alpha)
        factors = torch.where(alive, factors, 1.0)
        # One factor for all channels changes nothing: the middle one is 1, so that weights keep their size.
        middle = factors[alive].log().mean().exp() if bool(alive.any()) else torch.tensor(1.0)
        factors = torch.where(alive, (factors / middle).clamp(1e-4, 1e4), 1.0)
        return self.site.allowed(self.tensors, factors)

    def best(self) -> float | None:
        """The α with the least error on the first half, if it wins on the second, too."""
        plain = torch.ones(self.site.size)
        before = self.error(plain, 0)
        errors = {alpha: self.error(self.factors(alpha), 0) for alpha in self.method.alphas}
        alpha = min(errors, key=errors.__getitem__)
        most = 1 - self.method.least_gain
        if not errors[alpha] <= most * before:
            return None
        wins = self.error(self.factors(alpha), 1) <= most * self.error(plain, 1)
        return alpha if wins else None

    def error(self, factors: Tensor, half: int) -> float:
        """Σ over the readers of ‖y − ŷ‖² / ‖y‖²."""
        total = 0.0
        inputs: dict[fx.Node, Tensor] = {}
        for reader in self.site.readers:
            layer, weight = reader.layer, self.tensors[reader.layer.weight]
            x = self.seen[layer.source][half]
            if layer.source not in inputs:
                smooth = x / _along(factors[reader.channels], x, layer)
                inputs[layer.source] = self._rounded(smooth)
            rounded = self._weight(reader.multiplied(weight, factors), layer)
            y, z = _run(layer, x, weight), _run(layer, inputs[layer.source], rounded)
            power = float(y.square().sum())
            total += float((y - z).square().sum()) / power if power else 0.0
        return total

    def _rounded(self, x: Tensor) -> Tensor:
        signs, bits = self.method.symmetric_activations, self.method.activations
        integers = Integers.unsigned(bits)
        if signs:
            integers = Integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        histogram = Histogram()
        histogram.add(x)
        low, high = activation_range(histogram, integers, self.method.ranges, symmetric=signs)
        scale, zero_point = asymmetric(torch.tensor(low), torch.tensor(high), integers)
        return fake_quantize(x, scale, zero_point, integers)

    def _weight(self, weight: Tensor, layer: Layer) -> Tensor:
        axis = {"matmul": 1, "transposed": 1}.get(layer.kind, 0)
        matrix = as_matrix(weight, axis)
        rule = self.method.weight_ranges or self.method.ranges
        grid = choose(
            matrix, Scheme(self.method.bits).integers, rule=rule, per_tensor=self.method.per_tensor
        )
        return from_matrix(grid.nearest(matrix), weight, axis)


def _channels(x: Tensor, layer: Layer) -> Tensor:
    """(inputs, values)."""
    return x.movedim(1 if layer.kind in ("convolution", "transposed") else -1, 0).flatten(1)


def _along(values: Tensor, x: Tensor, layer: Layer) -> Tensor:
    if layer.kind in ("convolution", "transposed"):
        return values.reshape(-1, *[1] * (x.ndim - 2))
    return values


def _run(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """The layer without its bias."""
    if layer.kind in ("linear", "matmul"):
        return x @ layer.matrix(weight)[0].mT
    args: list[Any] = list(layer.node.args)
    args[:2] = [x, weight]
    if len(args) > 2:
        args[2] = None
    assert callable(layer.node.target)
    result: Tensor = layer.node.target(*args, **layer.node.kwargs)
    return result
