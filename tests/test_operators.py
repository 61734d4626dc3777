"""The propagation rules of operators: for each a tiny network, of which random channels of every group leave.

What is left must equal the masked reference, whose batch may have any size; some results are also computed by hand.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tinier.edits.rewrite import sliced_graph
from tinier.edits.slice import Slice
from tinier.errors import RefusedError
from tinier.graph.axes import Atom
from tinier.graph.groups import Channels, Group, channel_groups
from tinier.graph.macs import macs
from tinier.graph.masked import masked_outputs
from tinier.graph.trace import call
from tinier.network import Network, name_inputs

Parts = dict[str, Callable[[], nn.Module | Tensor]]


class Net(nn.Module):
    """Parts by name and a function of them and the input."""

    def __init__(self, parts: Parts, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        for name, make in parts.items():
            part = make()
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_parameter(name, nn.Parameter(part))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def lin(inputs: int, outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(inputs, outputs)


def conv(inputs: int, outputs: int, **more: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(inputs, outputs, 3, **({"padding": 1} | more))


def rand(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape) * 0.3


def build(parts: Parts, function: Callable[[Any, Tensor], Any], *shape: int) -> Network:
    torch.manual_seed(0)
    module = Net(parts, function).eval()
    for part in module.modules():  # some steps of spectral norm's power iteration
        if hasattr(part, "parametrizations"):
            part.train()
            part(torch.randn(2, *shape)) if not isinstance(part, Net) else None
            part.eval()
    return Network(module, {"x": torch.randn(2, *shape)}, "net")


AB: Parts = {"a": lin(6, 8), "b": lin(8, 4)}


def between(function: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Linear a, something, linear b."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.b(function(m.a(x)))
        return y

    return forward


def filters(function: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Convolution a, something, mean over space, linear b."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.b(function(m.a(x)).mean((-2, -1)))
        return y

    return forward


def interleaved(m: Any, x: Tensor) -> Tensor:
    """Rotary embedding over pairs (0, 1), (2, 3), …, and back by stack and flatten."""
    y = m.a(x)
    even, odd = y[..., ::2], y[..., 1::2]
    turned = torch.stack((even * 0.6 - odd * 0.8, even * 0.8 + odd * 0.6), -1)
    return m.b(turned.flatten(-2))


def complex_rotary(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    pairs = torch.view_as_complex(y.view(-1, 5, 4, 2))
    turn = torch.polar(torch.ones(5, 1), torch.arange(5.0)[:, None])
    return m.b(torch.view_as_real(pairs * turn).flatten(-2))


def relative_bias(m: Any, x: Tensor) -> Tensor:
    """LeViT's attention biases: a table (heads, offsets) indexed by the offset of each pair of positions."""
    q, k, v = (t.view(-1, 5, 4, 2).transpose(1, 2) for t in (m.q(x), m.k(x), m.v(x)))
    offsets = (torch.arange(5)[:, None] - torch.arange(5)[None]).abs()
    scores = q @ k.transpose(-2, -1) + m.table[:, offsets]
    return m.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


def einsum_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (t.view(-1, 5, 4, 2) for t in (m.q(x), m.k(x), m.v(x)))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return m.out(torch.einsum("bhqk,bkhd->bqhd", scores, v).flatten(-2))


