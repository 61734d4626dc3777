"""Reconstruction: the channels whose loss, after compensation, moves the network's outputs least leave first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.criteria.base import Criterion, found, observed, parameters
from tinier.criteria.curvature import Block, columns_by_count
from tinier.errors import InputError
from tinier.graph.groups import Group
from tinier.graph.layers import Layer
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.statistics.places import by_column, layers_by_node
from tinier.statistics.sensitivity import Sensitivity

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

    Attributes:
        ridge: λ as a share of the mean of the diagonal of the weighted covariance.

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

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise InputError(
                f"reconstruction: ridge={self.ridge}; a number above 0 is needed, such as 0.01"
            )

    def scores(
        self, network: Network, groups: Sequence[Group], statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """See ``Criterion.scores``. Cost: three runs over the data and one backward, and of the order of n³ for each layer."""
        statistics = observed(self, statistics, groups)
        known, layers = parameters(network), layers_by_node(network.traced)
        result = {}
        for group in groups:
            blocks = self._blocks(group, layers, known, statistics)
            if blocks:
                result[group.name] = _greedy(blocks, group.size)
        return found(self, network, result, "no linear layer or convolution reads one")

    def _blocks(
        self,
        group: Group,
        layers: Mapping[str, Layer],
        known: Mapping[str, Tensor],
        statistics: Statistics,
    ) -> list[Block]:
        result = []
        for use in statistics.uses[group.name]:
            own = statistics.sensitivities.get(use.node) if use.layer else None
            if own is not None:
                layer = layers[use.node]
                matrix = layer.matrix(known[layer.weight]).double().cpu()
                index = by_column(layer, use.index, matrix.shape[2])
                result += self._of_layer(matrix, own, index)
        return result

    def _of_layer(self, matrix: Tensor, own: Sensitivity, index: Tensor) -> list[Block]:
        result = []
        parts = zip(matrix, own.covariance, own.shares, index, strict=True)
        for weight, moments, shares, channels in parts:
            strength = self.ridge * float(moments.diagonal().mean())
            columns = columns_by_count(channels)
            if not strength > 0 or not columns:
                continue  # inputs that never change: whatever leaves, the bias stands in for it
            eye = torch.eye(len(moments), dtype=torch.float64)
            factor = torch.linalg.cholesky(moments + strength * eye)
            scaled = weight * shares.sqrt()[:, None]
            result.append(Block(scaled, torch.cholesky_inverse(factor), 1.0, columns))
        return result


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
