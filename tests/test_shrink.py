"""Shrinking: zeros from any tool become a smaller model that computes the same."""

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import tinier
from networks import NETWORKS, build, randomize_norms
from tinier.edits.base import Plan
from tinier.edits.mask import Mask
from tinier.edits.proof import random_inputs
from tinier.edits.shift import Shift
from tinier.edits.slice import Slice
from tinier.errors import RefusedError
from tinier.graph.groups import channel_groups
from tinier.graph.known import Known
from tinier.graph.masked import masked_outputs
from tinier.methods.dead_channels import DeadChannels
from tinier.network import Network
from tinier.verbs import Smaller

LAYERS = nn.Conv2d | nn.ConvTranspose2d | nn.Linear


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def built(name: str) -> Network:
    return build(name)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make()
        randomize_norms(module)
    return module.eval()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def widths(smaller: Smaller) -> dict[str, int]:
    return {e.group: len(e.kept) for e in smaller.plan.edits if isinstance(e, Slice)}


def same(smaller: Smaller, model: nn.Module) -> None:
    """Equal to the user's own model on inputs that were drawn apart from those of the check."""
    reference = Network(model, smaller.original.example)
    for seed in (11, 12):
        inputs = random_inputs(smaller.original, seed)
        for found, wanted in zip(smaller.network(inputs), reference(inputs), strict=True):
            scale = float(wanted.abs().max())
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * max(scale, 1e-6))


def zero(module: nn.Module, *places: tuple[str, Any]) -> None:
    with torch.no_grad():
        for name, index in places:
            dict(module.named_parameters())[name][index] = 0


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "encoder"])
def test_without_zeros_nothing_changes(name: str) -> None:
    network = built(name)
    assert DeadChannels().plan(network) == Plan()


@pytest.mark.parametrize(
    ("name", "permanent"),
    [(n, False) for n in NETWORKS if n not in ("lstm", "gru", "experts", "vit", "encoder")]
    + [("mlp", True), ("residual_cnn", True)],
)
def test_structured_pruning_of_torch(name: str, permanent: bool) -> None:
    network = built(name)
    module = copy.deepcopy(network.module)
    for part in module.modules():
        if isinstance(part, LAYERS) and min(part.weight.shape[:2]) > 2:
            prune.ln_structured(part, "weight", 0.5, 2, dim=0)
            if permanent:
                prune.remove(part, "weight")
    state = {key: value.clone() for key, value in module.state_dict().items()}
    smaller = tinier.shrink(module, dict(network.example))
    assert smaller.plan.edits
    assert count(smaller.model) < count(network.module)
    same(smaller, module)
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in ("encoder", "causal_lm")])
def test_what_is_dead_is_what_may_leave(name: str) -> None:
    """The masked reference says of each channel whether it matters: with random weights only the erased ones do not."""
    network = Network(copy.deepcopy(built(name).module), built(name).example, name)
    groups = [g for g in channel_groups(network.traced).groups if "normalised" not in g.atom.roles]
    named = dict(network.module.named_parameters())
    erased = {}
    for group in groups[:2]:
        if group.size < 4:
            continue
        erased[group.name] = {1, group.size - 1}
        for slot in group.slots:
            if slot.parameter in named:
                going = torch.isin(slot.index(), torch.tensor(sorted(erased[group.name])))
                with torch.no_grad():
                    shape = [-1 if d == slot.dim else 1 for d in range(named[slot.parameter].ndim)]
                    named[slot.parameter].masked_fill_(going.view(shape), 0)
    network = Network(network.module, network.example, name)
    channels = channel_groups(network.traced)
    found = {
        e.group: set(range(e.size)) - set(e.kept)
        for e in DeadChannels().plan(network).edits
        if isinstance(e, Slice)
    }
    inputs = random_inputs(network, 3)
    with torch.no_grad():
        wanted = network(inputs)
        for group in channels.groups:
            if "normalised" in group.atom.roles or group.size > 32:
                continue
            for channel in range(group.size):
                kept = torch.tensor([i for i in range(group.size) if i != channel])
                masked = masked_outputs(network.traced, channels, {group.atom: kept}, inputs)
                matters = any(
                    float((a - b).abs().max()) > 1e-5 * float(b.abs().max())
                    for a, b in zip(masked, wanted, strict=True)
                )
                if channel in found.get(group.name, set()):
                    assert not matters, (group.name, channel)
                if channel in erased.get(group.name, set()):
                    assert channel in found[group.name], (group.name, channel)


