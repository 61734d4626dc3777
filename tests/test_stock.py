"""The user's class is kept: attributes follow their tensors, and what cannot follow is replaced one module at a time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinier.edits.base import Plan
from tinier.edits.slice import Slice, prove
from tinier.errors import InputError
from tinier.graph.groups import channel_groups
from tinier.modules.piece import Piece
from tinier.network import Network

WIDTH = 24


class Split(nn.Module):
    """A CSP stage: the parts' widths are kept as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.part = (16, 8), 8
        self.into, self.inner = nn.Conv2d(3, 24, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = self.into(x).relu().split(self.sizes, 1)
        if changed.shape[1] != self.part:
            raise ValueError(f"{changed.shape[1]} channels, {self.part} are needed")
        return self.out(torch.cat((kept, self.inner(changed).relu()), 1))


class Patches(nn.Module):
    """Tokens by a view of a number, a token and positions that hang on the module, and a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_dim = WIDTH
        self.embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.gamma = nn.Parameter(torch.rand(WIDTH))
        self.norm = Norm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        tokens = self.embed(x).reshape(n, self.hidden_dim, 4).permute(0, 2, 1)
        tokens = torch.cat((self.cls_token.expand(n, -1, -1), tokens), 1) + self.pos_embed
        return self.head((self.norm(tokens) * self.gamma)[:, 0])


class Norm(nn.Module):
    """A layer norm that keeps its width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim_shape = (dim,)
        self.weight, self.bias = nn.Parameter(torch.rand(dim)), nn.Parameter(torch.rand(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.dim_shape, self.weight, self.bias)


class Folded(nn.Module):
    """Unflatten and group norm: sizes inside layers of torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 64), nn.ReLU(), nn.Unflatten(1, (16, 2, 2)), nn.GroupNorm(4, 16),
            nn.Conv2d(16, 12, 1), nn.PixelShuffle(2), nn.Conv2d(3, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result


class Attention(nn.Module):
    """timm's older attention: the size of a head is the width of the input by the number of heads."""

    def __init__(self, derived: bool, write: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = 4, WIDTH // 4, WIDTH
        self.scale, self.derived, self.write = self.head_dim**-0.5, derived, write
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        head_dim, width = (
            (c // self.num_heads, c) if self.derived else (self.head_dim, self.attn_dim)
        )
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, head_dim).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * self.scale
        if self.write:
            mask = scores.new_zeros(n, n)
            mask[:2, 2:] = -1.0
            scores = scores + mask
        result: Tensor = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, width))
        return result


class Block(nn.Module):
    """A residual block around an attention."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), attention
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = (
            self.attention(y, y, y, need_weights=False)[0]
            if self.torch_attention
            else self.attention(y)
        )
        result: Tensor = x + self.mlp(x + y)
        return result

    @property
    def torch_attention(self) -> bool:
        """Whether it is called as torch's own is."""
        return hasattr(self.attention, "in_proj_weight")


class Chunked(nn.Module):
    """Two halves that end at different widths, which no number in the class can say."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Halves()
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.stage(x))
        return result


class Halves(nn.Module):
    """Its second half alone goes through a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.inner = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.into(x).relu().chunk(2, 1)
        return torch.cat((first, self.inner(second).relu()), 1)


def cut(
    module: nn.Module, example: Tensor, share: Callable[[int], float]
) -> tuple[Network, Network, Plan]:
    """The network, and it with a share of every group left; share takes the group's place in the order of groups."""
    torch.manual_seed(0)
    network = Network(module.eval(), {next(iter(_names(module))): example})
    groups = channel_groups(network.traced).groups
    slices = [
        Slice.of(group, range(group.size - max(1, round(group.size * share(i))), group.size))
        for i, group in enumerate(groups)
    ]
    assert slices
    plan = Plan(tuple(slices))
    return network, plan.apply(network), plan


def _names(module: nn.Module) -> list[str]:
    return list(module.forward.__code__.co_varnames[1:2])


def pieces(network: Network) -> list[str]:
    """The classes that graphs stand for."""
    return [m.replaced for m in network.module.modules() if isinstance(m, Piece)]


def half(_: int) -> float:
    return 0.5


def uneven(place: int) -> float:
    return (0.5, 0.75)[place % 2]


IMAGE, TOKENS = (2, 3, 8, 8), (2, 5, WIDTH)


@pytest.mark.parametrize(
    ("make", "shape", "share"),
    [
        (Split, IMAGE, half),
        (Split, IMAGE, uneven),
        (Patches, IMAGE, half),
        (Folded, (2, 6), half),
        (lambda: Block(Attention(derived=False)), TOKENS, half),
    ],
    ids=["split", "split unevenly", "patches", "unflatten", "attention"],
)
def test_numbers_follow_their_tensors(
    make: Callable[[], nn.Module], shape: tuple[int, ...], share: Callable[[int], float]
) -> None:
    network, pruned, plan = cut(make(), torch.randn(shape), share)
    assert type(pruned.module) is type(network.module)
    assert not pieces(pruned)
    assert prove(network, pruned, plan, seed=5) <= 1e-5
    before, after = (sum(p.numel() for p in n.module.parameters()) for n in (network, pruned))
    assert after < before


@pytest.mark.parametrize(
    ("make", "shape", "share", "stands_for"),
    [
        (lambda: Block(Attention(derived=True)), TOKENS, half, "Attention"),
        (lambda: Block(Attention(derived=True, write=True)), TOKENS, half, "Attention"),
        (lambda: Block(nn.MultiheadAttention(WIDTH, 4, batch_first=True, add_bias_kv=True)), TOKENS, half, "MultiheadAttention"),
        (Chunked, IMAGE, uneven, "Halves"),
    ],
    ids=["derived size", "written in place", "torch's attention", "uneven chunks"],
)  # fmt: skip
def test_a_module_that_cannot_follow_is_replaced_alone(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    share: Callable[[int], float],
    stands_for: str,
) -> None:
    network, pruned, plan = cut(make(), torch.randn(shape), share)
    assert type(pruned.module) is type(network.module)
    assert pieces(pruned) == [stands_for]
    assert any(stands_for in note for note in pruned.notes)
    assert prove(network, pruned, plan, seed=5) <= 1e-5
    # The same names, of which the optimiser, checkpoints and a second plan speak.
    names = dict(network.module.named_parameters())
    assert set(dict(pruned.module.named_parameters())) == set(names)
    loss = sum(
        tensor.square().mean() for tensor in pruned.module(*pruned.example.values()).unbind()
    )
    loss.backward()
    assert all(p.grad is not None for p in pruned.module.parameters())


def test_what_has_a_piece_is_pruned_again() -> None:
    _, pruned, _ = cut(Block(Attention(derived=True)), torch.randn(TOKENS), half)
    again, smaller, plan = cut(pruned.module, torch.randn(TOKENS), half)
    assert type(smaller.module) is Block
    assert pieces(smaller) == ["Attention"]
    assert prove(again, smaller, plan, seed=5) <= 1e-5


def test_torchs_encoder_layers_do_not_read_past_a_piece() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layers(x)
            return result

    network, pruned, plan = cut(Encoder(), torch.randn(TOKENS), half)
    assert type(pruned.module) is Encoder
    assert prove(network, pruned, plan, seed=5) <= 1e-5


def test_without_modules_of_its_own_a_class_becomes_its_graph() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.inner, self.out = nn.Linear(6, 16), nn.Linear(8, 8), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.into(x).relu().chunk(2, 1)
            result: Tensor = self.out(torch.cat((first, self.inner(second).relu()), 1))
            return result

    network, pruned, plan = cut(Whole(), torch.randn(2, 6), uneven)
    assert isinstance(pruned.module, torch.fx.GraphModule)
    assert prove(network, pruned, plan, seed=5) <= 1e-5


class Scan(nn.Module):
    """A state space layer: two numbers of one value count different things, and a loop runs over the length."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.step_rank, self.states = 8, 4, 4
        self.project = nn.Linear(8, 4 + 2 * 4)
        self.spread = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        rank, inner, outer = self.project(x).split([self.step_rank, self.states, self.states], -1)
        step, state, result = self.spread(rank), 0.0, []
        for t in range(x.shape[1]):
            state = 0.5 * state + step[:, t, :, None] * inner[:, t, None]
            result.append((state * outer[:, t, None]).sum(-1))
        return torch.stack(result, 1)


class Gates(nn.Module):
    """Its result is written in place, so that no single operator gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.block_width = 2, 4
        self.weight = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = x.reshape(batch * length, self.num_heads, self.block_width).permute(1, 0, 2)
        gate = torch.bmm(parts, self.weight).permute(1, 0, 2).reshape(batch, length, width)
        result = torch.zeros_like(x)
        for t in range(length):
            result[:, t] = gate[:, t].sigmoid() * x[:, t]
        return result


class Sequence(nn.Module):
    """Token ids in, one of the two recurrent layers inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.embed, self.into = nn.Embedding(20, 6), nn.Linear(6, 8)
        self.inner, self.out = inner, nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.inner(self.into(self.embed(tokens))))


@pytest.mark.parametrize("inner", [Scan, Gates])
def test_loops_over_the_length_keep_their_class_and_their_free_length(
    inner: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    network = Network(Sequence(inner()).eval(), {"tokens": torch.randint(20, (2, 5))})
    channels = channel_groups(network.traced)
    edits = []
    for index, group in enumerate(channels.groups):
        if group.name.startswith(("inner", "into")):
            edits.append(Slice.of(group, range(max(group.size - 1 - index % 2, 1))))
    assert edits
    pruned = Plan(tuple(edits)).apply(network)
    assert type(pruned.module) is Sequence
    assert not any(isinstance(part, Piece) for part in pruned.module.modules())
    for length in (3, 9):
        assert pruned.module(torch.randint(20, (4, length))).shape == (4, length, 3)


class Cached(nn.Module):
    """Keeps a part of its weights between runs in evaluation mode, until it is trained, as LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.randn(16))
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "Cached":
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training or "scale" not in self.cache:
            self.cache["scale"] = self.scale.exp()
        return self.second(self.first(x).relu() * self.cache["scale"])


