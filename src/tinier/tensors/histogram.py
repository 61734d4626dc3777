"""A streaming histogram whose memory is flat and whose counts do not depend on how the values were batched."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

BINS = 4096
# Widths below this are not resolved: values this near to 0 share a bin.
_SMALLEST_EXPONENT = -100


@dataclass
class Histogram:
    """Counts of values in bins of width 2^exponent around 0; bin i holds [(i − BINS/2) · 2^e, (i + 1 − BINS/2) · 2^e).

    A value outside doubles the width until it fits, which merges bins in pairs: ⌊⌊x/w⌋/2⌋ = ⌊x/2w⌋, so that the counts
    are exactly those of all values in one batch. Exact zeros, of which activation functions make many, are counted apart.

    Attributes:
        counts: (BINS,) int64, without the exact zeros.
        exponent: log2 of the width of a bin.
        zeros: how many values are exactly 0.
        low, high: smallest and largest value; +inf and −inf before the first.
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    exponent: int = _SMALLEST_EXPONENT
    zeros: int = 0
    low: float = float("inf")
    high: float = float("-inf")

    @property
    def count(self) -> int:
        """How many values were added."""
        return int(self.counts.sum()) + self.zeros

    @property
    def finite(self) -> bool:
        """Whether all values so far, of which there must be some, were finite."""
        return abs(self.low) < float("inf") and abs(self.high) < float("inf")

    def add(self, x: Tensor) -> None:
        """Count the values of a tensor of any shape.

        Args:
            x: floating point; with NaN or infinity in it ``finite`` becomes false and nothing is counted.

        Cost:
            O(values); a few copies of ``x``.
        """
        x = x.detach().float().flatten()
        if not x.numel():
            return
        low, high = (float(bound) for bound in torch.aminmax(x))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            self.low, self.high = float("-inf"), float("inf")
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(_exponent(low, high))
        nonzero = int(torch.count_nonzero(x))
        index = torch.ldexp(x, torch.tensor(-self.exponent)).floor_().to(torch.int32)
        counts = torch.bincount(index.add_(BINS // 2), minlength=BINS)
        counts[BINS // 2] -= x.numel() - nonzero
        self.zeros += x.numel() - nonzero
        self.counts += counts

    def merged(self, other: "Histogram") -> "Histogram":
        """The histogram of the values of both."""
        both = Histogram(self.counts.clone(), self.exponent)
        both._widen(other.exponent)
        second = Histogram(other.counts.clone(), other.exponent)
        second._widen(both.exponent)
        both.counts += second.counts
        both.zeros = self.zeros + other.zeros
        both.low, both.high = min(self.low, other.low), max(self.high, other.high)
        return both

    def points(self, inside: int = 2) -> tuple[Tensor, Tensor]:
        """Values and how often they occur, each bin taken as ``inside`` evenly spread values between low and high.

        Returns:
            (values (k,) float64, weights (k,) float64).
        """
        used = self.counts.nonzero().flatten()
        offsets = (torch.arange(inside, dtype=torch.float64) + 0.5) / inside
        values = ((used - BINS // 2)[:, None] + offsets) * 2.0**self.exponent
        weights = (self.counts[used].double() / inside)[:, None].expand(-1, inside)
        values = values.flatten().clamp(self.low, self.high)
        zero = torch.zeros(1, dtype=torch.float64)
        return torch.cat([values, zero]), torch.cat([weights.flatten(), zero + self.zeros])

    def _widen(self, exponent: int) -> None:
        while self.exponent < exponent:
            half = torch.zeros_like(self.counts)
            quarter = BINS // 4
            half[quarter : quarter + BINS // 2] = self.counts.reshape(-1, 2).sum(1)
            self.counts = half
            self.exponent += 1
            if not int(self.counts.sum()):
                self.exponent = exponent


def _exponent(low: float, high: float) -> int:
    """The smallest exponent whose bins hold low … high."""
    exponent = _SMALLEST_EXPONENT
    for value in (low, high):
        if value:
            # value / 2^e must lie in [−BINS/2, BINS/2)
            _, power = torch.frexp(torch.tensor(abs(value), dtype=torch.float64))
            exponent = max(exponent, int(power) - (BINS // 2).bit_length() + 1)
    return exponent