class Plain(nn.Module):
    """Convolution, batch norm, ReLU, convolution, mean, linear."""

    def __init__(self, padding: int, bias: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=padding, bias=bias)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class TestConstants:
    @pytest.mark.parametrize("bias", [True, False])
    def test_a_constant_goes_into_the_bias_or_the_norm(self, bias: bool) -> None:
        model = seeded(lambda: Plain(0, bias))
        zero(model, ("conv1.weight", [1, 4]))
        with torch.no_grad():
            model.get_parameter("bn1.bias").fill_(2.0)  # the dead maps are above zero
        smaller = tinier.shrink(model, normal(3, 3, 7, 7))
        assert widths(smaller) == {"conv1": 4}
        shifted = [e.tensor for e in smaller.plan.edits if isinstance(e, Shift)]
        assert shifted == ["conv2.bias" if bias else "bn2.running_mean"]
        same(smaller, model)

    def test_padding_cannot_take_it_up(self) -> None:
        model = seeded(lambda: Plain(1))
        zero(model, ("conv1.weight", [1, 4]))
        with torch.no_grad():
            model.get_parameter("bn1.bias").copy_(torch.tensor([2.0, 2, 2, 2, -9, 2]))
        # Map 4 is zero behind ReLU, map 1 is not, and its border is another.
        smaller = tinier.shrink(model, normal(3, 3, 7, 7))
        assert widths(smaller) == {"conv1": 5}
        assert 4 not in next(e.kept for e in smaller.plan.edits if isinstance(e, Slice))
        same(smaller, model)

    def test_scales_of_norms(self) -> None:
        """Network slimming: γ = 0 leaves β, whatever the filter."""
        model = seeded(lambda: Plain(0))
        zero(model, ("bn1.weight", [0, 2]), ("bn2.weight", [3]))
        smaller = tinier.shrink(model, normal(3, 3, 7, 7))
        assert widths(smaller) == {"conv1": 4, "conv2": 7}
        same(smaller, model)

    def test_constants_through_two_layers(self) -> None:
        """A layer that reads constants only is a constant itself: all but one channel go."""
        model = seeded(
            lambda: nn.Sequential(
                nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 2)
            )
        )
        zero(model, ("0.weight", slice(None)))
        smaller = tinier.shrink(model, normal(3, 5))
        assert widths(smaller) == {"0": 1, "2": 1}
        same(smaller, model)

    def test_a_bias_that_two_layers_share_is_left(self) -> None:
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(4, 3)
                self.c.bias = self.b.bias

            def forward(self, x: Tensor) -> Tensor:
                return self.b(torch.sigmoid(self.a(x))) * self.c(x)

        model = seeded(Shared)
        zero(model, ("a.weight", [0, 1]))
        assert tinier.shrink(model, normal(3, 4)).plan == Plan()
        zero(model, ("b.weight", (slice(None), 0)))  # unread is unread
        assert widths(tinier.shrink(model, normal(3, 4))) == {"a": 5}


