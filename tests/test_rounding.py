"""Soft rounding and learned steps against closed forms, finite differences and the quantizer that they train."""

import math

import pytest
import torch
from torch import Tensor

from tinier.errors import InputError
from tinier.tensors import affine
from tinier.tensors.affine import Integers
from tinier.tensors.grid import choose
from tinier.tensors.proxy_loss import proxy_loss
from tinier.tensors.rounding import (
    annealed_beta,
    hard_rounded,
    inverse_rectified_sigmoid,
    learned_step,
    rectified_sigmoid,
    rounding_penalty,
    soft_rounded,
    start_rounding,
)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# AdaRound


def test_the_rectified_sigmoid_is_its_formula() -> None:
    for v in (-9.0, -2.5, -1.0, 0.0, 0.3, 2.0, 2.5, 9.0):
        expected = min(max(1.2 / (1 + math.exp(-v)) - 0.1, 0.0), 1.0)
        assert float(rectified_sigmoid(torch.tensor(v))) == pytest.approx(expected, abs=1e-7)
    assert float(rectified_sigmoid(torch.tensor(0.0))) == 0.5
    assert rectified_sigmoid(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]


def test_the_inverse_is_the_inverse() -> None:
    h = torch.linspace(0, 1, 101, dtype=torch.float64)
    v = inverse_rectified_sigmoid(h)
    torch.testing.assert_close(rectified_sigmoid(v), h, rtol=0, atol=1e-12)
    assert float(v.abs().max()) == pytest.approx(math.log(11))
    torch.testing.assert_close(v, -v.flip(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("per_tensor", [True, False])
def test_training_starts_at_the_weights_and_can_end_at_nearest(
    symmetric: bool, groups: int, per_tensor: bool
) -> None:
    w = values(6, 24)
    grid = choose(w, Integers.signed(4), groups=groups, symmetric=symmetric, per_tensor=per_tensor)
    v = start_rounding(w, grid)
    inside = (grid.quantize(w) > -7) & (grid.quantize(w) < 7)
    torch.testing.assert_close(soft_rounded(w, v, grid)[inside], w[inside], rtol=1e-5, atol=1e-6)
    assert torch.equal(hard_rounded(w, v, grid), grid.quantize(w))
    # With V far out, soft rounding is hard rounding, up or down.
    for end in (9.0, -9.0):
        far = torch.full_like(v, end)
        hard = hard_rounded(w, far, grid)
        assert hard.dtype == grid.integers.dtype
        torch.testing.assert_close(
            soft_rounded(w, far, grid), grid.dequantize(hard), rtol=1e-6, atol=1e-7
        )
    up, down = (hard_rounded(w, torch.full_like(v, end), grid) for end in (9.0, -9.0))
    assert torch.equal((up - down)[inside], torch.ones_like(up)[inside])


def test_the_penalty_is_its_formula_and_pushes_to_the_nearer_end() -> None:
    h = torch.tensor([0.0, 0.1, 0.5, 0.8, 1.0], dtype=torch.float64)
    v = inverse_rectified_sigmoid(h)
    for beta in (2.0, 7.5, 20.0):
        expected = sum(1 - abs(2 * float(each) - 1) ** beta for each in h)
        assert float(rounding_penalty(v, beta)) == pytest.approx(expected, abs=1e-9)
    v = inverse_rectified_sigmoid(torch.tensor([0.2, 0.8])).requires_grad_()
    rounding_penalty(v, 2.0).backward()
    assert v.grad is not None
    assert v.grad[0] > 0 > v.grad[1]


def test_beta_is_annealed() -> None:
    betas = [annealed_beta(step, 101, warmup=0.0) for step in range(101)]
    assert betas[0] == 20
    assert betas[50] == pytest.approx(11)
    assert betas[100] == pytest.approx(2)
    assert betas == sorted(betas, reverse=True, key=lambda beta: beta or 0)
    late = [annealed_beta(step, 100) for step in range(100)]
    assert late[:20] == [None] * 20
    assert late[20] == 20
    assert late[99] == pytest.approx(2)
    assert annealed_beta(0, 1, warmup=0.0) == 20
    for step, steps, warmup in ((5, 5, 0.2), (-1, 5, 0.2), (0, 5, 1.0)):
        with pytest.raises(InputError, match="needed"):
            annealed_beta(step, steps, warmup=warmup)


def test_training_gains_most_of_what_the_best_rounding_would() -> None:
    """Against every choice of up or down for all weights of a row, on the loss of a layer's outputs."""
    n = 12
    x = values(300, n, seed=1) @ values(n, n, seed=2)
    w = values(8, n)
    h = (x.T @ x / len(x)).double()
    grid = choose(w, Integers.signed(3), rule="mse")
    v = start_rounding(w, grid).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=0.05)
    for step in range(400):
        optimizer.zero_grad()
        loss = (x @ (soft_rounded(w, v, grid) - w).T).square().mean(0).sum()
        beta = annealed_beta(step, 400)
        if beta is not None:
            loss = loss + 3.0 * rounding_penalty(v, beta)
        loss.backward()
        optimizer.step()
    ends = rectified_sigmoid(v.detach())
    assert float(((ends < 0.01) | (ends > 0.99)).float().mean()) > 0.95
    found = proxy_loss(w, hard_rounded(w, v.detach(), grid), h, grid)
    up = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * n)
    best = []
    for row in range(8):
        each = choose(w[row : row + 1], Integers.signed(3), rule="mse")
        many = w[row].expand(len(up), n)
        best.append(proxy_loss(many, hard_rounded(many, up, each), h, each).min())
    assert bool((found >= torch.stack(best) * (1 - 1e-9)).all())
    nearest = float(proxy_loss(w, grid.quantize(w), h, grid).sum())
    gain = (nearest - float(found.sum())) / (nearest - float(sum(best)))
    assert gain > 0.75


