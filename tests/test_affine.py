"""Affine quantization against its formula, and the proof against saturation against 16-bit arithmetic."""

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
from tinier.tensors.saturation import PAIR_LIMIT, pair_sums, without_saturation

ZERO = torch.zeros((), dtype=torch.int64)


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


# Saturation


def saturating_pair(a: list[int], w: list[int]) -> int:
    """One 16-bit lane of vpmaddubsw: a₀·w₀ + a₁·w₁, saturated."""
    return max(-32768, min(32767, a[0] * w[0] + a[1] * w[1]))


def test_the_limit_is_exactly_where_16_bits_saturate() -> None:
    """Brute force over all pairs of weights; activations of 255 or 0 are the worst."""
    w0, w1 = torch.meshgrid(torch.arange(-127, 128), torch.arange(-127, 128), indexing="ij")
    safe = torch.ones_like(w0, dtype=torch.bool)
    for a0 in (0, 255):
        for a1 in (0, 255):
            total = a0 * w0 + a1 * w1
            safe &= (total <= 32767) & (total >= -32768)
    allowed = w0.abs() + w1.abs() <= PAIR_LIMIT
    assert bool(safe[allowed].all())
    tight = (w0.abs() + w1.abs() == PAIR_LIMIT + 1) & (w0 > 0) & (w1 > 0)
    assert not bool(safe[tight].any())
    assert saturating_pair([255, 255], [127, 127]) == 32767 != 255 * 254


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (6, 1, 3, 3), (4, 9), (3, 1), (5, 4, 7)])
def test_repaired_weights_never_saturate(shape: tuple[int, ...]) -> None:
    weight = values(*shape)
    weight[0] *= 0.0
    if weight[0].numel() > 2:
        weight[1] = 0.01
        weight[1].view(-1)[0] = 1.0  # one large weight with small neighbours needs no repair
    integers = Integers.signed(8)
    before = symmetric(weight.flatten(1).abs().amax(1), integers)
    after, repaired = without_saturation(weight, before, integers)
    q = quantize(weight, after, ZERO, integers, 0)
    assert bool((pair_sums(q) <= PAIR_LIMIT).all())
    for rows in (q.flatten(1), q.movedim(1, -1).flatten(1)):
        for row in rows.tolist():
            for pair in pairwise(row):
                for a in ([255, 255], [255, 0], [0, 255]):
                    exact = a[0] * pair[0] + a[1] * pair[1]
                    assert saturating_pair(a, [*pair]) == exact
    kept = [channel for channel in range(shape[0]) if channel not in repaired]
    assert torch.equal(after[kept], before[kept])
    assert bool((after[list(repaired)] > before[list(repaired)]).all())
    assert 0 not in repaired
    if weight[0].numel() > 2:
        assert 1 not in repaired


def test_the_repair_is_small() -> None:
    weight = values(32, 16, 3, 3)
    integers = Integers.signed(8)
    before = symmetric(weight.flatten(1).abs().amax(1), integers)
    after, _ = without_saturation(weight, before, integers)
    sums = pair_sums(quantize(weight, after, ZERO, integers, 0))
    assert bool((sums >= PAIR_LIMIT - 2)[after > before].all())
    assert float((after / before).max()) <= 2.0
