"""Codebooks against brute force and textbook k-means; levels around the median against min–max."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from tinier.errors import DataError, InputError
from tinier.tensors import clustering
from tinier.tensors.affine import Integers, asymmetric, fake_quantize, symmetric
from tinier.tensors.clustering import codebook, median_centred, nearest


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def laplace(count: int) -> Tensor:
    u = torch.rand(count, generator=torch.Generator().manual_seed(1)) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


def pruned(x: Tensor, share: float) -> Tensor:
    return torch.where(x.abs() < x.abs().quantile(share), 0.0, x)


def loss(x: Tensor, centres: Tensor, labels: Tensor, h: Tensor | None = None) -> float:
    h = torch.ones_like(x) if h is None else h
    return float((h.double() * (x.double() - centres.double()[labels.long()]).square()).sum())


def least(x: np.ndarray, h: np.ndarray, k: int, pin: bool) -> float:
    """The oracle: all ways to cut the sorted values into at most k intervals; with ``pin`` the one that has 0 keeps the centre 0."""
    order = np.argsort(x)
    x, h = x[order], h[order]
    best = np.inf
    for count in range(1, k + 1):
        for cuts in combinations(range(1, len(x)), count - 1):
            total = 0.0
            for a, b in zip((0, *cuts), (*cuts, len(x)), strict=True):
                zero = pin and bool((x[a:b] == 0).any())
                centre = 0.0 if zero else np.average(x[a:b], weights=h[a:b])
                total += float((h[a:b] * (x[a:b] - centre) ** 2).sum())
            best = min(best, total)
    return best


class TestCodebook:
    @pytest.mark.parametrize("k", [1, 2, 3, 4])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_exact(self, k: int, weighted: bool) -> None:
        for seed in range(5):
            x = normal(10, seed=seed)
            h = normal(10, seed=seed + 50).square() if weighted else torch.ones(10)
            centres, labels = codebook(x, k, h if weighted else None)
            assert len(centres) == k
            wanted = least(x.double().numpy(), h.double().numpy(), k, pin=False)
            if weighted:  # labels go to the nearest centre, whatever the weights: that is no worse
                assert loss(x, centres, labels, h) <= wanted * (1 + 1e-6) + 1e-12
            assert loss(x, centres, labels, h) == pytest.approx(wanted, rel=1e-5, abs=1e-12)

    @pytest.mark.parametrize("k", [2, 3, 4])
    def test_exact_with_zero(self, k: int) -> None:
        for seed in range(5):
            x = torch.cat([normal(6, seed=seed) + 0.3, torch.zeros(6)])
            centres, labels = codebook(x, k)
            assert (centres == 0).sum() == 1
            assert centres[labels.long()][6:].tolist() == [0.0] * 6
            wanted = least(x.double().numpy(), np.ones(12), k, pin=True)
            assert loss(x, centres, labels) == pytest.approx(wanted, rel=1e-5)

    @pytest.mark.parametrize("start", ["linear", "quantiles"])
    @pytest.mark.parametrize("share", [0.0, 0.6])
    def test_no_start_of_textbook_k_means_is_better(self, start: str, share: float) -> None:
        for x in (normal(20_000), laplace(20_000), torch.exp(normal(20_000))):
            x = pruned(x, share) if share else x
            values = x.double().numpy()
            centres = (
                np.linspace(values.min(), values.max(), 16)
                if start == "linear"
                else np.unique(np.quantile(values, (np.arange(16) + 0.5) / 16))
            )
            if share:  # the textbook's pruned network has its zeros beside the codebook
                centres = np.unique(np.append(centres[np.abs(centres).argsort()[1:16]], 0.0))
            for _ in range(100):
                labels = np.abs(values[:, None] - centres).argmin(1)
                counts = np.maximum(np.bincount(labels, minlength=len(centres)), 1)
                moved = np.bincount(labels, values, len(centres)) / counts
                centres = np.sort(np.where((centres == 0) & bool(share), 0.0, moved))
            theirs = float((np.abs(values[:, None] - centres).min(1) ** 2).sum())
            assert loss(x, *codebook(x, 16)) <= theirs * 1.0001

    def test_cells_lose_nothing_that_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = torch.cat([laplace(3000), torch.tensor([40.0, -55.0])])
        coarse = loss(x, *codebook(x, 8))
        monkeypatch.setattr(clustering, "CELLS", 4000)  # every value a cell: exact
        exact = loss(x, *codebook(x, 8))
        assert exact <= coarse <= exact * 1.001

    def test_as_many_centres_as_values_change_nothing(self) -> None:
        for x in (normal(7, 3), torch.tensor([0.0, 0, 2, 2, -1]), torch.zeros(4), normal(256)):
            centres, labels = codebook(x, min(len(x.unique()), 256))
            assert torch.equal(centres[labels.long()], x)
            assert labels.dtype == torch.uint8 and labels.shape == x.shape
            # Importance or more centres than values make no difference.
            more, again = codebook(x, 256, torch.rand(x.shape) + 0.1)
            assert torch.equal(more[again.long()], x)

    def test_centres_are_used_ascending_and_of_the_type_of_the_values(self) -> None:
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            for x in (normal(3000) * 1e-3, normal(3000) + 100, torch.exp(9 * normal(3000))):
                x = x.to(dtype).clamp(-6e4, 6e4)
                centres, labels = codebook(x, 40)
                assert centres.dtype == dtype and bool((centres.diff() > 0).all())
                assert labels.unique().tolist() == list(range(len(centres)))

    def test_one_value_among_many(self) -> None:
        x = torch.cat([torch.full((5000,), 0.25), normal(2)])
        centres, labels = codebook(x, 2)
        assert len(centres) == 2 and labels[:5000].unique().numel() == 1

    def test_importance_moves_centres_there(self) -> None:
        x, h = normal(4000), torch.ones(4000)
        h[x > 1] = 100
        plain, weighted = codebook(x, 8), codebook(x, 8, h)
        assert (weighted[0] > 1).sum() > (plain[0] > 1).sum()
        assert loss(x, *weighted, h) < loss(x, *plain, h)
        assert loss(x, *weighted) > loss(x, *plain)

    def test_importance_of_zero(self) -> None:
        x, h = normal(3000), torch.zeros(3000)
        assert torch.equal(codebook(x, 8, h)[0], codebook(x, 8)[0])  # nothing said, nothing weighed
        h[:5] = 1  # fewer weights that count than clusters: they are kept exactly
        centres, labels = codebook(x, 8, h)
        torch.testing.assert_close(centres[labels.long()][:5], x[:5], rtol=1e-6, atol=0)

    def test_few_zeros_are_weights_like_others(self) -> None:
        x = torch.cat([normal(5000) + 3, torch.zeros(3)])
        assert 0.0 not in codebook(x, 4)[0].tolist()

    def test_refusals(self) -> None:
        for clusters in (0, 257, True):
            with pytest.raises(InputError, match="1 to 256"):
                codebook(normal(4), clusters)
        with pytest.raises(DataError, match="finite"):
            codebook(torch.tensor([1.0, float("nan")]), 2)
        with pytest.raises(DataError, match="finite"):
            codebook(torch.arange(4), 2)
        with pytest.raises(DataError, match="none"):
            codebook(torch.zeros(0), 2)
        with pytest.raises(InputError, match=r"shape \(3,\)"):
            codebook(normal(4), 2, torch.ones(3))
        with pytest.raises(InputError, match="negative"):
            codebook(normal(4), 2, -torch.ones(4))


class TestNearest:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_nearest_is_nearest(self, dtype: torch.dtype) -> None:
        centres = torch.unique(normal(40).to(dtype))
        x = normal(30, 50, seed=3).to(dtype)
        distance = (x.double()[..., None] - centres.double()).abs()
        found = distance.gather(-1, nearest(x, centres).long()[..., None])[..., 0]
        assert torch.equal(found, distance.amin(-1))

    def test_a_centre_is_its_own(self) -> None:
        one = torch.tensor(1.0, dtype=torch.float64)
        close = torch.stack([one, torch.nextafter(one, one * 2), torch.nextafter(one, one * 0)])
        centres = torch.cat(
            [close, torch.tensor([-1e300, 0.0, 5e-324, 1e300], dtype=torch.float64)]
        ).unique()
        assert nearest(centres, centres).tolist() == list(range(len(centres)))
        assert nearest(torch.tensor([0.5]), torch.tensor([0.0, 1.0])).tolist() == [0]  # half-way

    def test_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, centres = normal(1000), normal(9).sort().values
        whole = nearest(x, centres)
        monkeypatch.setattr(clustering, "_CHUNK", 7)
        assert torch.equal(nearest(x, centres), whole)


class TestMedianCentred:
    def test_closed_form(self) -> None:
        x = torch.tensor([1.0, 2, 3, 4, 5])
        found = median_centred(x, 3)  # −3 … 3
        assert found.median.tolist() == [3.0] and found.integers.dtype == torch.int8
        torch.testing.assert_close(found.values(), x)

    def test_a_shift_changes_nothing(self) -> None:
        x = laplace(5001)
        one, other = median_centred(x, 4), median_centred(x + 64, 4)
        assert (one.integers != other.integers).float().mean() < 1e-3  # by the rounding of x + 64
        torch.testing.assert_close(one.median + 64, other.median)

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_each_channel_alone(self, axis: int) -> None:
        x = normal(4, 5, 6) + torch.arange(4.0)[:, None, None]
        found = median_centred(x, 4, axis)
        assert found.integers.shape == x.shape and found.scale.shape == (x.shape[axis],)
        for channel in range(x.shape[axis]):
            alone = median_centred(x.select(axis, channel), 4)
            torch.testing.assert_close(found.values().select(axis, channel), alone.values())

    @pytest.mark.parametrize("bits", [3, 4])
    def test_against_min_max(self, bits: int) -> None:
        """Min–max pays for the tails of Gauss and Laplace, and symmetric levels around 0 for a skewed or shifted distribution."""
        levels, signed = Integers.unsigned(bits), Integers.signed(bits)
        for x in (normal(20_000), laplace(20_000), torch.exp(normal(20_000) / 2), normal(9000) + 3):
            ends = asymmetric(*x.aminmax(), levels)
            minmax = fake_quantize(x, *ends, levels)
            around0 = fake_quantize(x, symmetric(x.abs().max(), signed), torch.tensor(0), signed)
            ours, wide, zero = (
                float((made - x).square().mean())
                for made in (median_centred(x, bits).values(), minmax, around0)
            )
            assert ours < 0.85 * wide and ours < 0.55 * zero
            assert (
                loss(x, *codebook(x, 2**bits)) / len(x) < 0.85 * ours
            )  # levels that are not uniform

    def test_refusals(self) -> None:
        with pytest.raises(InputError, match="2 to 8"):
            median_centred(normal(4), 1)
        with pytest.raises(DataError, match="finite"):
            median_centred(torch.tensor([float("inf")]), 4)