def test_what_a_class_keeps_of_its_old_weights_is_forgotten() -> None:
    torch.manual_seed(0)
    module = Cached().eval()
    module(torch.randn(2, 6))  # fills the cache
    network = Network(module, {"x": torch.randn(2, 6)})
    (group,) = channel_groups(network.traced).groups
    assert "scale" in {slot.parameter for slot in group.slots}
    pruned = Plan((Slice.of(group, range(5)),)).apply(network)
    assert type(pruned.module) is Cached
    assert prove(network, pruned, Plan((Slice.of(group, range(5)),)), seed=5) <= 1e-5


class Halving(nn.Module):
    """Numbers that follow the length by no line, and a size that keeps the class from being cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 16, 3, padding=1), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool1d(self.first(x).relu(), 2)
        if y.shape[1] != 8 * 2:
            raise ValueError("16 channels are needed")
        return self.second(y.sum(-1) / y.shape[-1])


def test_a_graph_refuses_sizes_that_it_was_not_made_for() -> None:
    torch.manual_seed(0)
    network = Network(Halving().eval(), {"x": torch.randn(2, 3, 50)})
    (group,) = channel_groups(network.traced).groups
    pruned = Plan((Slice.of(group, range(6)),)).apply(network)
    assert not isinstance(pruned.module, Halving)
    assert pruned.module(torch.randn(7, 3, 50)).shape == (7, 2)
    with pytest.raises(InputError, match="3 × 50 is needed"):
        pruned.module(torch.randn(7, 3, 100))
    assert pruned.traced.batched
