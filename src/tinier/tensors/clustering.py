"""Few values for many weights: codebooks of least squared error, and uniform levels around the median. Pure maths."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinier.errors import DataError, InputError
from tinier.tensors.affine import SMALLEST_SCALE, Integers
from tinier.tensors.grid_search import best_scale

MOST_CENTRES = 256  # what labels of one byte can name
# Up to so many distinct values are clustered exactly; more are first put into cells, half of them of equal width and half of
# equally many distinct values: both of the starts of Han et al., "linear" and "density-based", are then among the choices.
CELLS = 1024
_ROUNDS = 200  # of Lloyd's algorithm over all values, which ends when no label changes
_CHUNK = 1 << 22  # values that are compared at once


def codebook(
    values: Tensor, clusters: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Centres c and labels of least Σ h (x − c_label)²: weight sharing of one tensor.

    In one dimension clusters are intervals, so that the best ones are found by dynamic programming, without a start to choose or a
    random number: exactly for up to ``CELLS`` distinct values, else over cells of them, followed by Lloyd's algorithm over all. Where at
    least one value in ``clusters`` is exactly 0, as after pruning, 0 is a centre and stays exactly 0.

    Args:
        values: x, any shape, floating point, finite.
        clusters: most centres, 1 to 256.
        importance: h ≥ 0, like ``values``, finite; None for 1. Entries of weight 0 take the nearest centre.

    Returns:
        (centres (k,) of the type of ``values``, ascending and different, labels uint8 like ``values``); k ≤ clusters. With as many
        clusters as distinct values the centres are these values; centres that no value would take are left out.

    Raises:
        InputError: the number of clusters is out of range, or the importance does not fit the values.
        DataError: a value is not finite, or there is none.

    Cost:
        One sort; O(clusters · CELLS²) operations; about five copies of the values in float64.

    Source:
        Han et al. 2016, "Deep Compression", section 3, equation 2; Choi et al. 2017, "Towards the Limit of Network Quantization",
        equation 8 (importance); Wang and Song 2011, "Ckmeans.1d.dp" (dynamic programming).

    Differs:
        From Han et al.: their k-means depends on its start, and pruned weights are left out of the codebook, not a centre of it.
    """
    _check(values, clusters, importance)
    known, inverse, counts = torch.unique(values.detach().double().flatten(), return_inverse=True, return_counts=True)  # fmt: skip
    if len(known) > clusters:
        mass = counts.double()
        if importance is not None and bool((importance > 0).any()):
            weights = importance.detach().double().flatten().to(known.device)
            mass = torch.zeros_like(known).index_add_(0, inverse, weights)
        zeros = int(counts[known == 0].sum())
        pin = 0.0 if zeros * clusters >= values.numel() else None
        known = _centres(known.cpu(), mass.cpu(), clusters, pin)
    centres = known.to(values)
    centres = torch.unique(centres + 0.0)  # in the type of the values two may have become one
    labels = nearest(values, centres)
    used = torch.bincount(labels.flatten().long(), minlength=len(centres)) > 0
    if not bool(used.all()):
        centres = centres[used]
        labels = nearest(values, centres)
    return centres, labels


def nearest(values: Tensor, centres: Tensor) -> Tensor:
    """The label of the nearest centre to each value; half-way the lower one.

    Args:
        values: any shape, floating point.
        centres: (k,) ascending and different, k ≤ 256, of the same type.

    Returns:
        uint8 like ``values``. A value that equals a centre gets its label.

    Cost:
        O(values · log k).
    """
    fine = centres.double()
    middles = fine[:-1] + (fine[1:] - fine[:-1]) / 2
    middles = torch.where(middles >= fine[1:], fine[:-1], middles)  # between neighbours in float64
    flat = values.detach().flatten()
    labels = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK].double()
        labels[start : start + _CHUNK] = torch.bucketize(part, middles).to(torch.uint8)
    return labels.view(values.shape)


