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
    mask = (x[..., :1] > 0).expand(-1, -1, 8)
    return m.b(y.masked_scatter(mask, m.c(x)))


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
QKV: Parts = {**{name: lin(6, 8) for name in "qkv"}, "out": lin(8, 4)}

# Name → parts, function, shape without the batch, (kind, size) of each group.
CASES: dict[str, tuple[Parts, Callable[[Any, Tensor], Any], tuple[int, ...], list[tuple[str, int]]]]
CASES = {
    "einsum_ellipsis": (
        {"a": lin(6, 8), "w": rand(8, 4)},
        lambda m, x: torch.einsum("...i,io->...o", m.a(x), m.w),
        (3, 6),
        [("neuron", 8)],
    ),
    "einsum_implicit": (
        {"a": lin(6, 8), "w": rand(8, 4)},
        lambda m, x: torch.einsum("bi,io", m.a(x), m.w),
        (6,),
        [("neuron", 8)],
    ),
    "einsum_attention": (
        QKV,
        einsum_attention,
        (5, 6),
        [("head", 4), ("head_dim", 2), ("head_dim", 2)],
    ),
    "relative_bias": (
        QKV | {"table": rand(4, 5)},
        relative_bias,
        (5, 6),
        [("head", 4), ("head_dim", 2), ("head_dim", 2)],
    ),
    "interleaved_rotary": (AB, interleaved, (5, 6), [("neuron", 4)]),
    "complex_rotary": (AB, complex_rotary, (5, 6), [("neuron", 4)]),
    "weight_norm": (
        {"a": lambda: weight_norm(nn.Linear(6, 8)), "b": lambda: weight_norm(nn.Linear(8, 4))},
        between(F.relu),
        (6,),
        [("neuron", 8)],
    ),
    "weight_norm_by_hooks": (
        {"a": lambda: nn.Conv2d(3, 8, 3), "v": rand(8, 8, 3), "g": rand(8, 1, 1), "b": lin(8, 4)},
        lambda m, x: m.b(F.conv1d(m.a(x).flatten(2), torch._weight_norm(m.v, m.g, 0)).mean(-1)),
        (3, 5, 5),
        [("channel", 8), ("channel", 8)],
    ),
    "spectral_norm": (
        {"a": lambda: spectral_norm(nn.Linear(6, 8)), "b": lambda: spectral_norm(nn.Linear(8, 4))},
        between(F.relu),
        (6,),
        [("neuron", 8)],
    ),
    "glu": (
        {"a": lin(6, 16), "b": lin(8, 4)},
        between(lambda y: F.glu(y, -1)),
        (6,),
        [("neuron", 8)],
    ),
    "running_sum": (
        AB,
        between(lambda y: torch.cumsum(y, -1) + torch.logcumsumexp(y, -1)),
        (6,),
        [("neuron", 8)],
    ),
    "reductions": (
        AB,
        lambda m, x: (
            m.b(m.a(x))
            * (
                m.a(x).std(-1, keepdim=True)
                + m.a(x).amax(-1, keepdim=True)
                + m.a(x).prod(-1, keepdim=True)
                + (m.a(x) > 0).any(-1, keepdim=True)
                + m.a(x).max(-1, keepdim=True).values
            )
        ),
        (6,),
        [("normalised", 8)],
    ),
    "roll_and_flip": (AB, between(lambda y: torch.roll(y, 1, 1).flip(1)), (5, 6), [("neuron", 8)]),
    "fft": (AB, between(lambda y: torch.fft.rfft(y, dim=1).real), (5, 6), [("neuron", 8)]),
    "fourier_mixing": (AB, between(lambda y: torch.fft.fft2(y).real), (5, 6), []),
    "unfold": (AB, between(lambda y: y.unfold(1, 3, 1).mean(-1)), (5, 6), [("neuron", 8)]),
    "pad_and_crop": (
        AB,
        between(lambda y: F.pad(F.pad(y, (2, 1)), (-2, -1))),
        (6,),
        [("neuron", 8)],
    ),
    "crop": (
        {"a": lin(6, 12), "b": lin(8, 4)},
        between(lambda y: F.pad(y, (-1, -3))),
        (6,),
        [("neuron", 8), ("neuron", 3)],
    ),
    "bilinear": (
        {"a": lin(6, 8), "c": lin(6, 5), "w": lambda: nn.Bilinear(8, 5, 4)},
        lambda m, x: m.w(m.a(x), m.c(x)),
        (6,),
        [("neuron", 8), ("neuron", 5)],
    ),
    "distances": (
        {"a": lin(6, 8), "w": rand(4, 8)},
        lambda m, x: torch.cdist(m.a(x), m.w),
        (5, 6),
        [("neuron", 8)],
    ),
    "cosine": (
        {"a": lin(6, 8), "c": lin(6, 8)},
        lambda m, x: F.cosine_similarity(m.a(x), m.c(x), -1),
        (6,),
        [("neuron", 8)],
    ),
    "cross": (
        {"a": lin(6, 8), "b": lin(8, 4)},
        lambda m, x: m.b(torch.linalg.cross(m.a(x), m.a(x) + 1, dim=1)),
        (3, 6),
        [("neuron", 8)],
    ),
    "diagonal": (
        {"a": lin(6, 8), "b": lin(8, 4)},
        lambda m, x: m.b(torch.diagonal(m.a(x)[:, :, None] * m.a(x)[:, None], dim1=1, dim2=2)),
        (6,),
        [("neuron", 8)],
    ),
    "scatter_and_gather": (AB, scattered, (5, 6), [("neuron", 8)]),
    "index_put": (AB | {"c": lin(6, 8)}, put, (5, 6), [("neuron", 8)]),
    "prelu": (
        AB | {"p": lambda: nn.PReLU(8)},
        lambda m, x: m.b(m.p(m.a(x))),
        (6,),
        [("neuron", 8)],
    ),
    "instance_norm": (
        {"a": conv(3, 8), "n": lambda: nn.InstanceNorm2d(8, affine=True), "b": lin(8, 4)},
        lambda m, x: m.b(F.relu(m.n(m.a(x))).mean((2, 3))),
        (3, 4, 4),
        [("channel", 8)],
    ),
    "native_group_norm": (
        {"a": conv(3, 8), "w": rand(8), "b": lin(8, 4)},
        lambda m, x: m.b(
            F.relu(torch.native_group_norm(m.a(x), m.w, None, x.shape[0], 8, 16, 2, 1e-5)[0]).mean(
                (2, 3)
            )
        ),
        (3, 4, 4),
        [("channel", 2), ("normalised", 4)],
    ),
    "same_padding": (
        {"a": conv(3, 8, padding="same"), "b": lin(8, 4)},
        filters(F.relu),
        (3, 4, 4),
        [("channel", 8)],
    ),
    "grouped_convolutions": (
        {
            "a": conv(3, 8),
            "c": conv(8, 12, groups=2),
            "d": lambda: nn.ConvTranspose2d(12, 8, 2, 2, groups=2),
            "b": lin(8, 4),
        },
        lambda m, x: m.b(m.d(F.relu(m.c(F.relu(m.a(x))))).mean((2, 3))),
        (3, 4, 4),
        [("channel", 2), ("channel", 4), ("channel", 6), ("channel", 4)],
    ),
    "shuffle": (
        {"a": conv(3, 8), "b": lin(8, 4)},
        filters(lambda y: F.channel_shuffle(y, 2)),
        (3, 4, 4),
        [("channel", 2), ("channel", 4)],
    ),
    "pixel_shuffle": (
        {"a": conv(3, 12), "c": conv(3, 8), "b": lin(8, 4)},
        lambda m, x: m.b(m.c(F.pixel_shuffle(m.a(x), 2)).mean((2, 3))),
        (3, 4, 4),
        [("channel", 3), ("channel", 8)],
    ),
    "patches": (
        {"a": conv(3, 8), "w": rand(4, 72)},
        lambda m, x: m.w @ F.unfold(m.a(x), 3),
        (3, 5, 5),
        [("channel", 8)],
    ),
    "fold": (
        {"a": conv(3, 8), "c": lambda: nn.Conv1d(72, 72, 1), "b": lin(8, 4)},
        lambda m, x: m.b(
            F.fold(m.c(F.unfold(m.a(x), 3, padding=1)), (4, 4), 3, padding=1).mean((2, 3))
        ),
        (3, 4, 4),
        [("channel", 8), ("channel", 8)],
    ),
    "features_in_place_of_tokens": (AB | {"c": lin(6, 8)}, image_tokens, (5, 6), [("neuron", 8)]),
    "experts": (
        EXPERTS,
        experts,
        (6,),
        [("neuron", 8), ("expert", 6), ("neuron", 10), ("neuron", 8)],
    ),
    "experts_by_one_hot": (
        EXPERTS,
        experts_by_one_hot,
        (6,),
        [("neuron", 8), ("neuron", 6), ("neuron", 10), ("neuron", 8)],
    ),
}


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
    found = sorted((group.kind, group.size) for group in channels.groups)
    assert found == sorted(groups), channels
    for seed in range(2):
        kept = chosen(channels, seed)
        assert len(kept) == len([size for _, size in groups if size > 1])
        sliced = sliced_graph(network.traced, channels, kept)
        for batch in (2, 5):
            x = {"x": torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))}
            with torch.no_grad():
                wanted = masked_outputs(network.traced, channels, kept, x)
                assert relative(call(sliced, x), wanted) <= 1e-5
        numbers = sum(p.numel() for p in sliced.parameters())
        assert numbers < sum(p.numel() for p in network.module.parameters()) or not kept


