"""A streaming histogram whose memory is flat and whose counts do not depend on how the values were batched."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

BINS = 4096
# Widths below this are not resolved: values this near to 0 share a bin.
_SMALLEST_EXPONENT = -100
CACHED = 2**17  # values that are counted at once


@dataclass
class Histogram:
    """Counts of values in bins of width 2^exponent around 0; bin i holds [(i − BINS/2) · 2^e, (i + 1 − BINS/2) · 2^e).

    A value outside doubles the width until it fits, which merges bins in pairs: ⌊⌊x/w⌋/2⌋ = ⌊x/2w⌋, so that the counts
    are exactly those of all values in one batch. Exact zeros, of which activation functions make many, are counted apart.
    Where only every n-th value is looked at, it counts n times; the smallest and the largest value are always those of all.

    Attributes:
        counts: (BINS,) int64, without the exact zeros.
        exponent: log2 of the width of a bin.
        zeros: how many values are exactly 0.
        low, high: smallest and largest value; +inf and −inf before the first.
        parts: how many parts, such as examples, the values came in.
        low_sum, high_sum: sums over the parts of the smallest and of the largest value of each.
        importance: (BINS,) float64, for each bin the sum of what `weigh` was told of its values; None before.
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    exponent: int = _SMALLEST_EXPONENT
    zeros: int = 0
    low: float = float("inf")
    high: float = float("-inf")
    parts: int = 0
    low_sum: float = 0.0
    high_sum: float = 0.0
    importance: Tensor | None = None

    @property
    def count(self) -> int:
        """How many values were added."""
        return int(self.counts.sum()) + self.zeros

    @property
    def finite(self) -> bool:
        """Whether all values so far, of which there must be some, were finite."""
        return abs(self.low) < float("inf") and abs(self.high) < float("inf")

    @property
    def mean_ends(self) -> tuple[float, float]:
        """Means over the parts of the smallest and of the largest value; +inf and −inf before the first."""
        if not self.parts:
            return float("inf"), float("-inf")
        return self.low_sum / self.parts, self.high_sum / self.parts

    def add(self, x: Tensor, dim: int | None = None, most: int | None = None) -> None:
        """Count the values of a tensor of any shape.

        Args:
            x: floating point; with NaN or infinity in it ``finite`` becomes false and nothing is counted.
            dim: the dimension each of whose slices is a part; None where the tensor is one part.
            most: about how many values of each part are looked at, evenly from all of them: every n-th value of all parts in a row, which
                depends on the size of a part and on how many there were, not on how they were batched; n has no factor in common with the
                size, so that no row, column or channel is left out. The smallest and the largest value are those of all. None for all.

        Cost:
            One pass over all values for the ends, and a few over those that are looked at; a few copies of these.
        """
        if not x.numel():
            return
        x = x.detach().float()
        x = x.reshape(1, -1) if dim is None else x.movedim(dim, 0).reshape(x.shape[dim], -1)
        # Of whole tensors the ends are found ten times as quickly as along a dimension.
        ends = torch.stack([torch.stack(torch.aminmax(part)) for part in x])  # (parts, 2)
        low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            self.low, self.high = float("-inf"), float("inf")
            return
        every = _stride(x.shape[1], most)
        first = -self.parts * x.shape[1] % every
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.parts += len(x)
        sums = ends.double().sum(0).tolist()
        self.low_sum += sums[0]
        self.high_sum += sums[1]
        self._widen(_exponent(low, high))
        # A power of two scales exactly. Parts that fit the caches take a fifth of the time of a whole.
        factor = 2.0**-self.exponent
        for part in x.flatten()[first::every].split(CACHED):
            index = (part * factor).floor_().to(torch.int64).add_(BINS // 2)
            zeros = part.numel() - int(part.count_nonzero())
            counts = torch.bincount(index, minlength=BINS)
            counts[BINS // 2] -= zeros
            self.counts += counts * every
            self.zeros += zeros * every

    def weigh(self, x: Tensor, importance: Tensor) -> None:
        """Say how much errors of values matter; values that were not added, too, say so for those in their bins.

        Args:
            x: of any shape; with NaN or infinity in it nothing is said.
            importance: of its shape, 0 or more; what is not finite says nothing.

        Cost:
            A few passes over the values.
        """
        if self.importance is None:
            self.importance = torch.zeros(BINS, dtype=torch.float64)
        if not x.numel():
            return
        x = x.detach().float().flatten()
        low, high = (float(end) for end in torch.aminmax(x))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            return
        self._widen(_exponent(low, high))
        index = (x * 2.0**-self.exponent).floor_().to(torch.int64).add_(BINS // 2)
        said = importance.detach().double().flatten()
        counted = torch.where(said.isfinite() & (x != 0), said, 0.0)
        self.importance += torch.bincount(index, counted, minlength=BINS)

    def merged(self, other: "Histogram") -> "Histogram":
        """The histogram of the values of both, which lie side by side: the means of the ends are those of the wider one."""
        weights = [
            None if one is None else one.clone() for one in (self.importance, other.importance)
        ]
        both = Histogram(self.counts.clone(), self.exponent, importance=weights[0])
        both._widen(other.exponent)
        second = Histogram(other.counts.clone(), other.exponent, importance=weights[1])
        second._widen(both.exponent)
        both.counts += second.counts
        if both.importance is None or second.importance is None:
            both.importance = second.importance if both.importance is None else both.importance
        else:
            both.importance += second.importance
        both.zeros = self.zeros + other.zeros
        both.low, both.high = min(self.low, other.low), max(self.high, other.high)
        (low, high), (other_low, other_high) = self.mean_ends, other.mean_ends
        both.parts = max(self.parts, other.parts)
        both.low_sum = min(low, other_low) * both.parts if both.parts else 0.0
        both.high_sum = max(high, other_high) * both.parts if both.parts else 0.0
        return both

    def magnitudes(self) -> "Histogram":
        """The histogram of the absolute values."""
        half = BINS // 2
        counts = torch.zeros_like(self.counts)
        counts[half:] = self.counts[half:] + self.counts[:half].flip(0)
        high = max(abs(self.low), abs(self.high))
        low = 0.0 if self.low <= 0 <= self.high else min(abs(self.low), abs(self.high))
        return Histogram(counts, self.exponent, self.zeros, low, high)

    def quantile(self, share: float) -> float:
        """The value below which a share of the values lies: right to the width of a bin, and at 0 and 1 exactly.

        Args:
            share: in [0, 1]; between two values it is interpolated linearly, as numpy does.
        """
        rank = min(max(share, 0.0), 1.0) * (self.count - 1)
        below, above = (self._ranked(int(end)) for end in (math.floor(rank), math.ceil(rank)))
        return below + (above - below) * (rank - math.floor(rank))

    def _ranked(self, rank: int) -> float:
        """The value that so many are below, with values spread evenly within a bin."""
        if rank <= 0 or rank >= self.count - 1:
            return self.low if rank <= 0 else self.high
        half = BINS // 2
        # Bins below 0, the zeros, bins above.
        zeros = self.counts.new_tensor([self.zeros])
        counts = torch.cat([self.counts[:half], zeros, self.counts[half:]])
        sums = counts.cumsum(0)
        place = int(torch.searchsorted(sums, rank, right=True))
        if place == half:
            return 0.0
        inside = (rank - int(sums[place] - counts[place]) + 0.5) / int(counts[place])
        value = (place - (place > half) - half + inside) * 2.0**self.exponent
        return min(max(value, self.low), self.high)

    def _widen(self, exponent: int) -> None:
        while self.exponent < exponent:
            self.counts = _halved(self.counts)
            if self.importance is not None:
                self.importance = _halved(self.importance)
            self.exponent += 1
            empty = self.importance is None or not float(self.importance.sum())
            if empty and not int(self.counts.sum()):
                self.exponent = exponent


def _halved(counts: Tensor) -> Tensor:
    """(BINS,) with bins twice as wide."""
    half, quarter = torch.zeros_like(counts), BINS // 4
    half[quarter : quarter + BINS // 2] = counts.reshape(-1, 2).sum(1)
    return half


def _stride(size: int, most: int | None) -> int:
    """Every how many values one is looked at, of parts of ``size`` values."""
    every = 1 if most is None else -(-size // most)
    while math.gcd(every, size) > 1:
        every += 1
    return every


def _exponent(low: float, high: float) -> int:
    """The smallest exponent whose bins hold low … high."""
    exponent = _SMALLEST_EXPONENT
    for value in (low, high):
        if value:
            # value / 2^e must lie in [−BINS/2, BINS/2)
            _, power = torch.frexp(torch.tensor(abs(value), dtype=torch.float64))
            exponent = max(exponent, int(power) - (BINS // 2).bit_length() + 1)
    return exponent