class TestKinds:
    def test_a_residual_channel_is_dead_if_all_producers_are(self) -> None:
        model = copy.deepcopy(built("residual_cnn").module)
        example = dict(built("residual_cnn").example)
        zero(model, ("conv.weight", [2]), ("bn.bias", [2]), ("bn.weight", [2]))
        assert widths(tinier.shrink(model, example)) == {}
        zero(model, ("blocks.0.bn2.weight", [2]), ("blocks.0.bn2.bias", [2]))
        smaller = tinier.shrink(model, example)
        assert widths(smaller) == {"conv": 7}
        assert type(smaller.model) is type(model)
        same(smaller, model)

    def test_unread_channels_and_what_only_they_read(self) -> None:
        model = seeded(
            lambda: nn.Sequential(
                nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 2)
            )
        )
        zero(model, ("4.weight", (slice(None), [0, 1])))
        zero(
            model, ("2.weight", (slice(2, None), 3))
        )  # only the first two, which nobody reads, read neuron 3
        smaller = tinier.shrink(model, normal(3, 5))
        assert widths(smaller) == {"0": 5, "2": 5}
        same(smaller, model)

    def test_all_dead_leaves_one(self) -> None:
        model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)))
        zero(model, ("2.weight", slice(None)))
        smaller = tinier.shrink(model, normal(3, 5))
        assert widths(smaller) == {"0": 1}
        same(smaller, model)

    @pytest.mark.parametrize(
        ("attention", "where"), [("vit", "values"), ("vit_stock_attention", "output")]
    )
    def test_heads(self, attention: str, where: str) -> None:
        model = copy.deepcopy(built(attention).module)
        prefix = "blocks.0.attention." + ("attention." if "stock" in attention else "")
        head = slice(4, 8)
        qkv, out = (
            ("in_proj_weight", "out_proj.weight")
            if "stock" in attention
            else ("qkv.weight", "out.weight")
        )
        bias = qkv.replace("weight", "bias")
        if where == "output":
            zero(model, (prefix + out, (slice(None), head)))
        else:
            rows = slice(32 + head.start, 32 + head.stop)
            zero(model, (prefix + qkv, rows), (prefix + bias, rows))
        smaller = tinier.shrink(model, dict(built(attention).example))
        assert list(widths(smaller).values()) == [3]
        assert next(iter(widths(smaller))).endswith(":head")
        assert count(smaller.model) == count(model) - 4 * (3 * 16 + 3 + 16)
        same(smaller, model)

    @pytest.mark.parametrize(
        ("kind", "layers", "two_ways", "options"),
        [
            (nn.LSTM, 2, True, {}),
            (nn.GRU, 2, False, {}),
            (nn.LSTM, 1, False, {}),
            (nn.RNN, 1, False, {}),
            (nn.RNN, 2, True, {"nonlinearity": "relu"}),
            (nn.GRU, 2, True, {"bias": False}),
        ],
    )
    def test_recurrent_units(
        self, kind: type[nn.Module], layers: int, two_ways: bool, options: dict[str, Any]
    ) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.rnn = kind(
                    6, 10, num_layers=layers, batch_first=True, bidirectional=two_ways, **options
                )
                self.fc = nn.Linear(20 if two_ways else 10, 5)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(self.rnn(x)[0])

        model = seeded(Net)
        rnn = dict(model.rnn.named_parameters())  # type: ignore[union-attr, operator]
        first = 0 if kind is nn.RNN else 20  # of the rows of the candidate
        with torch.no_grad():
            for name, p in rnn.items():
                p[first : first + 2] = 0  # units 0 and 1 never start
                if "weight_hh" in name:
                    p[:, 7] = 0  # unit 7 is not read: not by its layer,
                if "weight_ih_l1" in name:
                    p[:, 7::10] = 0  # not by the next,
            model.get_parameter("fc.weight")[:, 7::10] = 0  # and not by the end
            rnn["weight_hh_l0"][first + 5, 0] = 1.0  # what is zero may be read
        smaller = tinier.shrink(model, normal(3, 7, 6))
        assert list(widths(smaller).values()) == [7]
        same(smaller, model)
        if layers > 1:
            return
        with torch.no_grad():
            rnn["bias_ih_l0"][first] = 0.1  # now unit 0 moves
        again = tinier.shrink(model, normal(3, 7, 6))
        assert list(widths(again).values()) == [8]
        same(again, model)

    def test_width_of_an_embedding(self) -> None:
        class Bag(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.fc = nn.Embedding(12, 8), nn.Linear(8, 3)

            def forward(self, ids: Tensor) -> Tensor:
                return self.fc(torch.tanh(self.embed(ids)).mean(1))

        model = seeded(Bag)
        zero(model, ("embed.weight", (slice(None), [1, 5])))
        with torch.no_grad():
            model.get_parameter("embed.weight")[:, 3] = 0.7  # a constant, not zero
        smaller = tinier.shrink(model, {"ids": torch.arange(12).view(3, 4)})
        assert list(widths(smaller).values()) == [5]
        assert smaller.model.get_parameter("embed.weight").shape == (12, 5)
        same(smaller, model)

    def test_a_layer_norm_counts_zeros(self) -> None:
        model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2)))
        zero(model, ("0.weight", [1]), ("0.bias", [1]))
        assert tinier.shrink(model, normal(3, 5)).plan == Plan()


