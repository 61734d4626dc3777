"""What makes a layer's error least when it is added to each of its channels, behind the sum and the clamp that read it."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

POSITIONS = 1024  # of each example at most, that errors are looked at: neighbours are alike
ROWS = (
    2**13
)  # of all examples, about: the mean of so many is known to a ninetieth of their deviation
VALUES = 2**22  # in all rows and channels of one layer, about
STEPS = 4  # of Newton's method, each a pass over a layer's results
UNBOUNDED = (float("-inf"), float("inf"))


class Shift:
    """A layer's results behind the sum and the clamp that read them, of the float and of the quantized network.

    Args:
        wanted: what the float network has for each batch, before the clamp.
        found: what the quantized one has.
        examples: in each batch; its results have as many rows, or a multiple.
        bounds: of the clamp.
        dim: of the channels.

    Cost:
        Of one layer at most about ``VALUES`` float32 of each network; seven passes over them, or three where nothing is clamped.
    """

    def __init__(
        self,
        wanted: Sequence[Tensor],
        found: Sequence[Tensor],
        examples: Sequence[int],
        bounds: tuple[float, float],
        dim: int,
    ) -> None:
        self.bounds, self.dim, self.rank = bounds, dim % wanted[0].ndim, wanted[0].ndim
        self.size = wanted[0].shape[dim]
        rows = min(ROWS, max(VALUES // max(self.size, 1), 1))
        positions = max(min(rows // max(sum(examples), 1), POSITIONS), 1)
        halves: tuple[list[Tensor], list[Tensor]] = ([], [])
        done = 0
        for want, got, count in zip(wanted, found, examples, strict=True):
            first = (torch.arange(done, done + count) % 2).repeat_interleave(len(want) // count)
            done += count
            pair = [self._thinned(value, positions) for value in (want, got)]  # (rows, …, size)
            for half in (0, 1):
                own = torch.stack([value[first == half].float().flatten(0, -2) for value in pair])
                halves[half].append(own)
        self.pairs = []  # (2, rows, size) for each half
        for parts in halves:
            self.pairs.append(torch.cat(parts, 1))
            parts.clear()
        for pair_of in self.pairs:
            pair_of[0].clamp_(*bounds)

    def along(self, values: Tensor) -> Tensor:
        """(size,) values, to be added to the layer's result."""
        return values.reshape([-1 if d == self.dim else 1 for d in range(self.rank)])

    def best(self) -> tuple[Tensor, bool]:
        """(size,) float64: what makes the squared error least, where each half of the examples helps the other; whether one was tried."""
        shifts = torch.zeros(2, self.size, dtype=torch.float64)
        for _ in range(1 if self.bounds == UNBOUNDED else STEPS):
            shifts += torch.stack([self._newton(half, shifts[half]) for half in (0, 1)])
        none = torch.zeros(self.size, dtype=torch.float64)
        helps = torch.stack(
            [self._squares(half, shifts[1 - half]) < self._squares(half, none) for half in (0, 1)]
        ).all(0)
        return torch.where(helps, shifts.mean(0), 0.0), bool(shifts.any())

    def _newton(self, half: int, shift: Tensor) -> Tensor:
        """The mean error of the values that the clamp lets through, for each channel."""
        want, got = self.pairs[half]
        moved, (low, high) = got + shift.float(), self.bounds
        if self.bounds == UNBOUNDED:
            return _sums(moved.neg_().add_(want)) / max(len(want), 1)
        inside = ((moved > low) & (moved < high)).float()
        active = _sums(inside)
        total = _sums(moved.neg_().add_(want).mul_(inside))
        return torch.where(active > 0, total / active.clamp_min(1), 0.0)

    def _squares(self, half: int, shift: Tensor) -> Tensor:
        """Σ squared errors of all values, for each channel."""
        want, got = self.pairs[half]
        moved = (got + shift.float()).clamp_(*self.bounds)
        return _sums(moved.sub_(want).square_())

    def _thinned(self, value: Tensor, positions: int) -> Tensor:
        """About so many positions of each row, evenly spread, and the channels last."""
        places = [d for d in range(1, value.ndim) if d != self.dim]
        total = prod(value.shape[d] for d in places)
        every = max(round((total / positions) ** (1 / max(len(places), 1))), 1)
        for place in places:
            value = value[(slice(None),) * place + (slice(None, None, every),)]
        return value.movedim(self.dim, -1)


def _sums(rows: Tensor) -> Tensor:
    """(size,) float64: sums over the rows; those of a thousand at a time are formed in float32, by a product that is quicker than a sum."""
    parts = [rows.new_ones(len(part)) @ part for part in rows.split(1024)]
    return torch.stack(parts).sum(0, dtype=torch.float64)