class Recurrent(nn.Module):
    """A recurrent layer and a linear layer that reads its outputs and, where it has them, its last states."""

    def __init__(
        self, make: Callable[..., nn.Module], width: int, states: bool, **more: Any
    ) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.recurrent = make(6, 8, **more)
        self.read = nn.Linear(width, 4)
        self.states = states

    def forward(self, x: Tensor) -> Tensor:
        y = self.recurrent(self.first(x))
        if not isinstance(y, tuple):
            return self.read(y)
        outputs, states = y
        if self.states:
            last = states[0] if isinstance(states, tuple) else states
            outputs = outputs + torch.cat((last[-2], last[-1]), -1)[:, None]
        return self.read(outputs)


# make, width of what is read, whether states are read, options; gates in a row of the weights
RECURRENT: dict[str, tuple[Any, int, bool, dict[str, Any]]] = {
    "lstm": (nn.LSTM, 16, True, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "lstm_without_bias": (nn.LSTM, 8, False, {"bias": False}),
    "gru": (nn.GRU, 16, True, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "rnn": (nn.RNN, 8, False, {"nonlinearity": "relu", "num_layers": 2}),
    "lstm_cell": (nn.LSTMCell, 8, False, {}),
    "gru_cell": (nn.GRUCell, 8, False, {}),
    "rnn_cell": (nn.RNNCell, 8, False, {}),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_lose_hidden_units(name: str) -> None:
    make, width, states, more = RECURRENT[name]
    torch.manual_seed(0)
    module = Recurrent(make, width, states, **more).eval()
    x = torch.randn(3, 6) if name.endswith("cell") else torch.randn(3, 5, 6)
    network = Network(module, name_inputs(module, x), name)
    channels = channel_groups(network.traced)
    hidden = next(group for group in channels.groups if group.kind == "hidden")
    kept = [1, 2, 6]
    pruned = Slice.apply_all([Slice.of(hidden, kept)], network)
    layer: Any = pruned.module.get_submodule("recurrent")
    assert type(pruned.module) is Recurrent and layer.hidden_size == 3
    if isinstance(layer, nn.RNNBase):
        own = list(layer.parameters())
        assert {id(w) for w in layer._flat_weights} == {id(p) for p in own}
    # By hand: units of which every weight is zero have no state, and nothing reads them.
    silent: Any = copy.deepcopy(module)
    with torch.no_grad():
        for key, parameter in silent.recurrent.named_parameters():
            gates = parameter.view(-1, 8, *parameter.shape[1:])
            gone = [i for i in range(8) if i not in kept]
            gates[:, gone] = 0
            if "_hh" in key and parameter.ndim == 2:
                parameter[:, gone] = 0
    with torch.no_grad():
        assert relative([pruned.module(x)], [silent(x)]) <= 1e-5
        if "cell" not in name:
            later = torch.randn(7, 5, 6) if more.get("batch_first") else torch.randn(9, 5, 6)
            assert relative([pruned.module(later)], [silent(later)]) <= 1e-5


def test_projected_states_and_their_cost() -> None:
    torch.manual_seed(0)
    module = Net(
        {"r": lambda: nn.LSTM(6, 8, 2, proj_size=4, batch_first=True), "b": lin(4, 3)},
        lambda m, x: m.b(m.r(x)[0]),
    ).eval()
    network = Network(module, {"x": torch.randn(2, 5, 6)}, "projected")
    channels = channel_groups(network.traced)
    groups = [g for g in channels.groups if g.kind == "hidden"]
    assert sorted(g.size for g in groups) == [4, 8]
    counts = macs(network.traced, channels)
    # a step: 32 gate rows of input and state, and the projection; five steps
    assert counts["lstm"] == 5 * (32 * (6 + 4) + 8 * 4 + 32 * (4 + 4) + 8 * 4)
    pruned = Slice.apply_all([Slice.of(g, range(g.size // 2)) for g in groups], network)
    assert macs(pruned.traced)["lstm"] == 5 * (16 * (6 + 2) + 4 * 2 + 16 * (2 + 2) + 4 * 2)
    layer: Any = pruned.module.get_submodule("r")
    assert (layer.hidden_size, layer.proj_size) == (4, 2)


def test_a_given_state_of_the_network_pins_hidden_units() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r, self.b = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.b(self.r(x, h)[0])

    network = Network(Given().eval(), {"x": torch.randn(1, 5, 6), "h": torch.randn(1, 1, 8)}, "g")
    channels = channel_groups(network.traced)
    assert not channels.groups
    assert any("input h" in str(pinned) for pinned in channels.pins)


def of_kind(channels: Channels, kind: str) -> list[Group]:
    return [group for group in channels.groups if group.kind == kind]


def test_as_many_experts_stay_as_each_row_is_sent_to() -> None:
    parts, function, shape, _ = CASES["experts"]
    network = build(parts, function, *shape)
    (group,) = of_kind(channel_groups(network.traced), "expert")
    assert group.minimum == 2
    with pytest.raises(RefusedError, match="2 are needed"):
        Slice.apply_all([Slice.of(group, [3])], network)
    pruned = Slice.apply_all([Slice.of(group, [0, 5])], network)
    # By hand: logits of the others at minus infinity are never chosen.
    original: Any = copy.deepcopy(network.module)
    with torch.no_grad():
        original.gate.weight[1:5] = 0
        original.gate.bias[1:5] = -torch.inf
        x = torch.randn(7, 6)
        assert relative([pruned.module(x)], [original(x)]) <= 1e-5


def test_experts_of_transformers_leave_and_the_class_stays() -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=12, num_local_experts=5, num_experts_per_tok=2, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    network = Network(module, {"input_ids": torch.randint(0, 40, (2, 5))}, "mixtral")
    channels = channel_groups(network.traced)
    (expert,) = of_kind(channels, "expert")
    inner = next(g for g in channels.groups if g.size == 12)
    pruned: Any = Slice.apply_all([Slice.of(expert, [0, 2, 4]), Slice.of(inner, range(8))], network)
    assert type(pruned.module) is type(module)
    experts = pruned.module.model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape == (3, 16, 8) and experts.num_experts == 3
    assert pruned.module.config.num_local_experts == 3
    assert pruned.module.config.intermediate_size == 8
    assert pruned.traced.batched


# What holds the group of eight, and why: function of a and b, operator and part of the reason.
PINNED: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "unknown": (
        lambda y: torch.linalg.matrix_exp(y[:, :, None] * torch.ones(8))[..., 0],
        "linalg_matrix_exp",
        "no propagation rule",
    ),
    "as_strided": (
        lambda y: torch.as_strided(y, (2, 8), (8, 1)),
        "as_strided",
        "no propagation rule",
    ),
    "sort": (lambda y: y.sort(-1).values, "sort", "positions"),
    "argmax_as_number": (lambda y: y * y.argmax(-1, keepdim=True), "mul", "as numbers"),
    "median": (lambda y: y - y.median(-1, keepdim=True).values, "median", "positions"),
    "topk_times_position": (
        lambda y: y * (y.topk(2).indices.sum(-1, keepdim=True)),
        "sum",
        "as numbers",
    ),
    "position": (lambda y: y * torch.arange(8), "mul", "as numbers"),
    "matrix": (lambda y: y @ torch.tril(torch.ones(8, 8)), "tril", "position"),
    "transform": (lambda y: torch.fft.fft(y).real, "fft_fft", "mixes"),
    "windows": (lambda y: F.pad(y.unfold(-1, 3, 1).mean(-1), (1, 1)), "unfold", "windows"),
}


@pytest.mark.parametrize("name", PINNED)
def test_what_depends_on_positions_pins(name: str) -> None:
    function, operator, reason = PINNED[name]
    network = build(AB, between(function), 6)
    channels = channel_groups(network.traced)
    assert not channels.groups
    pins = next(p for p in channels.pins if (p.parameter, p.dim) == ("a.weight", 0)).pins
    assert any(why.operator == operator and reason in why.reason for why in pins), pins


def test_a_mask_chosen_by_data_pins_only_what_it_runs_over() -> None:
    module = Net(AB, lambda m, x: m.b(m.a(x))[x[..., 0] > 0].sum())
    network = Network(module.eval(), {"x": torch.randn(2, 5, 6)}, "masked")
    assert [g.size for g in channel_groups(network.traced).groups] == [8, 4]


def fused(m: Any, x: Tensor) -> Tensor:
    """Queries, keys and values of one projection, by a dimension of three."""
    q, k, v = m.qkv(x).view(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


def test_values_of_a_fused_projection_have_a_width_of_their_own() -> None:
    network = build({"qkv": lin(6, 24), "out": lin(8, 4)}, fused, 5, 6)
    channels = channel_groups(network.traced)
    widths = of_kind(channels, "head_dim")
    assert [group.size for group in widths] == [4, 4]
    pruned = Slice.apply_all([Slice.of(widths[0], [0, 3]), Slice.of(widths[1], [1, 2, 3])], network)
    weight: Any = pruned.module.get_parameter("qkv.weight")
    assert weight.shape == (2 * (2 + 2 + 3), 6)  # two heads of queries, keys and values
    with torch.no_grad():
        x = torch.randn(7, 5, 6)
        original: Any = network.module
        assert torch.equal(call(network.traced.module, {"x": x})[0], original(x))