class TestShrink:
    def test_masks_of_tinier(self) -> None:
        network = built("mlp")
        mask = torch.ones(24, 12, dtype=torch.bool)
        mask[::2] = False
        masked = Plan((Mask.of("fc1.weight", mask),)).apply(network)
        smaller = tinier.shrink(masked)
        assert widths(smaller) == {"fc1": 12}
        same(smaller, masked.module)
        assert type(smaller.model) is type(network.module)

    def test_after_training_with_masks_of_torch(self) -> None:
        """The pruned weight is then the result of an operator, which torch does not copy."""
        model = seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)))
        prune.ln_structured(model[0], "weight", 0.5, 2, dim=0)  # type: ignore[index]
        model(normal(3, 5)).sum().backward()
        smaller = tinier.shrink(model, normal(3, 5))
        assert widths(smaller) == {"0": 4}
        same(smaller, model)

    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        model = seeded(lambda: Plain(0))
        zero(model, ("conv1.weight", [1, 4]))
        smaller = tinier.shrink(model, normal(3, 3, 7, 7))
        assert Plan.from_json(smaller.plan.to_json()) == smaller.plan
        tinier.save(smaller, tmp_path / "saved")
        fresh = seeded(lambda: Plain(0))
        again = tinier.load(tmp_path / "saved", into=fresh, example=normal(3, 3, 7, 7))
        inputs = random_inputs(smaller.network, 5)
        assert torch.equal(again.network(inputs)[0], smaller.network(inputs)[0])

    def test_says_how_many_are_left(self) -> None:
        model = seeded(lambda: Plain(0))
        zero(model, ("conv1.weight", [1, 4]), ("conv1.bias", [1, 4]))
        assert "conv1" in str(tinier.shrink(model, normal(3, 3, 7, 7)))
        assert "6 → 4" in str(tinier.shrink(model, normal(3, 3, 7, 7)))

    def test_what_differs_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network = built("mlp")
        group = channel_groups(network.traced).groups[0]
        wrong = Plan((Slice.of(group, range(5)),))
        monkeypatch.setattr(DeadChannels, "plan", lambda *_: wrong)
        with pytest.raises(RefusedError, match="removing fc1 changes the output"):
            tinier.shrink(network)

    def test_shift_must_fit(self) -> None:
        with pytest.raises(RefusedError, match=r"fc1\.bias of 3 entries: mlp has one of shape"):
            Plan((Shift("fc1.bias", (1.0, 2.0, 3.0)),)).apply(built("mlp"))


@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in ("encoder", "causal_lm")])
def test_known_entries_are_the_same_for_any_input(name: str) -> None:
    """What is said to be known must not move with the input; half of the rows of every weight are zero, so that much is known."""
    module = copy.deepcopy(built(name).module)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:
                outputs = int(name == "generator")  # a transposed convolution has its inputs first
                p.movedim(outputs, 0)[: p.shape[outputs] // 2] = 0
    network = Network(module, built(name).example, name)
    tensors = dict(network.traced.module.named_parameters()) | dict(
        network.traced.module.named_buffers()
    )
    runs = [Known(network.traced, tensors, random_inputs(network, seed)) for seed in (1, 2)]
    known = 0
    for node, first in runs[0].values.items():
        other = runs[1].values[node]
        if node.op == "call_function" and isinstance(first, Tensor) and first.is_floating_point():
            fixed = ~runs[0].open[node]
            known += int(fixed.sum())
            assert torch.equal(first[fixed], other[fixed]), node.name
    assert known > 0 or name in ("lstm", "gru")
