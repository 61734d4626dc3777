"""Grids of weight matrices against the affine formulas, dense searches and closed forms."""

from itertools import product

import pytest
import torch

from tinier.errors import DataError, InputError
from tinier.tensors import affine
from tinier.tensors.affine import Integers
from tinier.tensors.grid import RULES, Grid, choose, group_count

FULL = Integers(-8, 7)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(w: torch.Tensor, grid: Grid, h: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Σ h (w − ŵ)² of each cell, (m, G) float64."""
    e = (w.double() - grid.nearest(w).double()).square() * h
    return e.reshape(w.shape[0], grid.scale.shape[1], -1).sum(-1)


# The grid itself


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_group_is_affine_quantization_per_channel(bits: int, symmetric: bool) -> None:
    w = values(9, 40) * torch.logspace(-3, 3, 9)[:, None]
    integers = Integers.signed(bits) if symmetric else Integers.unsigned(bits)
    grid = choose(w, integers, symmetric=symmetric)
    if symmetric:
        scale = affine.symmetric(w.abs().amax(1), integers)
        zero_point = torch.zeros(9, dtype=torch.int64)
    else:
        scale, zero_point = affine.asymmetric(w.amin(1), w.amax(1), integers)
    assert torch.equal(grid.scale[:, 0], scale)
    assert torch.equal(grid.zero_point[:, 0], zero_point)
    q = affine.quantize(w, scale, zero_point, integers, 0)
    assert torch.equal(grid.quantize(w), q)
    assert grid.quantize(w).dtype == integers.dtype
    assert torch.equal(grid.dequantize(q), affine.dequantize(q, scale, zero_point, 0))
    assert torch.equal(grid.nearest(w), affine.fake_quantize(w, scale, zero_point, integers, 0))


def test_groups_are_matrices_side_by_side() -> None:
    w = values(6, 30)
    for rule, symmetric in product(RULES, (True, False)):
        whole = choose(w, Integers.unsigned(3), rule=rule, symmetric=symmetric, groups=5)
        assert whole.scale.shape == (6, 5)
        for group, part in enumerate(w.split(6, 1)):
            alone = choose(part, Integers.unsigned(3), rule=rule, symmetric=symmetric)
            assert torch.equal(whole.scale[:, group], alone.scale[:, 0])
            assert torch.equal(whole.nearest(w).split(6, 1)[group], alone.nearest(part))
    scale, zero_point = whole.columns(30)
    assert torch.equal(scale[:, 12:18], whole.scale[:, 2:3].expand(6, 6))
    assert torch.equal(zero_point[:, 12:18], whole.zero_point[:, 2:3].expand(6, 6))


def test_halves_round_to_even() -> None:
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), FULL)
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 90.0, -90.0]])
    assert grid.quantize(w).tolist() == [[0, 2, 2, 0, -2, 7, -8]]


def test_grids_and_matrices_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="both need the shape"):
        Grid(torch.ones(3), torch.zeros(3, dtype=torch.int64), FULL)
    grid = choose(values(4, 6), FULL, groups=3)
    for shape in ((5, 6), (4, 8), (6,)):
        with pytest.raises(InputError, match="does not fit"):
            grid.quantize(torch.zeros(shape))


# Rules


def test_one_scale_for_all_rows() -> None:
    w = values(7, 12)
    for rule, symmetric in product(RULES, (True, False)):
        grid = choose(
            w, Integers.unsigned(4), rule=rule, groups=3, per_tensor=True, symmetric=symmetric
        )
        assert grid.scale.shape == grid.zero_point.shape == (1, 3)
        for group, part in enumerate(w.split(4, 1)):
            alone = choose(
                part.reshape(1, -1), Integers.unsigned(4), rule=rule, symmetric=symmetric
            )
            assert torch.equal(grid.scale[:, group], alone.scale[:, 0])


def test_min_max_clips_nothing_and_uses_the_longer_reach() -> None:
    w = values(50, 20)
    grid = choose(w, FULL)
    assert bool(((grid.nearest(w) - w).abs() <= grid.scale * 0.50001).all())
    w = torch.tensor([[-8.0, 3.0], [8.0, 3.0]])
    assert choose(w, FULL).scale[:, 0].tolist() == pytest.approx([1.0, 8 / 7])
    middle = choose(w, Integers.unsigned(4))
    assert middle.zero_point[:, 0].tolist() == [8, 8]
    assert torch.equal(middle.nearest(w), choose(w, FULL).nearest(w))


def test_percentile_clips_to_it() -> None:
    w = torch.arange(-100, 101).float()[None]
    expected = torch.quantile(w.abs(), 0.95)
    grid = choose(w, Integers.signed(8), rule="percentile", percentile=95)
    assert float(grid.scale * 127) == pytest.approx(float(expected))
    mostly_zero = torch.zeros(1, 1000)
    mostly_zero[0, 3] = 5.0
    grid = choose(mostly_zero, Integers.signed(8), rule="percentile", percentile=99)
    assert grid.nearest(mostly_zero)[0, 3] == pytest.approx(5.0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("power", [1, 3])
def test_mse_is_never_worse_than_the_other_rules(bits: int, symmetric: bool, power: int) -> None:
    w = values(8, 64) ** power
    for h in (None, values(64, seed=1).square(), values(8, 64, seed=2).square()):
        for integers in (Integers.signed(bits), Integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)):
            best = choose(w, integers, rule="mse", groups=2, symmetric=symmetric, importance=h)
            found = error(w, best, 1.0 if h is None else h)
            for rule in ("minmax", "percentile"):
                other = choose(w, integers, rule=rule, groups=2, symmetric=symmetric)
                worse = error(w, other, 1.0 if h is None else h)
                assert found.sum() < worse.sum()
                assert rule != "minmax" or bool((found <= worse * (1 + 1e-6)).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_mse_finds_the_scale_of_a_dense_search(bits: int, full: bool, weighted: bool) -> None:
    w = values(20, 32) ** 2 * values(20, 32, seed=3).sign()
    h = values(32, seed=4).square() if weighted else torch.ones(32)
    top = 2 ** (bits - 1) - 1
    integers = Integers(-top - 1 if full else -top, top)
    found = error(w, choose(w, integers, rule="mse", importance=h if weighted else None), h)
    least = torch.full_like(found, torch.inf)
    most = w.abs().amax(1, keepdim=True)
    zero_point = torch.zeros(20, 1, dtype=torch.int64)
    for step in range(1, 3000):
        least = torch.minimum(least, error(w, Grid(most * step / 2000, zero_point, integers), h))
    assert float((found / least).max()) < 1.03
    assert float((found / least).mean()) < 1.003


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", ["skewed", "outlier", "positive", "normal"])
def test_mse_finds_the_ends_of_a_dense_search(bits: int, shape: str) -> None:
    w = values(12, 48)
    w = {"skewed": w.exp(), "outlier": w, "positive": w.abs() + 0.5, "normal": w}[shape]
    if shape == "outlier":
        w[:, 0] = 15.0
    integers = Integers.unsigned(bits)
    found = error(w, choose(w, integers, rule="mse", symmetric=False))
    least = torch.full_like(found, torch.inf)
    most = w.abs().amax(1, keepdim=True)
    for zero_point in range(integers.low, integers.high + 1):
        z = torch.full((12, 1), zero_point)
        for step in range(1, 400):
            least = torch.minimum(least, error(w, Grid(most * step / 400, z, integers)))
    assert float((found / least).max()) < 1.08
    assert float((found / least).mean()) < 1.02


def test_importance_counts_by_ratio_and_ignores_what_has_none() -> None:
    w = values(5, 16)
    h = values(16, seed=1).square()
    grids = [
        choose(w, Integers.signed(3), rule="mse", importance=h * factor).scale
        for factor in (1.0, 2.0**-60, 2.0**60)
    ]
    assert torch.equal(grids[0], grids[1])
    assert torch.equal(grids[0], grids[2])
    rows = choose(w, Integers.signed(3), rule="mse", importance=h.expand(5, 16))
    assert torch.equal(rows.scale, grids[0])
    nothing = choose(w, Integers.signed(3), rule="mse", importance=torch.zeros(16))
    assert torch.equal(nothing.scale, choose(w, Integers.signed(3), rule="mse").scale)
    h = torch.zeros(16)
    h[[2, 5]] = 1.0
    used = choose(w, Integers.signed(3), rule="mse", importance=h)
    alone = choose(w[:, [2, 5]], Integers.signed(3), rule="mse")
    torch.testing.assert_close(error(w, used, h), error(w[:, [2, 5]], alone), rtol=0.01, atol=1e-6)
    tensor = choose(w, Integers.signed(3), rule="mse", importance=h, per_tensor=True)
    flat = choose(w.reshape(1, -1), Integers.signed(3), rule="mse", importance=h.repeat(5))
    assert torch.equal(tensor.scale, flat.scale)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_constants_zeros_and_extremes(rule: str, symmetric: bool) -> None:
    w = torch.zeros(6, 8)
    w[1] = 2.7
    w[2] = -0.3
    w[3, :4] = 1e-30
    w[4] = 1e30
    if rule != "percentile":  # which clips it
        w[5, 7] = 4.0
    for integers in (Integers.signed(4), FULL, Integers.unsigned(4)):
        for groups in (1, 2, 8):
            grid = choose(w, integers, rule=rule, groups=groups, symmetric=symmetric)
            assert bool(torch.isfinite(grid.scale).all())
            assert bool((grid.scale > 0).all())
            assert bool((grid.zero_point >= integers.low).all())
            assert bool((grid.zero_point <= integers.high).all())
            torch.testing.assert_close(grid.nearest(w), w, rtol=1e-6, atol=1e-15)
    zeros = choose(torch.zeros(2, 4), FULL, rule=rule, symmetric=symmetric)
    assert zeros.scale.tolist() == [[1.0], [1.0]]


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = values(10, 60), values(60, seed=1).square()
    for symmetric, per_tensor in product((True, False), repeat=2):

        def found(symmetric: bool = symmetric, per_tensor: bool = per_tensor) -> Grid:
            return choose(
                w,
                FULL,
                rule="mse",
                groups=3,
                symmetric=symmetric,
                per_tensor=per_tensor,
                importance=h,
            )

        whole = found()
        with monkeypatch.context() as patch:
            for module in ("grid", "grid_search"):
                patch.setattr(f"tinier.tensors.{module}.CHUNK", 70)
            parts = found()
        torch.testing.assert_close(whole.scale, parts.scale, rtol=1e-6, atol=0)
        assert torch.equal(whole.zero_point, parts.zero_point)


# Errors


def test_group_sizes_that_would_do_are_named() -> None:
    assert group_count(200, 40) == 5
    with pytest.raises(
        InputError, match="group size 128 does not divide 200 inputs; use 8, 40 or 100"
    ):
        group_count(200, 128)
    with pytest.raises(InputError, match="group size 4 does not divide 7 inputs; use 1 or 7"):
        group_count(7, 4)
    with pytest.raises(InputError, match="group size 0 "):
        group_count(8, 0)
    with pytest.raises(InputError, match="5 groups do not divide 32 inputs; use 4 or 8 groups"):
        choose(values(2, 32), FULL, groups=5)


def test_what_cannot_be_is_refused() -> None:
    w = values(3, 8)
    for bad in (float("nan"), float("inf")):
        broken = w.clone()
        broken[1, 2] = bad
        with pytest.raises(DataError, match="not finite"):
            choose(broken, FULL)
        with pytest.raises(DataError, match="importance"):
            choose(w, FULL, rule="mse", importance=torch.full((8,), bad))
    with pytest.raises(DataError, match="negative"):
        choose(w, FULL, rule="mse", importance=-torch.ones(8))
    with pytest.raises(InputError, match="need \\(8,\\)"):
        choose(w, FULL, rule="mse", importance=torch.ones(3))
    with pytest.raises(InputError, match="squared errors"):
        choose(w, FULL, importance=torch.ones(8))
    with pytest.raises(InputError, match="minmax, percentile or mse"):
        choose(w, FULL, rule="best")
    with pytest.raises(InputError, match="percentile"):
        choose(w, FULL, rule="percentile", percentile=0)
    with pytest.raises(InputError, match="matrix"):
        choose(torch.zeros(0, 4), FULL)
    with pytest.raises(InputError, match="at least 3"):
        choose(w, Integers(0, 1))
