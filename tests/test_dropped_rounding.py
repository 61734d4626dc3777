"""Rounding that is dropped here and there: against the quantizer whose step is trained, and against its own formula."""

import pytest
import torch
from torch import Tensor

from tinier.errors import InputError
from tinier.tensors.dropped_rounding import partly_rounded
from tinier.tensors.rounding import learned_step

GRIDS = [(0, 0, 255), (97, 0, 255), (0, -8, 7), (3, 0, 15)]  # zero point, low, high


def gradients(y: Tensor, x: Tensor, step: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    of_x, of_step = torch.autograd.grad((y * weights).sum(), (x, step))
    return of_x, of_step


def example(
    *shape: int, grid: tuple[int, int, int] = (0, 0, 255)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, s, the mask and what the gradient is of. The range of x is wider than that of the grid, so that much is clipped; no value lies
    between an end and half a step beyond, which ``learned_step`` counts as clipped."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator)
    v = x * 2**7 + grid[0]
    x[(v - grid[1] + 0.25).abs() <= 0.25] -= 2.0**-7
    x[(v - grid[2] - 0.25).abs() <= 0.25] += 2.0**-7
    x.requires_grad_()
    rounded = (torch.rand(shape, generator=generator) < 0.5).float()
    step = torch.tensor(2.0**-7, requires_grad=True)
    return x, step, rounded, torch.randn(shape, generator=generator)


@pytest.mark.parametrize(("zero_point", "low", "high"), GRIDS)
@pytest.mark.parametrize("shape", [(40,), (5, 6, 7, 8)])
def test_all_rounded_is_the_learned_step(
    shape: tuple[int, ...], zero_point: int, low: int, high: int
) -> None:
    x, step, rounded, weights = example(*shape, grid=(zero_point, low, high))
    found = partly_rounded(x, step, zero_point, low, high, torch.ones_like(rounded))
    wanted = learned_step(x, step, torch.tensor(zero_point), low, high)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6)
    for a, b in zip(
        gradients(found, x, step, weights), gradients(wanted, x, step, weights), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("zero_point", "low", "high"), GRIDS)
def test_a_mask_chooses_between_the_value_and_its_rounding(
    zero_point: int, low: int, high: int
) -> None:
    x, step, rounded, weights = example(5, 6, 7, 8, grid=(zero_point, low, high))
    found = partly_rounded(x, step, zero_point, low, high, rounded)
    whole = learned_step(x, step, torch.tensor(zero_point), low, high)
    assert torch.allclose(found, torch.where(rounded > 0, whole, x), rtol=0, atol=1e-6)
    of_x, of_step = gradients(found, x, step, weights)
    inside, slope = gradients(whole, x, step, weights * rounded)
    assert torch.allclose(of_x, inside + weights * (1 - rounded), rtol=1e-4, atol=1e-5)
    assert torch.allclose(of_step, slope, rtol=1e-4, atol=1e-5)


def test_half_a_step_beyond_the_ends_is_inside() -> None:
    x = torch.tensor([-0.9, -0.4, 0.2, 15.4, 15.6], requires_grad=True)
    step = torch.tensor(1.0, requires_grad=True)
    found = partly_rounded(x, step, 0, 0, 15, torch.ones(5))
    of_x, of_step = gradients(found, x, step, torch.ones(5))
    assert found.tolist() == pytest.approx([0, 0, 0, 15, 15], abs=1e-6)
    assert of_x.tolist() == [0, 1, 1, 1, 0]
    # round(v) − v inside, the integers of the ends outside, over √(5 · 15)
    assert float(of_step) == pytest.approx((0.4 - 0.2 - 0.4 + 0 + 15) / 75**0.5, rel=1e-5)


def test_nothing_rounded_is_the_identity() -> None:
    x, step, rounded, weights = example(30)
    found = partly_rounded(x, step, 0, 0, 255, torch.zeros_like(rounded))
    assert torch.equal(found, x)
    of_x, of_step = gradients(found, x, step, weights)
    assert torch.equal(of_x, weights)
    assert float(of_step) == 0


def test_the_order_in_memory_changes_nothing() -> None:
    x, step, rounded, weights = example(5, 6, 7, 8)
    turned = [
        t.detach().contiguous(memory_format=torch.channels_last) for t in (x, rounded, weights)
    ]
    y = turned[0].requires_grad_()
    found = partly_rounded(y, step, 3, 0, 15, turned[1])
    wanted = partly_rounded(x, step, 3, 0, 15, rounded)
    assert torch.equal(found, wanted)
    assert found.is_contiguous(memory_format=torch.channels_last)
    ours, theirs = gradients(found, y, step, turned[2]), gradients(wanted, x, step, weights)
    assert torch.equal(ours[0], theirs[0])
    assert torch.allclose(ours[1], theirs[1], rtol=1e-4)


def test_refusals() -> None:
    x, step, rounded, _ = example(30)
    with pytest.raises(InputError, match="high of at least 1"):
        partly_rounded(x, step, 0, -4, 0, rounded)
    with pytest.raises(InputError, match="a single step"):
        partly_rounded(x, torch.ones(2), 0, 0, 15, rounded)
    with pytest.raises(InputError, match=r"mask of shape \(29,\)"):
        partly_rounded(x, step, 0, 0, 15, rounded[1:])
