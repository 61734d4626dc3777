"""Reconstruction: the channels whose loss, after compensation, moves the network's outputs least leave first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tinier.criteria.base import SMALLEST, Criterion, observed, parameters, relative
from tinier.criteria.curvature import Block, columns_by_count, constant, damped_inverse
from tinier.criteria.magnitude import Magnitude
from tinier.errors import InputError
from tinier.graph.groups import Group
from tinier.graph.layers import Layer
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.statistics.places import by_column, layers_by_node
from tinier.statistics.sensitivity import Sensitivity
from tinier.units import is_number

ROUNDS = 64  # channels leave in about as many rounds, one by one in narrow groups


@dataclass(frozen=True)
class Reconstruction(Criterion):
    """What the network's outputs change by when channels leave greedily, with the layers behind them fitted again.

    As ``OBSGreedy``, but errors are weighted by how much they matter for what the network returns: with g the gradient of a random
    projection of the outputs by the result y of a layer, the error of row r and output o counts w_r φ_o, with w_r = ‖g_r‖² and φ_o
    = Σ_r g_ro² / Σ g². The score of a channel is the estimated increase of the mean square of the outputs per example, in units of
    their variance, added over the layers that read it; so scores of different groups compare. Rows that no output depends on
    (padding, all tokens but the first in the last layer of a classifier) do not count. Needs no labels. Suits ranking across
    groups, where compensation follows.

    Groups that something else than linear layers and convolutions reads (an einsum, a recurrent layer, a product) are ordered by
    ``otherwise``, each channel at the score that channels of other groups have at the same place among its scores. Where a layer's
    inputs never change in the data, the bias stands in for whatever leaves: such channels score next to nothing, in the same order.

    Attributes:
        ridge: λ as a share of the mean of the diagonal of the weighted covariance; raised where rounding asks for more.
        otherwise: scores what no linear layer or convolution reads; one that needs no data.

    Source:
        Kurtic et al. 2023, "ZipLM", algorithm 1, for greedy removal; Martens and Grosse 2015, "Optimizing neural networks with
        Kronecker-factored approximate curvature", section 3, for curvature as a product of what a layer reads and of its output gradients.

    Differs:
        The curvature is that of the squared error of the outputs; its output factor is diagonal, and rows are weighted one by one. Wide
        groups lose several channels in a round.
    """

    name: ClassVar[str] = "reconstruction"
    comparable: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"sensitivity"})

    ridge: float = 1e-2
    otherwise: Criterion = field(default_factory=Magnitude)

    def __post_init__(self) -> None:
        if not is_number(self.ridge) or not self.ridge > 0:
            raise InputError(
                f"reconstruction: ridge={self.ridge!r}; a number above 0 is needed, such as 0.01"
            )
        if self.otherwise.needs:
            raise InputError(
                f"reconstruction: otherwise={self.otherwise.name} needs data; one of weights alone is needed, such as magnitude"
            )

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``. Cost: three runs over the data and one backward, and of the order of n³ for each layer."""
        statistics = observed(self, statistics, groups)
        known, layers = parameters(network), layers_by_node(network.traced)
        result, unread = {}, []
        other = self.otherwise.scores(network, groups)
        other = {name: relative(scores) for name, scores in other.items()}
        for group in groups:
            blocks = self._blocks(group, layers, known, statistics)
            uses = statistics.uses[group.name]
            if blocks:
                result[group.name] = _greedy(blocks, group.size)
            elif group.name in other:
                if uses and all(use.node in statistics.sensitivities for use in uses):
                    result[group.name] = other[group.name] * SMALLEST
                else:
                    unread.append(group.name)
        both = [name for name in result if name in other]
        place = torch.cat([other[name] for name in both]) if both else torch.zeros(0)
        level = torch.cat([result[name] for name in both]) if both else torch.zeros(0)
        for name in unread:
            result[name] = _matched(other[name], place, level)
        return result

    def _blocks(
        self,
        group: Group,
        layers: Mapping[str, Layer],
        known: Mapping[str, Tensor],
        statistics: Statistics,
    ) -> list[Block]:
        result = []
        for use in statistics.uses[group.name]:
            own = statistics.sensitivities.get(use.node)
            if own is not None:
                layer = layers[use.node]
                matrix = layer.matrix(known[layer.weight]).double().cpu()
                index = by_column(layer, use.index, matrix.shape[2])
                result += self._of_layer(matrix, own, index)
        return result

    def _of_layer(self, matrix: Tensor, own: Sensitivity, index: Tensor) -> list[Block]:
        result = []
        raw = own.products / own.examples
        parts = zip(matrix, own.covariance, raw, own.shares, index, strict=True)
        for weight, moments, squares, shares, channels in parts:
            columns = columns_by_count(channels)
            if not columns or constant(moments, squares):
                continue
            scaled = weight * shares.sqrt()[:, None]
            result.append(Block(scaled, damped_inverse(moments, self.ridge), 1.0, columns))
        return result


def _matched(values: Tensor, known: Tensor, level: Tensor) -> Tensor:
    """Scores of another kind brought to a level: the one that stands at the same place among known scores of that kind.

    Args:
        values: (size,) float64.
        known: (n,) float64, scores of the same kind as ``values``.
        level: (n,) float64, in any order; the q-quantile of ``known`` goes to the q-quantile of these.

    Returns:
        (size,) float64, in the order of ``values``; beyond the ends in proportion. ``values`` where nothing is known.
    """
    if not len(known):
        return values
    x, y = known.sort().values, level.sort().values
    after = torch.searchsorted(x, values).clamp(1, max(len(x) - 1, 1)).clamp(max=len(x) - 1)
    before = (after - 1).clamp(min=0)
    part = (values - x[before]) / (x[after] - x[before]).clamp(min=SMALLEST)
    inside = y[before] + part.clamp(0, 1) * (y[after] - y[before])
    first, last = (y[end] / x[end].clamp(min=SMALLEST) for end in (0, -1))
    outside = values * torch.where(values > x[-1], last, first)
    return torch.where((values > x[-1]) | (values < x[0]), outside, inside)


def _greedy(blocks: list[Block], size: int) -> Tensor:
    """(size,) float64: the error that each channel adds when it leaves, rising in the order of leaving."""
    scores, last = torch.zeros(size, dtype=torch.float64), 0.0
    left = torch.ones(size, dtype=torch.bool)
    step = max(1, size // ROUNDS)
    while bool(left.any()):
        total = torch.zeros(size, dtype=torch.float64)
        for block in blocks:
            total += block.errors(size)
        order = torch.where(left, total, torch.inf).argsort(stable=True)
        gone = order[: min(step, int(left.sum()))]
        for channel in gone.tolist():
            # Strictly rising, so that the order of removal is the order of the scores.
            last = max(float(total[channel]), last * (1 + 1e-9) + 1e-30)
            scores[channel] = last
        left[gone] = False
        for block in blocks:
            _remove(block, gone)
    return scores


def _remove(block: Block, gone: Tensor) -> None:
    """Take the columns of several channels out at once, with the others fitted again."""
    taken = [columns[torch.isin(channels, gone)].flatten() for channels, columns in block.columns]
    out = torch.cat(taken)
    if not len(out):
        return
    rows = block.inverse[out]  # (s, n)
    step = torch.linalg.solve(rows[:, out], rows)
    block.weight = block.weight - block.weight[:, out] @ step
    block.inverse = block.inverse - rows.mT @ step
    for number, (channels, columns) in enumerate(block.columns):
        stay = ~torch.isin(channels, gone)
        block.columns[number] = (channels[stay], columns[stay])
