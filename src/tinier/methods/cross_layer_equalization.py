"""Cross-layer equalization: neighbouring layers get weights of equal ranges, so that one scale fits all of their channels."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from tinier.edits.assign import Assign
from tinier.edits.base import Plan, Values
from tinier.errors import InputError
from tinier.graph.fold import fold, read
from tinier.graph.layers import Layer
from tinier.graph.rescale import Reader, Site, sites
from tinier.methods.base import Method
from tinier.network import Network
from tinier.statistics import Statistics

MOST = 100  # rounds over all pairs
DONE = 1e-3  # largest change of a factor in the last one


@dataclass(frozen=True)
class CrossLayerEqualization(Method):
    """Divide the output channels of a layer by s and multiply the inputs of the layers behind it with s, so that the ranges are equal.

        s_c = √(r¹_c / r²_c),    r¹_c = max |W¹_c|,    r²_c = max |W²_{:, c}|

    for each channel c between a linear layer or convolution and those that read it, again and again until no factor changes by more than
    0.1 %. The network computes the same to rounding.

    Attributes:
        absorb: move the part of each bias that a ReLU never cuts, max(0, E z − 3 σ(z)) of the layer's result z, to the layer behind it,
            which makes ranges of activations smaller. Exact only where z stays above it.

    Source:
        Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", sections 4.1 and 4.1.3.

    Differs:
        Layers with several readers, attention's values, and pooling between them count, too. ReLU6 and other clamps are not replaced:
        only channels that provably never reach the bounds are rescaled. Biases are absorbed by what data show, not by batch norms, and only
        by layers that do not pad, and not from layers that read the network's inputs.
    """

    name: ClassVar[str] = "cross_layer_equalization"

    absorb: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """What of ``statistics.observe`` it needs."""
        return frozenset({"gram"} if self.absorb else ())

    def plan(self, network: Network, statistics: Statistics | None = None) -> Plan:
        """Find the factors.

        Args:
            network: a float network, folded or not; left as it is.
            statistics: of the folded network, with "gram", to absorb biases.

        Returns:
            `Assign` edits; none where no pair can be equalized.

        Raises:
            InputError: biases are to be absorbed, and statistics are missing.

        Cost:
            At most 100 passes over the weights of layers in pairs.
        """
        if self.absorb and (statistics is None or "gram" not in statistics.needs):
            raise InputError(
                'absorbing biases needs data: statistics=observe(folded, batches, {"gram"})'
            )
        module = fold(network.traced.module)
        pairs = [site for site in sites(module) if site.layer is not None]
        names = {name for site in pairs for name in site.parameters}
        for site in pairs:
            names |= {reader.layer.weight for reader in site.readers}
            names |= {reader.layer.bias for reader in site.readers if reader.layer.bias}
        old = {name: _value(module, name) for name in sorted(names)}
        new = {name: value.double() for name, value in old.items()}
        moved = _equalize(pairs, new)
        edits = [
            Assign(name, Values(value.float().contiguous()), reason="ranges of channels made equal")
            for name, value in new.items()
            if not torch.equal(value.float(), old[name])
        ]
        if self.absorb and statistics is not None:
            edits = _absorbed(moved, new, old, statistics, edits)
        return Plan(tuple(edits))


def _value(module: fx.GraphModule, name: str) -> Tensor:
    value = read(module, name)
    assert value is not None
    return value.detach()


def _equalize(pairs: list[Site], tensors: dict[str, Tensor]) -> dict[Site, Tensor]:
    """By what each pair's channels were divided in all, (size,) float64."""
    moved = {site: torch.ones(site.size, dtype=torch.float64) for site in pairs}
    for _ in range(MOST):
        most = 0.0
        for site in pairs:
            made, used = site.made(tensors), site.read(tensors)
            alive = (made > 0) & (used > 0)
            factors = torch.where(alive, (made / used).sqrt(), 1.0)
            factors = site.allowed(tensors, factors)
            site.rescale(tensors, factors)
            moved[site] *= factors
            most = max(most, float(factors.log().abs().max()))
        if most < DONE:
            break
    return moved


def _absorbed(
    moved: dict[Site, Tensor],
    tensors: dict[str, Tensor],
    old: dict[str, Tensor],
    statistics: Statistics,
    edits: list[Assign],
) -> list[Assign]:
    """The edits with biases moved on. The statistics are of the network before equalization."""
    changed = {edit.tensor: edit for edit in edits}
    for site, factors in moved.items():
        layer = site.layer
        if layer is None or layer.bias is None or not site.plain or site.clamp is not None:
            continue
        if any(sum(map(sum, reader.layer.padding)) for reader in site.readers):
            continue  # the zeros around an image would have to become other numbers
        gram = statistics.grams.get(layer.node.name)
        if gram is None or any(
            r.layer.bias is None and not _can_have(r.layer) for r in site.readers
        ):
            continue
        before = layer.matrix(old[layer.weight].double())  # (g, m, n)
        mean = gram.total / gram.rows
        covariance = gram.products / gram.rows - mean[..., :, None] * mean[..., None, :]
        z = ((before @ mean[..., None])[..., 0].flatten() + old[layer.bias].double()) / factors
        spread = ((before @ covariance) * before).sum(2).flatten().clamp_min(0).sqrt() / factors
        part = (z - 3 * spread).clamp_min(0)
        if not bool((part > 0).any()):
            continue
        reason = "bias moved to the layer behind"
        tensors[layer.bias] = tensors[layer.bias] - part
        changed[layer.bias] = Assign(layer.bias, Values(tensors[layer.bias].float()), reason=reason)
        for reader in site.readers:
            edit = _taken_up(reader, tensors, part)
            tensors[edit.tensor] = edit.values.tensor.double()
            changed[edit.tensor] = edit
    return list(changed.values())


def _can_have(layer: Layer) -> bool:
    return layer.kind in ("linear", "convolution")


def _taken_up(reader: Reader, tensors: dict[str, Tensor], part: Tensor) -> Assign:
    layer = reader.layer
    matrix = layer.matrix(tensors[layer.weight])  # (g, m, n · kernel)
    own = part[reader.channels].reshape(layer.groups, 1, -1)
    more = (matrix * own.repeat_interleave(matrix.shape[2] // own.shape[2], 2)).sum(2).flatten()
    name = layer.bias or f"{layer.weight}_bias"
    values = more if name not in tensors else tensors[name] + more
    new = "" if layer.bias else layer.weight
    return Assign(name, Values(values.float()), new, "takes up the bias of the layer before")
