"""Integers of activations: which values share a scale, and the range that they get."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tinier.edits.quantize import Quantize
from tinier.errors import RefusedError
from tinier.graph.placement import Placement
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.tensors.affine import Integers, asymmetric, within
from tinier.tensors.histogram import Histogram
from tinier.tensors.ranges import activation_range

Bounds = tuple[float, float]
UNBOUNDED: Bounds = (float("-inf"), float("inf"))


@dataclass(frozen=True)
class ActivationScheme:
    """How activations become integers.

    Attributes:
        bits: 2 to 16.
        ranges: a key of `tinier.tensors.ranges.RULES`.
        symmetric: the zero point is 0.
    """

    bits: int
    ranges: str
    symmetric: bool

    @property
    def integers(self) -> Integers:
        """Runtimes clamp to all integers of a type, so that the one without an opposite stays."""
        if self.symmetric:
            return Integers(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
        return Integers.unsigned(self.bits)

    def parameters(self, histogram: Histogram, bounds: Bounds) -> tuple[float, int]:
        """(scale, zero point) of values with this histogram, within the bounds of a clamp where they all are."""
        low, high = activation_range(
            histogram, self.integers, self.ranges, symmetric=self.symmetric
        )
        scale, zero_point = asymmetric(torch.tensor(low), torch.tensor(high), self.integers)
        if bounds[0] <= low and high <= bounds[1]:
            scale = within(scale, zero_point, self.integers, *bounds)
        return float(scale), int(zero_point)


def activations_of(
    network: Network, placement: Placement, statistics: Statistics, scheme: ActivationScheme
) -> list[Quantize]:
    """Values that share a scale get the range of all of them together.

    Args:
        network: whose folded graph the placement is of.
        placement: which values become integers.
        statistics: histograms of these.
        scheme: how.

    Raises:
        RefusedError: the statistics are of another network.
    """
    missing = [name for name in placement.values if name not in statistics.activations]
    if missing:
        raise RefusedError(
            f"{network.name}: the statistics have nothing of {missing[0]}; "
            "collect them of this very network"
        )
    chosen = _shared(placement, statistics.activations, scheme)
    edits = []
    for name, readers in placement.values.items():
        scale, zero_point = chosen[placement.shares[name]]
        own = placement.bounds.get(name, UNBOUNDED)
        before = placement.before.get(name)
        if before and not _fits(scale, zero_point, scheme.integers, own):
            # The clamp cannot fuse into the shared scale: the operator before it gets the range of what the clamp
            # lets through, and stays an integer operator.
            first = scheme.parameters(statistics.activations[name], own)
            edits.append(_edit(before, first, scheme.integers, ()))
        edits.append(_edit(name, (scale, zero_point), scheme.integers, readers))
    return edits


def _shared(
    placement: Placement, histograms: Mapping[str, Histogram], scheme: ActivationScheme
) -> dict[str, tuple[float, int]]:
    """(scale, zero point) of all values that share them, by the node that stands for them."""
    together: dict[str, Histogram] = {}
    bounds: dict[str, Bounds] = {}
    for name, root in placement.shares.items():
        histogram = histograms[name]
        together[root] = together[root].merged(histogram) if root in together else histogram
        low, high = placement.bounds.get(name, UNBOUNDED)
        bounds[root] = (
            max(low, bounds.get(root, UNBOUNDED)[0]),
            min(high, bounds.get(root, UNBOUNDED)[1]),
        )
    return {root: scheme.parameters(found, bounds[root]) for root, found in together.items()}


def _edit(
    name: str, parameters: tuple[float, int], integers: Integers, readers: tuple[str, ...]
) -> Quantize:
    scale, zero_point = parameters
    return Quantize(name, scale, zero_point, integers.low, integers.high, readers)


def _fits(scale: float, zero_point: int, integers: Integers, bounds: Bounds) -> bool:
    """Whether all representable values lie within the bounds, so that a runtime can leave the clamp out."""
    ends = torch.tensor([integers.low - zero_point, integers.high - zero_point]) * torch.tensor(
        scale
    )
    return bounds[0] <= float(ends[0]) and float(ends[1]) <= bounds[1]