@dataclass(frozen=True)
class MedianCentred:
    """Values x̂ = m + s · q around a median.

    Attributes:
        integers: q, int8, of the shape of the values.
        scale: s, (m,) float32, one for each channel; (1,) without an axis.
        median: m, like ``scale``.
        axis: dimension of the channels; None for one of all values.
    """

    integers: Tensor
    scale: Tensor
    median: Tensor
    axis: int | None

    def values(self) -> Tensor:
        """x̂, float32, of the shape of the values."""
        shape = [1] * self.integers.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        scale, median = self.scale.view(shape), self.median.view(shape)
        return median + scale * self.integers.float()


def median_centred(values: Tensor, bits: int, axis: int | None = None) -> MedianCentred:
    """x̂ = m + s · q: the median of each channel is taken away, the rest is quantized uniformly and symmetrically around it.

    The scale is that of least squared error: with it, a value far out is clipped rather than all others coarsened. Half of the values lie
    on each side of the median, so that, unlike with levels around 0, both halves of the integers are used however the values are shifted.

    Args:
        values: any shape, floating point, finite, not empty.
        bits: 2 to 8; q lies in ±(2^(bits − 1) − 1).
        axis: dimension of the channels; None for one median and scale.

    Returns:
        Integers, scales and medians; of an even number of values the lower median.

    Raises:
        InputError: the bits are out of range.
        DataError: a value is not finite, or there is none.

    Cost:
        About 100 passes over the values, and a sort.

    Differs:
        A long tail on one side still leaves levels unused on the other: an asymmetric range does better there.
    """
    if not 2 <= bits <= 8:
        raise InputError(f"{bits} bits: 2 to 8 are possible")
    _finite(values)
    x = values.detach().float()
    matrix = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
    median = matrix.median(1).values  # (m,)
    rest = (matrix - median[:, None])[:, None]  # (m, 1, n)
    integers = Integers.signed(bits)
    clipping_nothing = (rest.abs().amax(2) / integers.high).clamp_min(SMALLEST_SCALE)  # (m, 1)
    zero = torch.zeros_like(clipping_nothing, dtype=torch.int64)
    scale, _ = best_scale(rest, None, integers, clipping_nothing, zero)
    q = (rest / scale[..., None]).round().clamp(integers.low, integers.high)[:, 0].to(torch.int8)
    shaped = q.view(x.shape) if axis is None else q.view(x.movedim(axis, 0).shape).movedim(0, axis)
    return MedianCentred(shaped.contiguous(), scale[:, 0], median, axis)


def _check(values: Tensor, clusters: int, importance: Tensor | None) -> None:
    if isinstance(clusters, bool) or not 1 <= clusters <= MOST_CENTRES:
        raise InputError(f"{clusters} clusters: 1 to {MOST_CENTRES} are possible")
    _finite(values)
    if importance is None:
        return
    if importance.shape != values.shape:
        raise InputError(
            f"importance of shape {tuple(importance.shape)} for values of shape {tuple(values.shape)}; both must be alike"
        )
    if not bool((importance.isfinite() & (importance >= 0)).all()):
        raise InputError("importance: it is negative or not finite somewhere; 0 or more is needed")


def _finite(values: Tensor) -> None:
    if not values.numel():
        raise DataError("values to cluster: there are none")
    if not values.is_floating_point() or not bool(values.isfinite().all()):
        raise DataError("values to cluster must be finite floating point numbers")


