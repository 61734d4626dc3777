"""Half-quadratic quantization against a loop in float64, its objective, and grids that are known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tinier.errors import DataError, InputError
from tinier.tensors.affine import Integers
from tinier.tensors.grid import Grid, choose
from tinier.tensors.hqq import hqq


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def full(bits: int) -> Integers:
    return Integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def objective(w: Tensor, grid: Grid, p: float = 0.7) -> Tensor:
    """Σ |w − ŵ|^p of each cell, (m, G) float64."""
    e = (w - grid.nearest(w)).double().abs().pow(p)
    return e.reshape(len(w), grid.scale.shape[1], -1).sum(-1)


def reference(
    w: np.ndarray, scale: float, zero: int, integers: Integers, p: float, steps: int, move: bool
) -> tuple[float, int]:
    """The algorithm for one cell."""

    def quantized(s: float, z: float) -> np.ndarray:
        return np.clip(np.round(w / s + z), integers.low, integers.high)

    best = (scale, zero)

    def loss(s: float, z: int) -> float:
        steps_of = np.clip(np.round(w / s) + z, integers.low, integers.high) - z
        return float((np.abs(w - s * steps_of) ** p).sum())

    def run(z: float, free: bool) -> float:
        nonlocal best
        s, beta = scale, 10.0
        for _ in range(steps):
            q = quantized(s, z)
            r = (w - s * (q - z)) / scale
            e = np.zeros_like(r)
            for i, x in enumerate(r):
                if x != 0:
                    e[i] = np.sign(x) * max(abs(x) - abs(x) ** (p - 1) / beta, 0)
            target = w - e * scale
            if free:
                z = float((q - target / s).mean())
            bottom = float(((q - z) ** 2).sum())
            if bottom > 0 and float((target * (q - z)).sum()) > 0:
                s = float((target * (q - z)).sum()) / bottom
            beta *= 1.01
            if not free and loss(s, round(z)) < loss(*best):
                best = (s, round(z))
        return z

    places = [zero]
    if move:
        z = run(zero, True)
        places += [int(np.clip(f(z), integers.low, integers.high)) for f in (np.floor, np.ceil)]
    for place in places:
        if loss(scale, place) < loss(*best):
            best = (scale, place)
        run(place, False)
    return best


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
def test_agrees_with_a_loop(bits: int, symmetric: bool, p: float) -> None:
    w = values(4, 48) ** 3
    grid = choose(w, full(bits), groups=2, symmetric=symmetric)
    found = hqq(w, grid, p=p, steps=12)
    expected, zeros = torch.zeros_like(grid.scale), torch.zeros_like(grid.zero_point)
    for row in range(4):
        for group in range(2):
            scale, zero = reference(
                w[row, group * 24 : group * 24 + 24].double().numpy(),
                float(grid.scale[row, group]),
                int(grid.zero_point[row, group]),
                grid.integers,
                p,
                12,
                not symmetric,
            )
            if p < 1:  # where p is 1 many scales have the same sum
                assert float(found.scale[row, group]) == pytest.approx(scale, rel=1e-4)
                assert int(found.zero_point[row, group]) == zero
            expected[row, group], zeros[row, group] = scale, zero
    sums = objective(w, Grid(expected, zeros, grid.integers), p)
    torch.testing.assert_close(objective(w, found, p), sums, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rule", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_never_worse_than_the_start(bits: int, rule: str, symmetric: bool) -> None:
    w = values(10, 64) ** 3 * 0.01
    grid = choose(w, full(bits), rule=rule, groups=4, symmetric=symmetric)
    for scales, zero_points in ((True, None), (False, None), (True, True), (True, False)):
        found = hqq(w, grid, scales=scales, zero_points=zero_points)
        assert bool((objective(w, found) <= objective(w, grid) * (1 + 1e-6)).all())
        assert found.scale.dtype == torch.float32
        assert found.zero_point.dtype == torch.int64
        if not scales:
            assert torch.equal(found.scale, grid.scale)
        if zero_points is False or (symmetric and zero_points is None):
            assert torch.equal(found.zero_point, grid.zero_point)
    if bits < 8:
        assert float(objective(w, hqq(w, grid)).sum()) < float(objective(w, grid).sum())


def test_the_sum_falls_by_a_tenth() -> None:
    w = values(16, 256)
    for symmetric in (True, False):
        grid = choose(w, full(3), groups=2, symmetric=symmetric)
        assert objective(w, hqq(w, grid)).sum() < 0.9 * objective(w, grid).sum()


def test_zero_points_move_where_that_is_better() -> None:
    w = values(10, 64).exp()
    grid = choose(w, Integers.unsigned(3), symmetric=False)
    off = Grid(grid.scale, grid.zero_point + 2, grid.integers)
    found = hqq(w, off, scales=False)
    assert float(objective(w, found).sum()) < 0.98 * float(objective(w, off).sum())
    assert bool((found.zero_point <= off.zero_point).all())
    assert int((found.zero_point < off.zero_point).sum()) >= 7


def test_an_outlier_does_not_pull_the_scale() -> None:
    """Weights on a grid but for one outlier: least squares leaves the grid, the lp norm stays on it."""
    true = Grid(torch.full((5, 1), 0.1), torch.zeros(5, 1, dtype=torch.int64), full(4))
    w = true.nearest(values(5, 60) * 0.3)
    w[:, 7] = 1.2
    start = Grid(true.scale * 1.02, true.zero_point, true.integers)
    found = hqq(w, start, steps=60, p=0.5)
    torch.testing.assert_close(found.scale, true.scale, rtol=1e-3, atol=0)
    squares = choose(w, full(4), rule="mse")
    assert bool(((squares.scale - 0.1).abs() > 2e-3).all())


def test_units_do_not_matter() -> None:
    w = values(6, 32) ** 3
    grid = choose(w, full(3), groups=2, symmetric=False)
    found = hqq(w, grid)
    for power in (-30, 30):
        other = hqq(w * 2.0**power, Grid(grid.scale * 2.0**power, grid.zero_point, grid.integers))
        assert torch.equal(other.scale, found.scale * 2.0**power)
        assert torch.equal(other.zero_point, found.zero_point)


def test_one_grid_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    w = values(6, 32) ** 3
    shared = choose(w, full(3), groups=2, per_tensor=True)
    found = hqq(w, shared)
    for group, part in enumerate(w.split(16, 1)):
        alone = choose(part.reshape(1, -1), full(3))
        assert torch.equal(found.scale[0, group], hqq(part.reshape(1, -1), alone).scale[0, 0])
    grid = choose(w, full(3), groups=2)
    whole = hqq(w, grid)
    monkeypatch.setattr("tinier.tensors.hqq.CHUNK", 40)
    assert torch.equal(whole.scale, hqq(w, grid).scale)


def test_zeros_and_constants_stay_exact() -> None:
    w = torch.zeros(3, 8)
    w[1] = 0.7
    w[2, 0] = -3.0
    for symmetric in (True, False):
        grid = choose(w, full(4), symmetric=symmetric)
        found = hqq(w, grid)
        assert bool(torch.isfinite(found.scale).all())
        torch.testing.assert_close(found.nearest(w), w, rtol=1e-6, atol=0)


def test_what_cannot_be_is_refused() -> None:
    w = values(3, 8)
    grid = choose(w, full(4))
    for p, beta, growth in (
        (0.0, 10, 1),
        (1.5, 10, 1),
        (0.7, 0, 1),
        (0.7, float("nan"), 1),
        (0.7, 10, 0.5),
    ):
        with pytest.raises(InputError, match="are needed"):
            hqq(w, grid, p=p, beta=beta, growth=growth)
    with pytest.raises(InputError, match="steps 0"):
        hqq(w, grid, steps=0)
    with pytest.raises(InputError, match="does not fit"):
        hqq(values(4, 8), grid)
    w[0, 0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        hqq(w, grid)
