"""Error feedback, sweeps and refitted scales against naive GPTQ, enumeration of all integers, and least squares."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from tinier.errors import DataError, InputError
from tinier.tensors.affine import Integers
from tinier.tensors.error_feedback import ORDERS, error_feedback
from tinier.tensors.grid import Grid, choose
from tinier.tensors.proxy_loss import proxy_loss, refit_scales, sweep


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(n: int, rows: int, seed: int = 1) -> Tensor:
    """(rows, n) correlated Gaussians, some channels much larger than others."""
    mixed = values(rows, n, seed=seed) @ values(n, n, seed=seed + 1) / n**0.5
    common = values(rows, 1, seed=seed + 2)
    return (mixed + common) * torch.logspace(-0.5, 0.5, n)


def hessian_of(x: Tensor) -> Tensor:
    return x.double().T @ x.double() / len(x)


def full(bits: int) -> Integers:
    return Integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def gptq(w: Tensor, hessian: Tensor, grid: Grid, damping: float, order: list[int]) -> np.ndarray:
    """GPTQ as the paper writes it, a column at a time with the inverse of H updated by Gaussian elimination."""
    weights = w.double().numpy()[:, order].copy()
    h = hessian.numpy()[np.ix_(order, order)]
    inverse = np.linalg.inv(h + damping * h.diagonal().mean() * np.eye(len(h)))
    scale, zero = (each.double().numpy() for each in grid.columns(len(h)))
    scale, zero = (np.broadcast_to(each[:, order], weights.shape) for each in (scale, zero))
    q = np.zeros_like(weights)
    for j in range(len(h)):
        column = np.round(weights[:, j] / scale[:, j]) + zero[:, j]
        q[:, j] = np.clip(column, grid.integers.low, grid.integers.high)
        error = weights[:, j] - scale[:, j] * (q[:, j] - zero[:, j])
        weights[:, j:] -= np.outer(error / inverse[j, j], inverse[j, j:])
        inverse -= np.outer(inverse[:, j], inverse[j, :]) / inverse[j, j]
    result = np.zeros_like(q)
    result[:, order] = q
    return result


# Feedback


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("factor", [1.0, 1e-20, 1e20])
def test_identity_is_rounding_to_nearest(order: str, symmetric: bool, factor: float) -> None:
    w = values(20, 24)
    w[0, :3] = torch.tensor([0.5, 1.5, -0.5])
    grid = choose(w, full(3), groups=3, symmetric=symmetric)
    h = torch.eye(24, dtype=torch.float64) * factor
    for passes in (0, 2):
        found = error_feedback(w, h, grid, order=order, passes=passes)
        assert torch.equal(found.integers, grid.quantize(w))
        assert found.integers.dtype == grid.integers.dtype
        assert not found.fell_back
        assert torch.equal(found.loss, found.nearest_loss)
    diagonal = torch.diag(values(24, seed=3).double().square()) * factor
    assert torch.equal(error_feedback(w, diagonal, grid, order=order).integers, grid.quantize(w))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_agrees_with_gptq_a_column_at_a_time(
    bits: int, groups: int, symmetric: bool, block: int
) -> None:
    w, h = values(30, 32), hessian_of(inputs(32, 200))
    grid = choose(w, full(bits), rule="mse", groups=groups, symmetric=symmetric)
    diagonal = h.diagonal()
    each = diagonal.reshape(groups, -1).mean(1)
    size = 32 // groups
    orders = {
        "none": list(range(32)),
        "activation": sorted(range(32), key=lambda j: -float(diagonal[j])),
        "group": sorted(
            range(32), key=lambda j: (-float(each[j // size]), j // size, -float(diagonal[j]))
        ),
    }
    for order, places in orders.items():
        expected = gptq(w, h, grid, 0.02, places)
        found = error_feedback(w, h, grid, damping=0.02, block=block, order=order)
        assert found.damping == 0.02
        loss = proxy_loss(w, torch.from_numpy(expected), h, grid)
        better = loss < found.nearest_loss
        assert int(better.sum()) >= 10
        assert np.array_equal(found.integers.numpy()[better], expected[better])
        assert torch.equal(found.integers[~better], grid.quantize(w)[~better])


def test_losses_are_those_of_the_outputs() -> None:
    x = inputs(16, 100)
    w = values(6, 16)
    grid = choose(w, full(3), groups=2)
    found = error_feedback(w, hessian_of(x), grid, passes=1)
    for q, loss in ((found.integers, found.loss), (grid.quantize(w), found.nearest_loss)):
        change = x.double() @ (w.double() - grid.dequantize(q).double()).T
        torch.testing.assert_close(loss, change.square().mean(0), rtol=1e-9, atol=0)


def test_no_row_is_worse_than_nearest() -> None:
    for seed in range(20):
        w = values(16, 12, seed=seed) ** 3
        h = hessian_of(inputs(12, 5 + seed, seed=seed))
        for order, groups in product(ORDERS, (1, 3)):
            grid = choose(w, full(2), rule="mse", groups=groups)
            found = error_feedback(w, h, grid, order=order, passes=seed % 2, refits=seed % 3)
            assert bool((found.loss <= found.nearest_loss).all())
            loss = proxy_loss(w, found.integers, h, found.grid)
            torch.testing.assert_close(loss, found.loss, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("groups", [1, 4])
def test_feedback_sweeps_and_refits_each_gain(bits: int, groups: int) -> None:
    """On correlated Gaussians the proxy loss falls by a third or more; sweeps and refits take a few per cent off that."""
    w, h = values(64, 128), hessian_of(inputs(128, 1000))
    grid = choose(w, full(bits), rule="mse", groups=groups)
    plain = error_feedback(w, h, grid)
    swept = error_feedback(w, h, grid, passes=3)
    refitted = error_feedback(w, h, grid, passes=3, refits=2)
    losses = [
        float(loss.sum()) for loss in (plain.nearest_loss, plain.loss, swept.loss, refitted.loss)
    ]
    assert losses[1] < 0.6 * losses[0]
    assert losses[2] < 0.99 * losses[1]
    assert losses[3] < losses[2]
    assert plain.grid is swept.grid is grid


def test_no_row_is_worse_where_the_loss_is_near_nothing() -> None:
    """Each weight with a scale of its own is exact but for float32, which decides whether a step gains anything."""
    for seed in range(40):
        w = values(7, 12, seed=seed) ** 9
        h = hessian_of(values(3, 12, seed=seed + 1) + 10)
        grid = choose(w, full(2), groups=12, symmetric=False)
        for order in ORDERS:
            found = error_feedback(w, h, grid, order=order, passes=2, refits=2)
            assert bool((found.loss <= found.nearest_loss).all())
            loss = proxy_loss(w, found.integers, h, found.grid)
            torch.testing.assert_close(loss, found.loss, rtol=1e-9, atol=1e-18)


# All integers of a tiny matrix


@pytest.mark.parametrize("n", [1, 2, 3])
def test_against_all_integers(n: int) -> None:
    every = torch.tensor(list(product(range(-2, 2), repeat=n)))
    best = 0
    for seed in range(60):
        w, h = values(1, n, seed=seed), hessian_of(inputs(n, 6, seed=seed))
        grid = choose(w, full(2), rule="mse")
        losses = proxy_loss(w.expand(len(every), n), every, h, grid)
        found = error_feedback(w, h, grid, passes=5)
        loss = float(found.loss)
        assert loss >= float(losses.min()) * (1 - 1e-9)
        # No other integer of any single weight is better.
        alone = (every != found.integers).sum(1) <= 1
        assert loss <= float(losses[alone].min()) * (1 + 1e-9)
        best += loss <= float(losses.min()) * (1 + 1e-9)
    assert best == 60 if n == 1 else best >= 50


# Second moments that are singular, dead, or none


def test_dead_inputs_round_to_nearest_and_do_not_disturb() -> None:
    w, x = values(10, 12), inputs(12, 50)
    dead = [0, 5, 11]
    x[:, dead] = 0
    alive = [j for j in range(12) if j not in dead]
    grid = choose(w, full(3))
    for damping in (0.0, 0.01):
        found = error_feedback(w, hessian_of(x), grid, damping=damping, passes=1)
        assert torch.equal(found.integers[:, dead], grid.quantize(w)[:, dead])
        assert found.damping == damping
        # As if they were not there; λ is in units of the mean diagonal of the inputs that are alive.
        without = error_feedback(
            w[:, alive], hessian_of(x[:, alive]), grid, damping=damping, passes=1
        )
        assert torch.equal(found.integers[:, alive], without.integers)


def test_no_inputs_at_all() -> None:
    w = values(4, 6)
    grid = choose(w, full(4))
    found = error_feedback(w, torch.zeros(6, 6), grid, passes=3, refits=2)
    assert torch.equal(found.integers, grid.quantize(w))
    assert "all inputs are 0" in found.fell_back
    assert found.loss.tolist() == [0.0] * 4


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_damping_grows_where_it_must(rank: int) -> None:
    w, h = values(12, 24), hessian_of(inputs(24, rank))
    grid = choose(w, full(3))
    for damping in (0.0, 1e-30):
        found = error_feedback(w, h, grid, damping=damping)
        assert 0 < found.damping < 1e-3
        assert not found.fell_back
        assert float(found.loss.sum()) < 0.9 * float(found.nearest_loss.sum())
    assert error_feedback(w, h, grid).damping == 0.01


def test_what_has_no_factor_falls_back_and_says_so() -> None:
    w = values(5, 3)
    h = torch.eye(3, dtype=torch.float64)
    h[0, 2] = h[2, 0] = 1e6
    grid = choose(w, full(3))
    found = error_feedback(w, h, grid, passes=1)
    assert torch.equal(found.integers, grid.quantize(w))
    assert found.fell_back.startswith("rounded to nearest: ")
    h[0, 2] = h[2, 0] = 1.5
    found = error_feedback(w, h, grid)
    assert 0.5 < found.damping < 10


def test_the_unit_of_the_second_moments_does_not_matter() -> None:
    w, h = values(8, 16), hessian_of(inputs(16, 60))
    grid = choose(w, full(3), groups=2)
    first = error_feedback(w, h, grid, passes=2, refits=1)
    for power in (-200, 200):
        other = error_feedback(w, h * 2.0**power, grid, passes=2, refits=1)
        assert torch.equal(other.integers, first.integers)
        assert torch.equal(other.grid.scale, first.grid.scale)


def test_chunks_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = values(50, 16), hessian_of(inputs(16, 60))
    for per_tensor in (False, True):
        grid = choose(w, full(3), groups=2, per_tensor=per_tensor)
        first = error_feedback(w, h, grid, passes=2, refits=1)
        with monkeypatch.context() as patch:
            patch.setattr("tinier.tensors.proxy_loss.CHUNK", 100)
            parts = error_feedback(w, h, grid, passes=2, refits=1)
        assert torch.equal(first.integers, parts.integers)
        torch.testing.assert_close(first.grid.scale, parts.grid.scale, rtol=1e-6, atol=0)


# Sweeps


def test_sweeps_are_coordinate_descent() -> None:
    """Against a loop over weights that tries every integer."""
    w, h = values(4, 9), hessian_of(inputs(9, 40))
    grid = choose(w, Integers.unsigned(3), groups=3, symmetric=False)
    start = grid.quantize(w)
    q = start.long()
    for passes in (1, 2, 3):
        for j in range(9):
            trials = torch.stack([q.clone() for _ in range(8)])
            trials[:, :, j] = torch.arange(8)[:, None]
            losses = torch.stack([proxy_loss(w, trial, h, grid) for trial in trials])
            q[:, j] = losses.argmin(0)
        for block in (2, 128):
            found = sweep(w, start, h, grid, passes=passes, block=block)
            assert torch.equal(found.long(), q)
    assert not torch.equal(q, start.long())


def test_sweeps_never_raise_a_loss_and_end() -> None:
    w, h = values(30, 40), hessian_of(inputs(40, 20))
    grid = choose(w, full(3), groups=5)
    q = grid.quantize(w)
    loss = proxy_loss(w, q, h, grid)
    for _ in range(4):
        q = sweep(w, q, h, grid)
        after = proxy_loss(w, q, h, grid)
        assert bool((after <= loss * (1 + 1e-9)).all())
        loss = after
    end = sweep(w, q, h, grid, passes=1000)
    assert torch.equal(sweep(w, end, h, grid), end)


# Scales


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_least_squares(symmetric: bool) -> None:
    x, w = values(80, 12, seed=1) @ values(12, 12, seed=2), values(7, 12)
    grid = choose(w, full(3), groups=3, symmetric=symmetric)
    grid = Grid(grid.scale * 0.8, grid.zero_point, grid.integers)
    q = grid.quantize(w)
    found = refit_scales(w, q, hessian_of(x), grid)
    steps = (q.long() - grid.columns(12)[1]).double()
    designs, wanted = [], []
    for row in range(7):
        parts = [x.double()[:, g * 4 : g * 4 + 4] @ steps[row, g * 4 : g * 4 + 4] for g in range(3)]
        designs.append(torch.stack(parts, 1))
        wanted.append(x.double() @ w[row].double())
        expected = torch.linalg.lstsq(designs[-1], wanted[-1][:, None]).solution[:, 0]
        assert bool((expected > 0).all())
        torch.testing.assert_close(found.scale[row].double(), expected, rtol=1e-5, atol=0)
    shared = Grid(grid.scale[:1], grid.zero_point[:1] * 0, grid.integers)
    q = shared.quantize(w)
    found = refit_scales(w, q, hessian_of(x), shared)
    rows = [
        torch.stack(
            [
                x.double()[:, g * 4 : g * 4 + 4] @ q[row, g * 4 : g * 4 + 4].double()
                for g in range(3)
            ],
            1,
        )
        for row in range(7)
    ]
    expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)[:, None]).solution[:, 0]
    torch.testing.assert_close(found.scale[0].double(), expected, rtol=1e-5, atol=0)


def test_true_scales_are_found_again() -> None:
    true = choose(values(6, 20), full(4), groups=4)
    q = true.quantize(values(6, 20))
    w = true.dequantize(q)
    wrong = Grid(true.scale * 1.3, true.zero_point, true.integers)
    found = refit_scales(w, q, hessian_of(inputs(20, 50)), wrong)
    torch.testing.assert_close(found.scale, true.scale, rtol=1e-5, atol=0)


def test_scales_stay_positive() -> None:
    """Integers whose best scale would be negative: the other group gets the best there is beside almost nothing."""
    h = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    w = torch.tensor([[1.0, -0.5]])
    grid = Grid(torch.tensor([[0.3, 0.2]]), torch.zeros(1, 2, dtype=torch.int64), full(4))
    q = torch.tensor([[4, 3]], dtype=torch.int8)
    found = refit_scales(w, q, h, grid)
    assert bool((found.scale > 0).all())
    trials = torch.cartesian_prod(torch.linspace(1e-3, 0.4, 400), torch.linspace(2e-4, 0.4, 400))
    many = Grid(trials, torch.zeros(len(trials), 2, dtype=torch.int64), full(4))
    count = len(trials)
    least = proxy_loss(w.expand(count, 2), q.expand(count, 2), h, many).min()
    assert float(proxy_loss(w, q, h, found)) <= float(least) * 1.001


def test_groups_without_integers_keep_their_scale() -> None:
    w = values(3, 8)
    grid = choose(w, full(3), groups=2)
    q = grid.quantize(w)
    q[:, :4] = 0
    found = refit_scales(w, q, hessian_of(inputs(8, 30)), grid)
    assert torch.equal(found.scale[:, 0], grid.scale[:, 0])
    assert not torch.equal(found.scale[:, 1], grid.scale[:, 1])
    nothing = refit_scales(w, q, torch.zeros(8, 8), grid)
    assert torch.equal(nothing.scale, grid.scale)


# Errors


def test_what_cannot_be_is_refused() -> None:
    w, h = values(3, 4), torch.eye(4, dtype=torch.float64)
    grid = choose(w, full(4))
    for bad in (float("nan"), float("inf")):
        broken = w.clone()
        broken[0, 0] = bad
        with pytest.raises(DataError, match="weights to quantize are not finite"):
            error_feedback(broken, h, grid)
        with pytest.raises(DataError, match="second moments are not finite"):
            error_feedback(w, h * bad, grid)
    with pytest.raises(DataError, match="negative"):
        error_feedback(w, -h, grid)
    with pytest.raises(InputError, match=r"weights of 4 inputs need \(4, 4\)"):
        error_feedback(w, torch.eye(3), grid)
    with pytest.raises(InputError, match="activation, group or none"):
        error_feedback(w, h, grid, order="best")
    for damping in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="of at least 0"):
            error_feedback(w, h, grid, damping=damping)
    with pytest.raises(InputError, match="block 0: a finite number of at least 1"):
        error_feedback(w, h, grid, block=0)
    with pytest.raises(InputError, match="does not fit"):
        error_feedback(values(5, 4), h, grid)
    with pytest.raises(InputError, match="matrix"):
        error_feedback(values(4), h, grid)
