"""Streaming histograms of many variables at once, in flat memory."""

import torch
from torch import Tensor

BINS = 512  # of width 2^e around 0, before they are joined to the few that an entropy is taken of
_SMALLEST_EXPONENT = -100


class Histograms:
    """For each of ``length`` variables, counts in bins of width 2^e; bin i holds [(i − BINS/2) · 2^e, (i + 1 − BINS/2) · 2^e).

    Each variable has an exponent of its own, which grows with its largest value; bins are then merged in pairs, so that the counts are
    those of all values in one batch, as in ``tinier.tensors.histogram``.

    Args:
        length: number of variables.
    """

    def __init__(self, length: int) -> None:
        self.counts = torch.zeros(length, BINS, dtype=torch.int32)
        self.exponent = torch.full((length,), _SMALLEST_EXPONENT, dtype=torch.int32)
        self.low = torch.full((length,), torch.inf)
        self.high = torch.full((length,), -torch.inf)

    def add(self, x: Tensor) -> None:
        """Count values.

        Args:
            x: (rows, length), finite.

        Cost:
            O(values + length · BINS).
        """
        x = x.detach().float().cpu()
        length = self.counts.shape[0]
        low, high = x.amin(0), x.amax(0)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        # The largest magnitude must lie below BINS/2 · 2^e: |x| = m · 2^p with m < 1.
        largest = torch.maximum(low.abs(), high.abs())
        power = torch.frexp(largest).exponent - (BINS // 2).bit_length() + 1
        power = torch.where(largest > 0, power, _SMALLEST_EXPONENT)
        self._widen(torch.maximum(self.exponent, power.to(torch.int32)))
        index = torch.ldexp(x, -self.exponent).floor().long() + BINS // 2
        index = index.clamp(0, BINS - 1) + torch.arange(length) * BINS
        found = torch.bincount(index.flatten(), minlength=length * BINS)
        self.counts += found.view(length, BINS).to(torch.int32)

    def entropy(self, bins: int) -> Tensor:
        """H = −Σ p log p over ``bins`` equal bins between the smallest and the largest value of each variable.

        Args:
            bins: 2 or more; each of the fine bins counts where it starts.

        Returns:
            (length,) float64, in nats: 0 for a constant, at most log(bins).
        """
        width = torch.exp2(self.exponent.double())[:, None]
        start = (torch.arange(BINS, dtype=torch.float64) - BINS / 2) * width
        low, high = self.low.double()[:, None], self.high.double()[:, None]
        span = (high - low).clamp(min=1e-300)
        index = ((start - low) / span * bins).floor().clamp(0, bins - 1).long()
        counts = torch.zeros(len(self.counts), bins, dtype=torch.float64)
        counts.scatter_add_(1, index, self.counts.double())
        entropy = torch.special.entr(counts / counts.sum(1, keepdim=True).clamp(min=1)).sum(1)
        return torch.where(high[:, 0] > low[:, 0], entropy, 0.0)

    def _widen(self, wanted: Tensor) -> None:
        empty = self.counts.sum(1) == 0
        self.exponent = torch.where(empty, wanted, self.exponent)
        while bool((narrow := self.exponent < wanted).any()):
            merged = torch.zeros_like(self.counts[narrow])
            quarter = BINS // 4
            pairs = self.counts[narrow].view(len(merged), -1, 2).sum(2).to(torch.int32)
            merged[:, quarter : quarter + BINS // 2] = pairs
            self.counts[narrow] = merged
            self.exponent = self.exponent + narrow.to(torch.int32)
