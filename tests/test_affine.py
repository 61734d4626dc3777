"""Affine quantization against its formula."""

from itertools import pairwise

import pytest
import torch

from tinier.errors import DataError, InputError
from tinier.tensors.affine import (
    Integers,
    asymmetric,
    dequantize,
    fake_quantize,
    quantize,
    symmetric,
    within,
)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8, 12, 16])
def test_containers_hold_the_integers(bits: int) -> None:
    for integers in (Integers.signed(bits), Integers.unsigned(bits)):
        info = torch.iinfo(integers.dtype)
        assert info.min <= integers.low < integers.high <= info.max
    assert Integers.signed(bits).low == -Integers.signed(bits).high
    assert Integers.unsigned(bits).steps == 2**bits - 1


@pytest.mark.parametrize("bits", [0, 1, 40])
def test_impossible_bits_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match="bits"):
        Integers.signed(bits)


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
def test_round_trip_is_idempotent(bits: int) -> None:
    x = values(7, 50)
    integers = Integers.unsigned(bits)
    scale, zero_point = asymmetric(x.amin(1), x.amax(1), integers)
    q = quantize(x, scale, zero_point, integers, 0)
    back = dequantize(q, scale, zero_point, 0)
    assert torch.equal(quantize(back, scale, zero_point, integers, 0), q)
    assert torch.equal(fake_quantize(back, scale, zero_point, integers, 0), back)


def test_agrees_with_torch() -> None:
    x = values(6, 40)
    integers = Integers.unsigned(8)
    scale, zero_point = asymmetric(x.min(), x.max(), integers)
    ours = fake_quantize(x, scale, zero_point, integers)
    theirs = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), 0, 255)
    assert torch.allclose(ours, theirs, atol=1e-7)
    weights = Integers.signed(8)
    scales = symmetric(x.abs().amax(1), weights)
    ours = fake_quantize(x, scales, torch.zeros(6), weights, 0)
    theirs = torch.fake_quantize_per_channel_affine(x, scales, torch.zeros(6).int(), 0, -127, 127)
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_each_bit_halves_the_error() -> None:
    x = values(4000)
    errors = []
    for bits in range(4, 20):
        integers = Integers.unsigned(bits)
        scale, zero_point = asymmetric(x.min(), x.max(), integers)
        errors.append((fake_quantize(x, scale, zero_point, integers) - x).abs().mean().item())
    ratios = [a / b for a, b in pairwise(errors)]
    assert all(1.8 < ratio < 2.3 for ratio in ratios), ratios
    assert errors[-1] < 1e-5


def test_zero_is_exact_and_min_max_does_not_clip() -> None:
    for seed in range(20):
        x = values(100, seed=seed) * 3 + seed / 4
        integers = Integers.unsigned(8)
        scale, zero_point = asymmetric(x.min(), x.max(), integers)
        assert fake_quantize(torch.zeros(1), scale, zero_point, integers).item() == 0
        error = (fake_quantize(x, scale, zero_point, integers) - x).abs().max()
        assert error <= scale * 0.5001


def test_constant_channels() -> None:
    low = torch.tensor([0.0, 2.0, -3.0])
    integers = Integers.unsigned(8)
    scale, zero_point = asymmetric(low, low, integers)
    assert torch.allclose(fake_quantize(low, scale, zero_point, integers, 0), low, rtol=1e-6)
    scale = symmetric(torch.tensor([0.0, 1.0, 4.0]), Integers.signed(8))
    assert scale[0] == scale[1], "a channel of zeros takes the smallest scale of the others"
    assert symmetric(torch.zeros(3), Integers.signed(8)).tolist() == [1.0, 1.0, 1.0]


def test_impossible_ranges_are_refused() -> None:
    integers = Integers.unsigned(8)
    with pytest.raises(DataError, match="NaN or infinity"):
        asymmetric(torch.tensor(float("nan")), torch.tensor(1.0), integers)
    with pytest.raises(DataError, match="empty range"):
        asymmetric(torch.tensor(1.0), torch.tensor(0.0), integers)


@pytest.mark.parametrize("bounds", [(0.0, 6.0), (-1.0, 1.0), (0.0, float("inf"))])
def test_within_a_clamp(bounds: tuple[float, float]) -> None:
    integers = Integers.unsigned(8)
    high = min(bounds[1], 5.0) if bounds[1] == float("inf") else bounds[1]
    scale, zero_point = asymmetric(torch.tensor(bounds[0]), torch.tensor(high), integers)
    inside = within(scale, zero_point, integers, *bounds)
    assert float(inside * (integers.high - zero_point)) <= bounds[1]
    assert float(inside * (integers.low - zero_point)) >= bounds[0]
    assert inside >= scale * 0.99
