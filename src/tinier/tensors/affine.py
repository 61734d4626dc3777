"""Affine quantization: q = clamp(round(x / s) + z, low, high), x̂ = s · (q − z)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinier.errors import DataError, InputError

# Smaller ranges than this are treated as this: the product of two scales must stay a normal float32.
SMALLEST_SCALE = 1e-15

_DTYPES = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32)


@dataclass(frozen=True)
class Integers:
    """The integers low … high that quantized values take.

    Attributes:
        low: smallest.
        high: largest.
    """

    low: int
    high: int

    @staticmethod
    def signed(bits: int) -> "Integers":
        """−(2^(bits−1) − 1) … 2^(bits−1) − 1, the same number below and above zero. Bits: 2 … 32."""
        top = 2 ** (_checked(bits) - 1) - 1
        return Integers(-top, top)

    @staticmethod
    def unsigned(bits: int) -> "Integers":
        """0 … 2^bits − 1. Bits: 2 … 31."""
        return Integers(0, 2 ** _checked(bits) - 1)

    @property
    def dtype(self) -> torch.dtype:
        """The smallest torch dtype that holds them."""
        for dtype in _DTYPES:
            info = torch.iinfo(dtype)
            if info.min <= self.low and self.high <= info.max:
                return dtype
        raise InputError(f"integers {self.low} … {self.high} do not fit 32 bits")

    @property
    def steps(self) -> int:
        """How many steps lie between low and high."""
        return self.high - self.low


def symmetric(bound: Tensor, integers: Integers) -> Tensor:
    """Scale that maps ±bound to ±high; the zero point is 0.

    Args:
        bound: largest absolute value, of any shape, finite and not negative.
        integers: see `Integers.signed`.

    Returns:
        Scales like ``bound``, float32. Where the bound is 0 the scale is the smallest of the others (1 if there is none),
        so that a bias on the grid of such a channel is as fine as elsewhere.

    Raises:
        DataError: the bound is not finite.
    """
    _finite(bound)
    scale = (bound.double() / integers.high).float().clamp_min(SMALLEST_SCALE)
    used = scale[bound > 0]
    other = used.min() if used.numel() else torch.tensor(1.0)
    return torch.where(bound > 0, scale, other)


def asymmetric(low: Tensor, high: Tensor, integers: Integers) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range; the range is widened to hold 0, which becomes exactly representable.

    Args:
        low: smallest value, of any shape, finite.
        high: largest value, like ``low``.
        integers: what the values become.

    Returns:
        (scale float32, zero point int64), like ``low``. An empty range [0, 0] has scale 1.

    Raises:
        DataError: a bound is not finite, or low is above high.
    """
    _finite(low, high)
    if bool((low > high).any()):
        raise DataError(f"empty range: {low.max().item():g} … {high.min().item():g}")
    low, high = low.double().clamp_max(0), high.double().clamp_min(0)
    width = high - low
    scale = torch.where(width > 0, width / integers.steps, 1.0).float().clamp_min(SMALLEST_SCALE)
    zero_point = (integers.low - low / scale.double()).round().clamp(integers.low, integers.high)
    return scale, zero_point.long()


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, integers: Integers, axis: int | None = None
) -> Tensor:
    """q = clamp(round(x / s) + z, low, high); halves round to even.

    Args:
        x: values, any shape.
        scale: scalar, or one for each slice along ``axis``.
        zero_point: like ``scale``, integers.
        integers: what the values become.
        axis: the dimension of ``x`` that has scales of its own; None for one scale.

    Returns:
        Integers in ``integers.dtype``, like ``x``.
    """
    scale, zero_point = _along(scale, x, axis), _along(zero_point, x, axis)
    q = (x / scale).round() + zero_point
    return q.clamp(integers.low, integers.high).to(integers.dtype)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
    """x̂ = s · (q − z), float32; arguments as for `quantize`."""
    scale, zero_point = _along(scale, q, axis), _along(zero_point, q, axis)
    return (q.to(torch.int64) - zero_point).to(scale.dtype) * scale


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, integers: Integers, axis: int | None = None
) -> Tensor:
    """Quantize and dequantize: the nearest representable values; arguments as for `quantize`."""
    return dequantize(quantize(x, scale, zero_point, integers, axis), scale, zero_point, axis)


def within(
    scale: Tensor, zero_point: Tensor, integers: Integers, low: float, high: float
) -> Tensor:
    """The largest scale, at most ``scale``, whose representable values lie inside a clamp's bounds.

    A runtime leaves out a clamp before a quantization only when the quantization clamps at least as tightly itself.

    Args:
        scale: float32 scalar.
        zero_point: integer scalar.
        integers: what the values become.
        low: lower bound of the clamp, at most 0.
        high: upper bound, at least 0; may be infinite.
    """
    below = int(zero_point) - integers.low
    above = integers.high - int(zero_point)
    for bound, count in ((-low, below), (high, above)):
        if count and bound > 0:
            while float(scale * count) > bound:
                limit = torch.tensor(bound / count, dtype=torch.float32)
                scale = torch.nextafter(torch.minimum(scale, limit), torch.tensor(0.0))
    return scale


def _along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    if axis is None or values.ndim == 0:
        return values
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)


def _finite(*bounds: Tensor) -> None:
    if not all(bool(torch.isfinite(bound).all()) for bound in bounds):
        raise DataError("a range to quantize is not finite: the values have NaN or infinity")


def _checked(bits: int) -> int:
    if not 2 <= bits <= 31:
        raise InputError(f"{bits} bits: 2 to 31 are possible")
    return bits
