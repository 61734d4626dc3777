"""The proof that no 16-bit sum saturates against that arithmetic, and the repair against a search through all scales."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinier.methods.quantization import Quantization
from tinier.network import Network
from tinier.statistics import collect, observe
from tinier.tensors.affine import Integers, quantize, symmetric
from tinier.tensors.saturation import PAIR_LIMIT, lowered, pair_sums, without_saturation

ZERO = torch.zeros((), dtype=torch.int64)
BYTES = Integers.signed(8)
SHAPES = [(6, 5, 3, 3), (6, 4, 3, 3), (6, 1, 3, 3), (4, 9), (3, 1), (5, 4, 7), (5, 3, 1, 1)]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs_of(weight: Tensor) -> list[list[tuple[int, int]]]:
    """The pairs of each channel, written out place by place."""
    found = []
    for channel in weight:
        places = channel.reshape(len(channel), -1).T.tolist()  # (window, inputs)
        whole = [value for place in places for value in place]
        rows = [whole, *places]
        found.append([tuple([*row, 0][i : i + 2]) for row in rows for i in range(0, len(row), 2)])
    return found


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


@pytest.mark.parametrize("shape", SHAPES)
def test_pair_sums_are_those_of_the_pairs(shape: tuple[int, ...]) -> None:
    q = (values(*shape) * 60).round().clamp(-127, 127).to(torch.int8)
    expected = [max(abs(a) + abs(b) for a, b in pairs) for pairs in pairs_of(q)]
    assert pair_sums(q).tolist() == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_repaired_weights_never_saturate(shape: tuple[int, ...]) -> None:
    weight = values(*shape)
    weight[0] *= 0.0
    if weight[0].numel() > 2:
        weight[1] = 0.01
        weight[1].view(-1)[0] = 1.0  # one large weight with small neighbours needs no repair
    before = symmetric(weight.flatten(1).abs().amax(1), BYTES)
    after, repaired = without_saturation(weight, before, BYTES)
    q = quantize(weight, after, ZERO, BYTES, 0)
    for pairs in pairs_of(q):
        for pair in pairs:
            for a in ([255, 255], [255, 0], [0, 255]):
                assert saturating_pair(a, [*pair]) == a[0] * pair[0] + a[1] * pair[1]
    kept = [channel for channel in range(shape[0]) if channel not in repaired]
    assert torch.equal(after[kept], before[kept])
    assert bool((after[list(repaired)] > before[list(repaired)]).all())
    assert 0 not in repaired
    if weight[0].numel() > 2:
        assert 1 not in repaired


@pytest.mark.parametrize("clipping", [1.0, 0.6])
@pytest.mark.parametrize("shape", [(8, 3, 2, 2), (8, 6), (8, 16)])
def test_the_repair_is_the_smallest_that_is_enough(shape: tuple[int, ...], clipping: float) -> None:
    """Integers change only where a weight is half a step off: every such scale is tried, and the number just below the repair."""
    weight = values(*shape, seed=1) * 0.03
    before = symmetric(weight.flatten(1).abs().amax(1) * clipping, BYTES)
    after, repaired = without_saturation(weight, before, BYTES)
    assert len(repaired) > 4
    for channel in repaired:
        one = weight[channel : channel + 1]
        halves = torch.arange(0, 128).double() + 0.5
        edges = (one.flatten().abs().double()[:, None] / halves).flatten()
        candidates = torch.cat([before[channel, None].double(), edges[edges >= before[channel]]])
        # Just above an edge the integer has fallen.
        candidates = (candidates.sort().values * (1 + 2**-22)).float()
        enough = [
            bool(pair_sums(quantize(one, scale[None], ZERO, BYTES, 0)) <= PAIR_LIMIT)
            for scale in candidates
        ]
        smallest = candidates[enough.index(True)]
        assert float(after[channel]) == pytest.approx(float(smallest), rel=2**-20)
        below = torch.nextafter(after[channel], torch.tensor(0.0))
        assert int(pair_sums(quantize(one, below[None], ZERO, BYTES, 0))) > PAIR_LIMIT


def test_weights_that_do_not_saturate_keep_their_scales() -> None:
    weight = values(4, 6, 3, 3)
    scale = weight.flatten(1).abs().amax(1) / (PAIR_LIMIT // 2)
    after, repaired = without_saturation(weight, scale, BYTES)
    assert repaired == ()
    assert torch.equal(after, scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_lowered_integers_change_by_what_is_above_the_limit(shape: tuple[int, ...]) -> None:
    q = (values(*shape, seed=2) * 60).round().clamp(-127, 127).to(torch.int8)
    low = lowered(q)
    assert low.dtype == q.dtype
    assert bool((pair_sums(low) <= PAIR_LIMIT).all())
    assert bool((low.abs() <= q.abs()).all())
    assert bool((low.int() * q.int() >= 0).all())
    for old, new in zip(pairs_of(q), pairs_of(low), strict=True):
        whole = q[0].numel() + q[0].numel() % 2
        if q.shape[1] % 2 == 0 or q[0].numel() == q.shape[1]:  # each weight is in one pair
            for (a, b), (c, d) in zip(old[: whole // 2], new[: whole // 2], strict=True):
                assert abs(c) + abs(d) == min(abs(a) + abs(b), PAIR_LIMIT)
    assert torch.equal(lowered(low), low)


class Net(nn.Module):
    """All kinds of layers that integer operators compute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.multiplied = nn.Conv2d(8, 16, 3, groups=8)
        self.narrow = nn.Conv2d(16, 8, 1, groups=8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.conv(x))))
        return self.fc(F.relu(self.narrow(F.relu(self.multiplied(x)))).mean([2, 3]))


@pytest.mark.parametrize("rounding", ["nearest", "error_feedback", "hqq"])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_whatever_rounds_the_weights_nothing_saturates(rounding: str, per_tensor: bool) -> None:
    torch.manual_seed(0)
    network = Network(Net().eval(), {"x": torch.randn(4, 3, 9, 9)})
    data = [{"x": torch.randn(8, 3, 9, 9)} for _ in range(2)]
    method = Quantization(
        rounding=rounding, per_tensor=per_tensor, saturation_free=True, ranges="minmax"
    )
    statistics = collect(network, data)
    if method.needs:
        seen = observe(network, data, method.needs)
        statistics = replace(seen, activations=statistics.activations)
    result = method.plan(network, statistics).apply(network).module.state_dict()
    stored = {name: value for name, value in result.items() if value.dtype == torch.int8}
    assert len(stored) == 5
    for name, value in stored.items():
        # Depthwise kernels with one output for each input do not add pairs: their weights are left alone.
        free = not name.startswith("depthwise")
        assert bool((pair_sums(value) <= PAIR_LIMIT).all()) == free, name
    for name, value in result.items():
        if per_tensor and name.endswith("_scale") and "weight" in name:
            assert len(value.unique()) == 1, name


def test_neighbours_that_no_kernel_pairs_need_no_repair() -> None:
    """Inputs 2j + 1 and 2j + 2, and neighbours in the window."""
    weight = torch.zeros(2, 4, 1, 3)
    weight[0, 1:3] = 1
    weight[1, 0] = 1
    q = (weight * 127).to(torch.int8)
    assert pair_sums(q).tolist() == [127, 127]
