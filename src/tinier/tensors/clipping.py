"""What it costs to clip and round a histogram's values to a range: squared error and KL divergence, of many ranges at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from tinier.tensors.affine import Integers, asymmetric
from tinier.tensors.histogram import BINS, Histogram

Cost = Callable[[Tensor, Tensor], Tensor]  # (low (k,), high (k,)) → (k,)

_SMALLEST = 0.006  # of the whole range, that the search tries
# Above this many steps each cell's error is too small beside the sums that it is the difference of: it is s²/12 there.
_MOST_STEPS = 2047


def squared_error(histogram: Histogram, integers: Integers) -> Cost:
    """Σ (x − x̂)² over the values, taken as spread evenly within each bin; exact zeros, which stay exact, cost nothing.

    With levels c_0 … c_n, s apart, and midpoints t_k between them, summation by parts gives

        Σ (x − x̂)² = Σ (x − c_n)² − 2 s Σ_k G(t_k),   G(t) = Σ_{x < t} (t − x)

    G is quadratic within a bin, so that a range costs n look-ups however many values there are.

    Args:
        histogram: finite, with more than one value.
        integers: what the values become.

    Returns:
        (low (k,), high (k,)) float64 → (k,) float64.

    Cost:
        O(BINS), then O(k · n) for k ranges; above 2047 steps O(k), with s²/12 as the error of rounding.
    """
    spread = Spread(histogram)

    def cost(low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = _grid(low, high, integers)
        first = scale * (integers.low - zero_point)
        last = scale * (integers.high - zero_point)
        above = spread.squares(last)
        if integers.steps > _MOST_STEPS:
            clipped = spread.second(first) + above - spread.second(last)
            return clipped + spread.count * scale.square() / 12
        middle = torch.arange(integers.steps, dtype=torch.float64) + 0.5
        midpoints = first[:, None] + scale[:, None] * middle  # (k, n)
        return above - 2 * scale * spread.first(midpoints).sum(1)

    return cost


def divergence(histogram: Histogram, integers: Integers) -> Cost:
    """KL(P ‖ Q) = Σ p log(p / q) over the bins, exact zeros left out: they stay exact whatever the range is.

    P has the bins inside the range as they are; what lies outside is clipped, and counts in the outermost bin inside that is
    not empty. Q has only what lies inside, spread evenly over the bins with values that round to the same integer.
    So q > 0 wherever p > 0, and the divergence is finite for every range that holds any value. Q is not scaled up to make up for
    what it lacks, or a range that clips nearly all would seem to cost nothing.

    Args:
        histogram: finite, with a value that is not 0.
        integers: what the values become.

    Returns:
        (low (k,), high (k,)) float64 → (k,) float64, in nats; infinite where no value is inside, or where a bin is wider
        than a step of the integers, so that rounding would seem to cost nothing.

    Cost:
        O(BINS), then O(k · n) for k ranges and n integers: Σ c log c within a cell is a difference of sums from the left.

    Source:
        Migacz 2017, "8-bit Inference with TensorRT".

    Differs:
        From TensorRT and ONNX Runtime, which merge equal numbers of bins instead of those that round to one integer, cut both ends at
        once, scale Q up, and put clipped values into a bin that may be empty, where the divergence is infinite or an error.
    """
    counts = histogram.counts.double()  # (BINS,)
    width = 2.0**histogram.exponent
    # Sums over the bins before each edge, (BINS + 1,): of counts, of bins that are not empty, of c log c.
    mass, filled, logs = (_until(x) for x in (counts, (counts > 0).double(), _xlogx(counts)))
    total = mass[-1]
    used = histogram.counts.nonzero().flatten()

    def cost(low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = _grid(low, high, integers)
        result = torch.full_like(scale, torch.inf)
        first = scale * (integers.low - zero_point)
        begin, end = (
            _bin(bound, width)
            for bound in (first - scale / 2, first + scale * (integers.steps + 0.5))
        )  # (k,) each: bins begin … end − 1 are inside
        fine = (scale >= width) & (mass[end] > mass[begin])
        if not bool(fine.any()):
            return result
        scale, first, begin, end = scale[fine], first[fine], begin[fine], end[fine]
        steps = torch.arange(integers.steps + 2, dtype=torch.float64) - 0.5
        edges = _bin(first[:, None] + scale[:, None] * steps, width)  # (k, n + 1)
        inside, places = mass[edges].diff(), filled[edges].diff()  # (k, n)
        q = inside / places.clamp_min(1)
        sums = logs[end] - logs[begin] - torch.special.xlogy(inside, q).sum(1)
        outermost = used[torch.searchsorted(used, begin)], used[torch.searchsorted(used, end) - 1]
        below, above = mass[begin], total - mass[end]
        one = outermost[0] == outermost[1]
        for place, more in (
            (outermost[0], torch.where(one, below + above, below)),
            (outermost[1], torch.where(one, 0.0, above)),
        ):
            cell = (torch.searchsorted(edges, place[:, None], right=True) - 1).flatten()
            expected, own = q.gather(1, cell[:, None]).flatten(), counts[place]
            sums += _xlogx(own + more) - _xlogx(own) - more * expected.log()
        result[fine] = sums / total
        return result

    return cost


def cheapest(cost: Cost, low: float, high: float, tries: int) -> tuple[float, float]:
    """The shares of a range's two ends with the least cost: first of both together, then of each alone, twice.

    Args:
        cost: of ranges.
        low: at most 0.
        high: at least 0.
        tries: shares from 1 down to 0.6 %, evenly apart on a log scale; 16 more are tried around the best.

    Returns:
        The cheapest range found; the whole of it where none is cheaper.

    Cost:
        ``tries`` + 19 ranges, or where neither end is 0 three times that and 36 more.
    """
    search = _Search(cost, low, high, tries)
    search.move(low < 0, high > 0)
    if low < 0 < high:
        for coarse in (True, False):
            search.move(True, False, coarse)
            search.move(False, True, coarse)
    return search.low * float(search.best[0]), search.high * float(search.best[1])


def cheapest_bound(cost: Cost, bound: float, integers: Integers, tries: int) -> float:
    """The upper end of the symmetric range with the least cost, as `cheapest`."""
    search = _Search(cost, *symmetric_ends(bound, integers), tries)
    search.move(True, True)
    return bound * float(search.best[0])


def symmetric_ends(bound: float, integers: Integers) -> tuple[float, float]:
    """The range of integers with scale bound / high and zero point 0."""
    return bound * integers.low / integers.high, bound


class _Search:
    """The cheapest shares of a range's ends among those that were tried."""

    def __init__(self, cost: Cost, low: float, high: float, tries: int) -> None:
        self.cost, self.low, self.high = cost, low, high
        self.best = torch.ones(2, dtype=torch.float64)
        ratio = _SMALLEST ** (1 / (tries - 1))
        self.coarse = ratio ** torch.arange(tries, dtype=torch.float64)
        self.fine = ratio ** (torch.arange(-8, 9, dtype=torch.float64) / 8)

    def move(self, low: bool, high: bool, coarse: bool = True) -> None:
        """Change the ends that are named, together; the shares so far stay where nothing is cheaper."""
        moving = torch.tensor([low, high])
        if coarse:
            self._try(moving, self.coarse[:, None].expand(-1, 2))
        self._try(moving, (self.best * self.fine[:, None]).clamp_max(1))

    def _try(self, moving: Tensor, shares: Tensor) -> None:
        shares = torch.cat([self.best[None], torch.where(moving, shares, self.best)])  # (k, 2)
        costs = self.cost(self.low * shares[:, 0], self.high * shares[:, 1])
        self.best = shares[int(costs.argmin())]


