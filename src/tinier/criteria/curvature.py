"""The least squares error of taking columns out of a layer, from the Gram matrix of its input."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinier.graph.groups import Group
from tinier.graph.layers import Layer
from tinier.statistics import Statistics
from tinier.statistics.base import Gram
from tinier.statistics.places import by_column

ROUNDING = 1e-12  # variance as a share of the mean square that float32 rounding alone may make
SOUND = 1e-7  # least ratio of pivots of a factor that is trusted


@dataclass
class Block:
    """One weight matrix behind a channel group; a convolution of g groups has g of them.

    Attributes:
        weight: (outputs, n) float64.
        inverse: (n, n) float64, (G + λ I)⁻¹, G the covariance of the inputs, a mean over the rows.
        energy: what errors are divided by, so that layers compare: the variance of the whole layer's output.
        columns: groups of channels with as many columns each: ((k,) channels, (k, s) their columns).
    """

    weight: Tensor
    inverse: Tensor
    energy: float
    columns: list[tuple[Tensor, Tensor]]

    def errors(self, size: int) -> Tensor:
        """tr(W_S ([(G + λI)⁻¹]_SS)⁻¹ W_Sᵀ) / energy for the columns S of each channel. (size,) float64."""
        result = torch.zeros(size, dtype=torch.float64)
        for channels, columns in self.columns:
            inside = self.inverse[columns[:, :, None], columns[:, None, :]]  # (k, s, s)
            own = self.weight[:, columns].permute(1, 2, 0)  # (k, s, outputs)
            solved = torch.linalg.solve(inside, own)
            result[channels] += (own * solved).sum((1, 2)).clamp(min=0) / self.energy
        return result

    def remove(self, channel: int) -> None:
        """Take the columns of one channel out, with the others fitted again."""
        for number, (channels, columns) in enumerate(self.columns):
            at = (channels == channel).nonzero().flatten()
            if not len(at):
                continue
            gone = columns[at[0]]
            rows = self.inverse[gone]  # (s, n)
            step = torch.linalg.solve(rows[:, gone], rows)
            self.weight = self.weight - self.weight[:, gone] @ step
            self.inverse = self.inverse - rows.mT @ step
            left = channels != channel
            self.columns[number] = (channels[left], columns[left])


def blocks(
    group: Group,
    layers: dict[str, Layer],
    weights: dict[str, Tensor],
    statistics: Statistics,
    ridge: float,
) -> list[Block]:
    """The weight matrices of the linear layers and convolutions that read a group.

    Args:
        group: the channel group.
        layers: node name → layer.
        weights: parameter → tensor.
        statistics: with Gram matrices.
        ridge: λ as a share of the mean of the diagonal of G; raised where rounding asks for more.

    Cost:
        n³ for each Gram matrix, which is inverted.
    """
    result: list[Block] = []
    for use in statistics.uses[group.name]:
        if use.layer and use.node in statistics.grams:
            layer = layers[use.node]
            matrix = layer.matrix(weights[layer.weight]).double().cpu()
            index = by_column(layer, use.index, matrix.shape[2])
            result += _of_layer(matrix, statistics.grams[use.node], index, ridge)
    return result


def _of_layer(matrix: Tensor, gram: Gram, index: Tensor, ridge: float) -> Sequence[Block]:
    mean = gram.total / gram.rows
    covariance = gram.products / gram.rows - mean[:, :, None] * mean[:, None, :]
    energy = float(torch.einsum("gmn,gnk,gmk->", matrix, covariance, matrix))
    result: list[Block] = []
    parts = zip(matrix, covariance, gram.products / gram.rows, index, strict=True)
    for weight, moments, squares, channels in parts:
        columns = columns_by_count(channels)
        if not energy > 0 or not columns or constant(moments, squares):
            continue
        result.append(Block(weight, damped_inverse(moments, ridge), energy, columns))
    return result


def constant(covariance: Tensor, squares: Tensor) -> bool:
    """Whether inputs never change but for rounding: whatever leaves, the bias stands in for it.

    Args:
        covariance: (n, n) float64.
        squares: (n, n) float64, the same second moments with the mean left in.
    """
    return not float(covariance.trace()) > ROUNDING * float(squares.trace())


def damped_inverse(covariance: Tensor, ridge: float) -> Tensor:
    """(C + λ I)⁻¹ with λ = ridge · tr(C) / n, ten times as much until C + λ I is positive definite beyond rounding.

    Args:
        covariance: (n, n) float64, finite, symmetric, of trace above 0; rounding may have made it indefinite.
        ridge: above 0.

    Returns:
        (n, n) float64.

    Cost:
        n³ for each λ that is tried; one, as a rule.
    """
    eye = torch.eye(len(covariance), dtype=torch.float64)
    strength = ridge * float(covariance.diagonal().mean())
    while True:
        factor, failed = torch.linalg.cholesky_ex(covariance + strength * eye)
        diagonal = factor.diagonal()
        if not int(failed) and bool(diagonal.amin() > SOUND * diagonal.amax()):
            return torch.cholesky_inverse(factor)
        strength *= 10


def columns_by_count(index: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Channels with as many columns each, and these columns."""
    inside = (index >= 0).nonzero().flatten()
    order = inside[index[inside].argsort(stable=True)]
    channels, counts = index[order].unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    result = []
    for count in counts.unique().tolist():
        chosen = counts == count
        at = starts[chosen][:, None] + torch.arange(count)
        result.append((channels[chosen], order[at]))
    return result
