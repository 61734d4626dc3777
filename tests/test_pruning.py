"""Channel pruning: every architecture equals its masked reference, and the laws of plans hold."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from networks import NETWORKS, build
from tinier.criteria.base import Criterion
from tinier.criteria.magnitude import Magnitude
from tinier.criteria.random import Random
from tinier.demo.resnet import ResNet20
from tinier.edits import slice as slicing
from tinier.edits.base import Plan
from tinier.edits.slice import Slice, kept, prove
from tinier.errors import InputError, RefusedError
from tinier.graph.groups import channel_groups
from tinier.graph.macs import macs
from tinier.graph.masked import masked_outputs
from tinier.graph.trace import call
from tinier.methods.channel_pruning import ChannelPruning
from tinier.network import Network, name_inputs


def total(network: Network) -> int:
    return sum(macs(network.traced).values())


def image_network(module: nn.Module, *shape: int) -> Network:
    return Network(
        module.eval(), name_inputs(module, torch.randn(2, *shape)), type(module).__name__
    )


def untyped(value: Any) -> Any:
    """``nn.Module`` attributes are tensors or modules to a type checker."""
    return value


def applied(plan: Plan, network: Network) -> Any:
    """As ``plan.apply``, without tracing a copy of the network once more."""
    return Slice.apply_all(list(plan.edits), network)


@pytest.fixture(scope="module")
def resnet() -> Network:
    torch.manual_seed(0)
    return image_network(ResNet20(), 1, 28, 28)


@pytest.fixture(scope="module")
def small() -> Network:
    return build("residual_cnn")


class InvertedResidual(nn.Module):
    """As in MobileNetV2: expand, depthwise, project."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.expand = nn.Sequential(
            nn.Conv2d(16, 64, 1), nn.BatchNorm2d(64), nn.ReLU6(inplace=True)
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(64, 64, 3, 1, 1, groups=64), nn.ReLU6(inplace=True)
        )
        self.project = nn.Conv2d(64, 16, 1)
        self.fc = nn.Linear(16 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Grouped(nn.Module):
    """Group norm, channel shuffle, squeeze and excitation, pixel shuffle, padding of channels, transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.b = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.out = nn.Conv2d(16, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm(self.a(x)))
        b, c, h, w = y.shape
        z = y.view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)
        z = self.b(z)
        z = z * torch.sigmoid(self.excite(F.relu(self.squeeze(z.mean((2, 3), keepdim=True)))))
        z = z + F.pad(y, (0, 0, 0, 0, 8, 8))
        return F.pixel_shuffle(self.out(self.up(z)), 2)


class ByHand(nn.Module):
    """What imported ONNX graphs look like: matmul and add, norms and attention written out, heads folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(16, 48) * 0.2)
        self.bias = nn.Parameter(torch.randn(48))
        self.out = nn.Parameter(torch.randn(16, 16) * 0.2)
        self.gain = nn.Parameter(torch.rand(16) + 0.5)
        self.w1 = nn.Parameter(torch.randn(16, 32) * 0.2)
        self.w2 = nn.Parameter(torch.randn(32, 16) * 0.2)
        self.head = nn.Linear(16, 3)

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain

    def fold(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        return x.view(b, s, 4, 4).transpose(1, 2).reshape(b * 4, s, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        y = torch.matmul(x, self.out)
        q, k, v = (
            self.fold(t) for t in (torch.matmul(self.norm(y), self.qkv) + self.bias).split(16, -1)
        )
        a = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.5, -1)
        z = torch.bmm(a, v).view(b, 4, s, 4).transpose(1, 2).reshape(b, s, c)
        y = y + z
        mean = y.mean(-1, keepdim=True)
        y = (y - mean) / torch.sqrt(((y - mean) ** 2).mean(-1, keepdim=True) + 1e-5)
        y = y + torch.matmul(F.gelu(torch.matmul(y, self.w1)), self.w2)
        return self.head(y.mean(1))


MORE: dict[str, Any] = {
    "inverted_residual": lambda: image_network(InvertedResidual(), 3, 8, 8),
    "grouped": lambda: image_network(Grouped(), 3, 8, 8),
    "by_hand": lambda: image_network(ByHand(), 5, 16),
    "weights_attention": lambda: image_network(Encoder(), 5, 16),
}


class Encoder(nn.Module):
    """torch.nn.MultiheadAttention on its slow path, which folds the heads into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.out(self.attention(y, y, y, need_weights=True)[0])


@pytest.mark.parametrize("name", [*NETWORKS, *MORE])
def test_pruned_equals_the_masked_reference_or_refuses(name: str) -> None:
    torch.manual_seed(0)
    original = MORE[name]() if name in MORE else build(name)
    before = copy.deepcopy(original.module.state_dict())
    method = ChannelPruning(keep=0.5, round_to=1, normalised=True, head_dims=True)
    plan = method.plan(original)
    pruned = applied(plan, original)
    assert all(
        torch.equal(before[key], value) for key, value in original.module.state_dict().items()
    )
    assert Plan.from_json(plan.to_json()) == plan
    # The plan proved itself while it was applied; other inputs must agree as well.
    assert prove(original, pruned, plan, seed=7) <= 1e-5
    assert total(pruned) <= 0.5 * total(original)
    assert pruned.traced.batched == original.traced.batched
    assert pruned.traced.outputs == original.traced.outputs
    assert {n for n, _ in pruned.module.named_parameters()} == {
        n for n, _ in original.module.named_parameters()
    }
    torch.stack(
        [o.float().pow(2).sum() for o in call(pruned.module, pruned.batch(5))]
    ).sum().backward()
    touched = [p for p in pruned.module.parameters() if p.grad is not None and p.grad.any()]
    assert touched


@pytest.mark.parametrize("keep", [0.75, 0.25])
def test_resnet20_keeps_its_class_and_reaches_the_target(resnet: Network, keep: float) -> None:
    plan = ChannelPruning(keep=keep).plan(resnet)
    pruned: Any = applied(plan, resnet)
    assert type(pruned.module) is ResNet20
    assert keep - 0.1 <= total(pruned) / total(resnet) <= keep
    block = untyped(pruned.module).blocks[0]
    assert block.conv1.out_channels == block.bn1.num_features
    widths = [m.out_channels for m in pruned.module.modules() if isinstance(m, nn.Conv2d)]
    assert all(width % 4 == 0 for width in widths)
    for name, dims in kept(plan).items():
        for dim, indices in dims.items():
            smaller = pruned.module.state_dict()[name]
            assert smaller.shape[dim] == len(indices)
            assert not torch.equal(smaller, resnet.module.state_dict()[name])


def test_what_is_kept_is_what_is_left(small: Network) -> None:
    plan = ChannelPruning(keep=0.5).plan(small)
    pruned = applied(plan, small)
    left = small.module.state_dict()
    for name, dims in kept(plan).items():
        for dim, indices in dims.items():
            left[name] = left[name].index_select(dim, torch.tensor(indices))
    assert all(torch.equal(left[key], value) for key, value in pruned.module.state_dict().items())


def test_plans_are_deterministic_and_keeping_everything_changes_nothing(small: Network) -> None:
    plan = ChannelPruning(keep=0.5).plan(small)
    assert plan == ChannelPruning(keep=0.5).plan(small)
    first, second = (plan.apply(small).module.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert ChannelPruning(keep=1.0).plan(small) == Plan()
    groups = channel_groups(small.traced).groups
    everything = Plan(tuple(Slice.of(group, range(group.size)) for group in groups))
    for unchanged in (Plan(), everything):
        state = unchanged.apply(small).module.state_dict()
        assert all(torch.equal(state[k], v) for k, v in small.module.state_dict().items())


def test_hugging_face_attributes_follow() -> None:
    original = build("causal_lm")
    pruned: Any = applied(ChannelPruning(keep=0.5, round_to=1).plan(original), original)
    assert type(pruned.module) is type(original.module)
    layer = untyped(pruned.module).model.layers[0]
    head_dim = layer.self_attn.head_dim
    keys, queries = (p.weight.shape[0] for p in (layer.self_attn.k_proj, layer.self_attn.q_proj))
    assert layer.self_attn.num_key_value_groups == queries // keys
    assert layer.mlp.down_proj.in_features == layer.mlp.gate_proj.out_features
    assert queries % head_dim == 0 and queries < 16


def test_whole_heads_leave_and_the_residual_width_stays() -> None:
    original = build("encoder")
    plan = ChannelPruning(keep=0.5).plan(original)
    kinds = {g.name: g.kind for g in channel_groups(original.traced).groups}
    assert {kinds[edit.group] for edit in plan.edits} == {"head", "neuron"}  # type: ignore[attr-defined]
    pruned: Any = applied(plan, original).module
    attention: Any = pruned.bert.encoder.layer[0].attention.self
    assert (
        attention.all_head_size == attention.num_attention_heads * 4 == attention.query.out_features
    )
    assert pruned.bert.embeddings.word_embeddings.embedding_dim == 16


@pytest.mark.parametrize("name", ["by_hand", "weights_attention"])
def test_heads_folded_into_the_batch_are_found(name: str) -> None:
    kinds = [(g.kind, g.size) for g in channel_groups(MORE[name]().traced).groups]
    assert ("head", 4) in kinds
    assert ("neuron", 4) not in kinds


def test_the_proof_finds_a_wrong_network(small: Network) -> None:
    plan = ChannelPruning(keep=0.5).plan(small)
    wrong = applied(plan, small)
    with torch.no_grad():
        next(wrong.module.parameters())[0] += 0.5
    with pytest.raises(RefusedError, match="masked reference"):
        prove(small, wrong, plan)


def test_the_proof_names_the_operator(small: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> fx.GraphModule:
        graph = right(*arguments)
        node = next(n for n in graph.graph.nodes if n.name == "relu_1")
        node.target = torch.ops.aten.tanh.default
        graph.recompile()
        return graph

    right = slicing.sliced_graph
    monkeypatch.setattr(slicing, "sliced_graph", wrong)
    with pytest.raises(RefusedError, match="first at relu_1"):
        applied(ChannelPruning(keep=0.5).plan(small), small)


def test_masking_a_norm_uses_the_kept_positions_only() -> None:
    module = untyped(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)))
    network = image_network(module, 4)
    channels = channel_groups(network.traced)
    (group,) = channels.groups
    keep = torch.tensor([0, 2, 3])
    found = masked_outputs(network.traced, channels, {group.atom: keep}, network.example)[0]
    hidden = F.layer_norm(module[0](network.example["input"])[:, keep], (3,))
    expected = hidden @ module[2].weight[:, keep].T + module[2].bias
    assert torch.allclose(found, expected, atol=1e-6)


def test_magnitude_by_hand() -> None:
    module = untyped(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 5.0]]))
        module[2].weight.copy_(torch.tensor([[1.0, 1.0, 1.0]]))
    network = image_network(module, 2)
    groups = channel_groups(network.traced).groups
    scores = Magnitude().scores(network, groups)["0"]
    assert torch.allclose(scores**2, torch.tensor([2.5, 1.0, 2.5], dtype=torch.float64))
    plan = ChannelPruning(keep=0.7, round_to=1).plan(network)
    assert plan.edits[0].kept == (0, 2)  # type: ignore[attr-defined]
    assert (
        Random(1).scores(network, groups)["0"].tolist()
        == Random(1).scores(network, groups)["0"].tolist()
    )


def test_parameters_as_target(small: Network) -> None:
    plan = ChannelPruning(keep=0.3, of="parameters").plan(small)
    count = sum(p.numel() for p in applied(plan, small).module.parameters())
    assert count <= 0.3 * sum(p.numel() for p in small.module.parameters())


def test_impossible_targets_say_the_least_possible(small: Network) -> None:
    with pytest.raises(RefusedError, match=r"least possible .* is \d+\.\d%"):
        ChannelPruning(keep=0.001).plan(small)
    for wrong in ({"keep": 0.0}, {"keep": 1.5}, {"of": "seconds"}, {"round_to": 0}):
        with pytest.raises(InputError):
            ChannelPruning(**wrong)  # type: ignore[arg-type]


def test_scores_that_are_not_finite_are_refused() -> None:
    class Broken(Criterion):
        name = "broken"

        def scores(
            self, network: Network, groups: Any, statistics: Any = None
        ) -> dict[str, Tensor]:
            return {g.name: torch.full((g.size,), torch.nan) for g in groups}

    with pytest.raises(RefusedError, match="not finite"):
        ChannelPruning(criterion=Broken()).plan(build("mlp"))


def test_a_plan_of_another_network_is_refused() -> None:
    plan = ChannelPruning(keep=0.5).plan(build("mlp"))
    with pytest.raises(RefusedError, match=r"no such channel group|channels there"):
        applied(plan, build("generator"))