def scattered(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    index = x.argsort(1)[..., :1].expand(-1, -1, 8)
    z = torch.zeros_like(y).scatter_add(1, index, y)
    return m.b(z.gather(1, index) + y.scatter(1, index, 1.0))


def put(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).clone()
    y[:, torch.tensor([0, 2])] = m.c(x)[:, :2]
    y[y < 0] = 0.5
    return m.b(y.index_add(1, torch.tensor([1]), m.c(x)[:, 2:3]))


def image_tokens(m: Any, x: Tensor) -> Tensor:
    """Features put in place of some tokens, as multimodal models do."""
    y = m.a(x)
    mask = (torch.arange(5) % 2 == 0)[None, :, None].expand(2, 5, 8)
    return m.b(y[:2].masked_scatter(mask, m.c(x[:2])))


def experts(m: Any, x: Tensor) -> Tensor:
    """Each row goes to the two experts that the gate likes most."""
    weights, chosen = m.gate(x).softmax(-1).topk(2)
    up, down = m.up[chosen], m.down[chosen]  # (batch, 2, …)
    y = torch.einsum("bi,bkih->bkh", m.a(x), up).relu()
    return m.b((torch.einsum("bkh,bkho->bko", y, down) * weights[..., None]).sum(1))


def experts_by_one_hot(m: Any, x: Tensor) -> Tensor:
    """The same with the choice as a one-hot tensor, and every expert computed."""
    weights, chosen = m.gate(x).topk(2)
    dense = (F.one_hot(chosen, 6) * weights[..., None]).sum(1)
    same = ((chosen[..., None] == torch.arange(6)) * weights[..., None]).sum(1)
    y = torch.einsum("bi,eih->beh", m.a(x), m.up).relu()
    out = torch.einsum("beh,eho->beo", y, m.down)
    return m.b(torch.einsum("beo,be->bo", out, dense + same))


EXPERTS: Parts = {"a": lin(6, 8), "gate": lin(6, 6), "up": rand(6, 8, 10), "down": rand(6, 10, 8)}
EXPERTS["b"] = lin(8, 4)
QKV: Parts = {name: lin(6, 8) for name in "qkv"} | {"out": lin(8, 4)}

# Name → parts, function, shape without the batch, (kind, size) of each group.
CASES: dict[str, tuple[Parts, Callable[[Any, Tensor], Any], tuple[int, ...], list[tuple[str, int]]]]
CASES = {
    "einsum_ellipsis": (
        {"a": lin(6, 8), "w": rand(8, 4)},
        lambda m, x: torch.einsum("...i,i...->...", m.a(x)[..., None, :], m.w[:, None].expand(8, 1)),
        (3, 6),
        [],
    ),
}
CASES = {
    "einsum_ellipsis": ({"a": lin(6, 8), "w": rand(8, 4)}, lambda m, x: torch.einsum("...i,io->...o", m.a(x), m.w), (3, 6), [("neuron", 8)]),
    "einsum_implicit": ({"a": lin(6, 8), "w": rand(8, 4)}, lambda m, x: torch.einsum("bi,io", m.a(x), m.w), (6,), [("neuron", 8)]),
    "einsum_attention": (QKV, einsum_attention, (5, 6), [("head", 4), ("head_dim", 2), ("head_dim", 2)]),
    "relative_bias": (QKV | {"table": rand(4, 5)}, relative_bias, (5, 6), [("head", 4), ("head_dim", 2), ("head_dim", 2)]),
    "interleaved_rotary": (AB, interleaved, (5, 6), [("neuron", 4)]),
    "complex_rotary": (AB, complex_rotary, (5, 6), [("neuron", 4)]),
    "weight_norm": ({"a": lambda: weight_norm(nn.Linear(6, 8)), "b": lambda: weight_norm(nn.Linear(8, 4))}, between(F.relu), (6,), [("neuron", 8)]),
    "weight_norm_by_hooks": ({"a": lambda: nn.Conv2d(3, 8, 3), "v": rand(8, 8, 3), "g": rand(8, 1, 1), "b": lin(8, 4)}, lambda m, x: m.b(F.conv1d(m.a(x).flatten(2), torch._weight_norm(m.v, m.g, 0)).mean(-1)), (3, 5, 5), [("channel", 8), ("channel", 8)]),
    "spectral_norm": ({"a": lambda: spectral_norm(nn.Linear(6, 8)), "b": lambda: spectral_norm(nn.Linear(8, 4))}, between(F.relu), (6,), [("neuron", 8)]),
    "glu": ({"a": lin(6, 16), "b": lin(8, 4)}, between(lambda y: F.glu(y, -1)), (6,), [("neuron", 8)]),
    "running_sum": (AB, between(lambda y: torch.cumsum(y, -1) + torch.logcumsumexp(y, -1)), (6,), [("neuron", 8)]),
    "reductions": (AB, lambda m, x: m.b(m.a(x)) * (m.a(x).std(-1, keepdim=True) + m.a(x).amax(-1, keepdim=True) + m.a(x).prod(-1, keepdim=True) + (m.a(x) > 0).any(-1, keepdim=True) + m.a(x).max(-1, keepdim=True).values), (6,), [("normalised", 8)]),
    "roll_and_flip": (AB, between(lambda y: torch.roll(y, 1, 1).flip(1)), (5, 6), [("neuron", 8)]),
    "fft": (AB, between(lambda y: torch.fft.rfft(y, dim=1).real), (5, 6), [("neuron", 8)]),
    "fourier_mixing": (AB, between(lambda y: torch.fft.fft2(y).real), (5, 6), []),
    "unfold": (AB, between(lambda y: y.unfold(1, 3, 1).mean(-1)), (5, 6), [("neuron", 8)]),
    "pad_and_crop": (AB, between(lambda y: F.pad(F.pad(y, (2, 1)), (-2, -1))), (6,), [("neuron", 8)]),
    "crop": ({"a": lin(6, 12), "b": lin(8, 4)}, between(lambda y: F.pad(y, (-1, -3))), (6,), [("neuron", 8)]),
    "bilinear": ({"a": lin(6, 8), "c": lin(6, 5), "w": lambda: nn.Bilinear(8, 5, 4)}, lambda m, x: m.w(m.a(x), m.c(x)), (6,), [("neuron", 8), ("neuron", 5)]),
    "distances": ({"a": lin(6, 8), "w": rand(4, 8)}, lambda m, x: torch.cdist(m.a(x), m.w), (5, 6), [("neuron", 8)]),
    "cosine": ({"a": lin(6, 8), "c": lin(6, 8)}, lambda m, x: F.cosine_similarity(m.a(x), m.c(x), -1), (6,), [("neuron", 8)]),
    "cross": ({"a": lin(6, 8), "b": lin(8, 4)}, lambda m, x: m.b(torch.linalg.cross(m.a(x), m.a(x) + 1, dim=1)), (3, 6), [("neuron", 8)]),
    "diagonal": ({"a": lin(6, 8), "b": lin(8, 4)}, lambda m, x: m.b(torch.diagonal(m.a(x)[:, :, None] * m.a(x)[:, None], dim1=1, dim2=2)), (6,), [("neuron", 8)]),
    "scatter_and_gather": (AB, scattered, (5, 6), [("neuron", 8)]),
    "index_put": (AB | {"c": lin(6, 8)}, put, (5, 6), [("neuron", 8)]),
    "prelu": (AB | {"p": lambda: nn.PReLU(8)}, lambda m, x: m.b(m.p(m.a(x))), (6,), [("neuron", 8)]),
    "instance_norm": ({"a": conv(3, 8), "n": lambda: nn.InstanceNorm2d(8, affine=True), "b": lin(8, 4)}, lambda m, x: m.b(F.relu(m.n(m.a(x))).mean((2, 3))), (3, 4, 4), [("channel", 8)]),
    "native_group_norm": ({"a": conv(3, 8), "w": rand(8), "b": lin(8, 4)}, lambda m, x: m.b(F.relu(torch.native_group_norm(m.a(x), m.w, None, x.shape[0], 8, 16, 2, 1e-5)[0]).mean((2, 3))), (3, 4, 4), [("channel", 2), ("normalised", 4)]),
    "same_padding": ({"a": conv(3, 8, padding="same"), "b": lin(8, 4)}, filters(F.relu), (3, 4, 4), [("channel", 8)]),
    "grouped_convolutions": ({"a": conv(3, 8), "c": conv(8, 12, groups=2), "d": lambda: nn.ConvTranspose2d(12, 8, 2, 2, groups=2), "b": lin(8, 4)}, lambda m, x: m.b(m.d(F.relu(m.c(F.relu(m.a(x))))).mean((2, 3))), (3, 4, 4), [("channel", 2), ("channel", 4), ("channel", 6), ("channel", 4)]),
    "shuffle": ({"a": conv(3, 8), "b": lin(8, 4)}, filters(lambda y: F.channel_shuffle(y, 2)), (3, 4, 4), [("channel", 2), ("channel", 4)]),
    "pixel_shuffle": ({"a": conv(3, 12), "c": conv(3, 8), "b": lin(8, 4)}, lambda m, x: m.b(m.c(F.pixel_shuffle(m.a(x), 2)).mean((2, 3))), (3, 4, 4), [("channel", 3), ("channel", 8)]),
    "patches": ({"a": conv(3, 8), "w": rand(4, 72)}, lambda m, x: m.w @ F.unfold(m.a(x), 3), (3, 5, 5), [("channel", 8)]),
    "fold": ({"a": conv(3, 8), "c": lambda: nn.Conv1d(72, 72, 1), "b": lin(8, 4)}, lambda m, x: m.b(F.fold(m.c(F.unfold(m.a(x), 3, padding=1)), (4, 4), 3, padding=1).mean((2, 3))), (3, 4, 4), [("channel", 8), ("channel", 8)]),
    "experts": (EXPERTS, experts, (6,), [("neuron", 8), ("expert", 6), ("neuron", 10), ("neuron", 8)]),
    "experts_by_one_hot": (EXPERTS, experts_by_one_hot, (6,), [("neuron", 8), ("normalised", 6), ("neuron", 10), ("neuron", 8)]),
}  # fmt: skip


def chosen(channels: Channels, seed: int) -> dict[Atom, Tensor]:
    """Random positions of each group: about half, and as many as it needs."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for group in channels.groups:
        count = max(group.minimum, group.size // 2)
        if count < group.size:
            order = torch.randperm(group.size, generator=generator)
            result[group.atom] = order[:count].sort().values
    return result


def relative(found: Any, wanted: Any) -> float:
    assert all(a.shape == b.shape for a, b in zip(found, wanted, strict=True))
    scale = max(float(b.detach().abs().max()) for b in wanted)
    return max(
        float((a - b).detach().abs().max()) / scale for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("name", CASES)
def test_random_channels_leave(name: str) -> None:
    parts, function, shape, groups = CASES[name]
    network = build(parts, function, *shape)
    channels = channel_groups(network.traced)
    assert [(group.kind, group.size) for group in channels.groups] == groups, channels
    for seed in range(2):
        kept = chosen(channels, seed)
        assert len(kept) == len([size for _, size in groups if size > 1])
        sliced = sliced_graph(network.traced, channels, kept)
        for batch in (2, 5) if name != "image_tokens" else (2,):
            x = {"x": torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))}
            with torch.no_grad():
                wanted = masked_outputs(network.traced, channels, kept, x)
                assert relative(call(sliced, x), wanted) <= 1e-5
        numbers = sum(p.numel() for p in sliced.parameters())
        assert numbers < sum(p.numel() for p in network.module.parameters()) or not kept