def _grid(low: Tensor, high: Tensor, integers: Integers) -> tuple[Tensor, Tensor]:
    """Scales and zero points (k,) as float64, rounded as they will be."""
    scale, zero_point = asymmetric(low, high, integers)
    return scale.double(), zero_point.double()


class Spread:
    """Sums over all values but exact zeros, as functions of a point, with values spread evenly within each bin."""

    def __init__(self, histogram: Histogram) -> None:
        self.width = 2.0**histogram.exponent
        self.low, self.high = histogram.low, histogram.high
        edges = (torch.arange(BINS + 1, dtype=torch.float64) - BINS // 2) * self.width
        # No value lies outside low … high; a bin may have no width then, with all of its values at its start.
        edges = edges.clamp(self.low, self.high)
        counts, widths = histogram.counts.double(), edges.diff()
        self.counts, self.widths, self.middles = counts, widths, edges[:-1] + widths / 2
        self.count = counts.sum()
        self.total = (counts * self.middles).sum()
        self.square = self.central(0.0, 2)
        self.edges = edges[:-1]  # (BINS,), as all of these: what lies before the bin's start
        self.density = torch.where(widths > 0, counts / widths.clamp_min(1e-300), 0.0)
        self.before = counts.cumsum(0) - counts
        self.g = _until(self.before * widths + counts * widths / 2)[:-1]
        rest = widths.square() * (self.before + counts / 3)
        self.h = _until(2 * self.g * widths + rest)[:-1]

    def squares(self, t: Tensor) -> Tensor:
        """Σ (x − t)² over all x."""
        return self.square - 2 * t * self.total + t.square() * self.count

    def central(self, centre: float, power: int) -> Tensor:
        """Σ (x − centre)^power over all x, for a power of 2 or 4."""
        d = (self.middles - centre).square()
        if power == 2:
            return (self.counts * (d + self.widths**2 / 12)).sum()
        return (self.counts * (d.square() + d * self.widths**2 / 2 + self.widths**4 / 80)).sum()

    def below(self, t: Tensor) -> Tensor:
        """How many x are less than t."""
        inside, i, d = self._locate(t)
        return torch.where(t > inside, self.count, self.before[i] + self.density[i] * d)

    def first(self, t: Tensor) -> Tensor:
        """G(t) = Σ_{x < t} (t − x)."""
        inside, i, d = self._locate(t)
        found = self.density[i].mul_(d).mul_(0.5).add_(self.before[i]).mul_(d).add_(self.g[i])
        return found.add_((t - inside).clamp_min_(0).mul_(self.count))

    def second(self, t: Tensor) -> Tensor:
        """H(t) = Σ_{x < t} (t − x)² = 2 ∫ G."""
        inside, i, d = self._locate(t)
        found = self.h[i] + 2 * self.g[i] * d + self.before[i] * d**2 + self.density[i] * d**3 / 3
        return torch.where(t > inside, self.squares(t), found)

    def _locate(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The point moved into low … high, its bin, and how far into the bin it lies."""
        inside = t.clamp(self.low, self.high)
        index = (inside * (1 / self.width)).floor_().add_(BINS // 2).clamp_(0, BINS - 1).long()
        return inside, index, inside - self.edges[index]


def _until(parts: Tensor) -> Tensor:
    """Sums of all parts before each, and of all: one longer than the parts."""
    return torch.cat([parts.new_zeros(1), parts.cumsum(0)])


def _xlogx(x: Tensor) -> Tensor:
    return torch.special.xlogy(x, x)


def _bin(t: Tensor, width: float) -> Tensor:
    """The first bin whose middle is not below t."""
    return (t / width - 0.5).ceil_().add_(BINS // 2).clamp_(0, BINS).long()