# Learned steps


@pytest.mark.parametrize("shape", [(), (1,), (6, 1), (6, 10)])
@pytest.mark.parametrize("ends", [(-8, 7), (0, 15)])
def test_forward_is_affine_quantization(shape: tuple[int, ...], ends: tuple[int, int]) -> None:
    x = values(6, 10) * 3
    step = values(*shape, seed=1).abs() * 0.2 + 0.1
    zero_point = torch.randint(*ends, shape, generator=torch.Generator().manual_seed(2))
    expected = affine.fake_quantize(x, step, zero_point, Integers(*ends))
    assert torch.equal(learned_step(x, step, zero_point, *ends), expected)
    assert torch.equal(learned_step(x, step, zero_point + 0.3, *ends), expected)


def test_gradients_of_single_values() -> None:
    """Esser et al., equations 2 and 3, by hand: s = 0.5, integers −2 … 1."""
    for x, of_x, of_s in (
        (0.2, 1, 0 - 0.4),
        (0.3, 1, 1 - 0.6),
        (-0.7, 1, -1 + 1.4),
        (0.5, 0, 1),
        (4.0, 0, 1),
        (-1.0, 0, -2),
        (-9.0, 0, -2),
    ):
        value = torch.tensor([x], dtype=torch.float64, requires_grad=True)
        step = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        zero = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        (3 * learned_step(value, step, zero, -2, 1)).sum().backward()
        assert float(value.grad) == 3 * of_x  # type: ignore[arg-type]
        assert float(step.grad) == pytest.approx(3 * of_s)  # type: ignore[arg-type]
        assert float(zero.grad) == (0 if of_x else -1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(), (5, 1), (5, 3, 1), (1, 3, 1)])
@pytest.mark.parametrize("high", [3, 15])
def test_gradients_of_many_values(shape: tuple[int, ...], high: int) -> None:
    """Against sums over a Python loop, with g = 1 / √(N · high)."""
    x = values(5, 3, 8).double() * 4
    if len(shape) == 2:
        x = x[:, :, 0]
    step = (values(*shape, seed=1).abs() * 0.3 + 0.2).double()
    zero = torch.randint(0, high, shape, generator=torch.Generator().manual_seed(3)).double()
    upstream = values(*x.shape, seed=4).double()
    leaves = [each.clone().requires_grad_() for each in (x, step, zero)]
    (learned_step(leaves[0], leaves[1], leaves[2], 0, high) * upstream).sum().backward()
    of_x, of_step, of_zero = torch.zeros_like(x), torch.zeros_like(step), torch.zeros_like(zero)
    wide_step, wide_zero = step.expand(x.shape), zero.expand(x.shape)
    g = 1 / math.sqrt(x.numel() / step.numel() * high)
    flat = torch.arange(step.numel()).reshape(shape).expand(x.shape)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in x.shape)).tolist():
        at = tuple(place)
        s, z, up, owner = (float(each[at]) for each in (wide_step, wide_zero, upstream, flat))
        v = float(x[at]) / s
        if 0 < v + z < high:
            of_x[at] = up
            of_step.view(-1)[int(owner)] += up * (round(v) - v) * g
        else:
            of_step.view(-1)[int(owner)] += up * ((high if v + z >= high else 0) - z) * g
            of_zero.view(-1)[int(owner)] += up * -s * g
    for leaf, expected in zip(leaves, (of_x, of_step, of_zero), strict=True):
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-9, atol=1e-12)


def test_gradients_of_clipped_values_are_true_derivatives() -> None:
    """Outside the range x̂ is smooth in s and in z: gradients over g equal finite differences."""
    x = torch.tensor([-30.0, 40.0, 55.0], dtype=torch.float64)
    step = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    zero = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    learned_step(x, step, zero, 0, 15).sum().backward()
    g = 1 / math.sqrt(3 * 15)

    def total(s: float, z: float) -> float:
        return float(((x / s + z).clamp(0, 15) - z).sum() * s)

    small = 1e-6
    slope = (total(0.7 + small, 3) - total(0.7 - small, 3)) / (2 * small)
    assert float(step.grad) / g == pytest.approx(slope, rel=1e-6)  # type: ignore[arg-type]
    slope = (total(0.7, 3 + small) - total(0.7, 3 - small)) / (2 * small)
    assert float(zero.grad) / g == pytest.approx(slope, rel=1e-6)  # type: ignore[arg-type]


def test_steps_learn_the_scale_of_least_error() -> None:
    x = values(20_000)
    step = torch.tensor(2.0, requires_grad=True)
    zero = torch.zeros((), dtype=torch.int64)
    optimizer = torch.optim.Adam([step], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (learned_step(x, step, zero, -3, 3) - x).square().mean().backward()
        optimizer.step()
    best = choose(x[None], Integers.signed(3), rule="mse").scale
    assert float(step.detach()) == pytest.approx(float(best), rel=0.05)


def test_what_cannot_be_is_refused() -> None:
    x, one, zero = values(3, 4), torch.ones(1), torch.zeros(1)
    for low, high in ((-3, 0), (4, 3)):
        with pytest.raises(InputError, match="above low"):
            learned_step(x, one, zero, low, high)
    with pytest.raises(InputError, match=r"step of shape \(3,\) does not broadcast"):
        learned_step(x, torch.ones(3), zero, 0, 3)
    with pytest.raises(InputError, match="zero point of shape"):
        learned_step(x, one, torch.zeros(1, 3, 4), 0, 3)
    grid = choose(x, Integers.signed(4))
    with pytest.raises(InputError, match="does not fit"):
        start_rounding(values(5, 4), grid)