class _Sums:
    """Σh, Σhx and Σhx² of intervals of ascending values, shifted so that little cancels.

    Attributes:
        shift: what was taken off the values.
        m0, m1, m2: (n + 1,) float64, the sums over the first i values.
    """

    def __init__(self, x: Tensor, mass: Tensor) -> None:
        self.shift = float((x * mass).sum() / mass.sum())
        x = x - self.shift
        start = x.new_zeros(1)
        self.m0, self.m1, self.m2 = (
            torch.cat([start, part.cumsum(0)]) for part in (mass, mass * x, mass * x * x)
        )

    def at(self, index: Tensor) -> "_Sums":
        """The sums at some of the places only: intervals of cells."""
        few = object.__new__(_Sums)
        few.shift = self.shift
        few.m0, few.m1, few.m2 = self.m0[index], self.m1[index], self.m2[index]
        return few

    def costs(self, pinned: int | None, pin: float) -> Tensor:
        """(n + 1, n + 1) float64: [j, i] is the least Σ h (x − c)² over the values j … i − 1; infinite for j > i.

        Args:
            pinned: index of the value whose cluster has the centre ``pin``.
            pin: that centre.
        """
        s0, s1, s2 = (m[None, :] - m[:, None] for m in (self.m0, self.m1, self.m2))
        costs = (s2 - s1 * s1 / torch.where(s0 > 0, s0, 1.0)).clamp_min_(0)
        if pinned is not None:
            centre = pin - self.shift
            with_pin = (s2 - 2 * centre * s1 + centre * centre * s0).clamp_min_(0)
            costs[: pinned + 1, pinned + 1 :] = with_pin[: pinned + 1, pinned + 1 :]
        n = len(self.m0)
        return costs.masked_fill_(torch.ones(n, n, dtype=torch.bool).tril(-1), torch.inf)


def _centres(x: Tensor, mass: Tensor, clusters: int, pin: float | None) -> Tensor:
    """(k,) ascending centres of ascending different values (n,) float64, more than ``clusters`` of them; k ≤ clusters."""
    sums = _Sums(x, mass)
    pinned = None if pin is None else int((x == pin).nonzero()[0, 0])
    ends = _cells(x, pinned)
    cell_of_pin = None if pinned is None else int((ends <= pinned).sum()) - 1
    costs = sums.at(ends).costs(cell_of_pin, pin or 0.0)
    cuts = ends[_best_cuts(costs, clusters)]  # (k + 1,) places in x where clusters end
    for _ in range(_ROUNDS if len(ends) <= len(x) else 0):
        centres = _means(sums, cuts, pinned, pin)
        middles = (centres[:-1] + centres[1:]) / 2
        inner = torch.searchsorted(x, middles, right=True)
        moved = torch.unique(torch.cat([cuts[:1], inner, cuts[-1:]]))
        if torch.equal(moved, cuts):
            break
        cuts = moved
    return _means(sums, cuts, pinned, pin)


def _cells(x: Tensor, pinned: int | None) -> Tensor:
    """(c + 1,) int64: where cells of neighbouring values end, at most about ``CELLS`` of them; one holds the pinned value alone."""
    if len(x) <= CELLS:
        return torch.arange(len(x) + 1)
    half = CELLS // 2
    equal = torch.linspace(0, len(x), half + 1, dtype=torch.float64).round().long()
    width = torch.linspace(float(x[0]), float(x[-1]), half + 1, dtype=torch.float64)[1:-1]
    ends = [equal, torch.searchsorted(x, width)]
    if pinned is not None:
        ends.append(torch.tensor([pinned, pinned + 1]))
    return torch.unique(torch.cat(ends))


def _best_cuts(costs: Tensor, clusters: int) -> Tensor:
    """(k + 1,) int64 ascending indices 0 … n: the cuts of least total cost into at most ``clusters`` intervals."""
    n = len(costs) - 1
    total, choices = costs[0], []
    for _ in range(min(clusters, n) - 1):
        total, before = (total[:, None] + costs).min(0)
        choices.append(before)
    cuts = [n]
    for before in reversed(choices):
        cuts.append(int(before[cuts[-1]]))
    return torch.unique(torch.tensor([0, *cuts]))


def _means(sums: _Sums, cuts: Tensor, pinned: int | None, pin: float | None) -> Tensor:
    """(k,) ascending centres of the intervals between cuts; those without any weight are left out."""
    m0, m1 = sums.m0[cuts].diff(), sums.m1[cuts].diff()
    centres = m1 / torch.where(m0 > 0, m0, 1.0) + sums.shift
    weighs = m0 > 0
    if pinned is not None and pin is not None:
        place = int((cuts <= pinned).sum()) - 1
        centres[place], weighs[place] = pin, True
    return centres[weighs]
