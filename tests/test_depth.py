"""Whole blocks leave: what is left equals the original that goes around them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tinier
from networks import build
from tinier.edits.base import Plan
from tinier.edits.drop import Drop
from tinier.errors import InputError, RefusedError
from tinier.graph.blocks import blocks
from tinier.graph.groups import channel_groups
from tinier.graph.macs import macs
from tinier.methods.depth_pruning import DepthPruning, output_changes
from tinier.network import Network


class Layer(nn.Module):
    """x + scale · W x: dropping it changes the output by as much as its scale."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 12)
        self.outer = nn.Linear(12, 6)
        with torch.no_grad():
            self.outer.weight.mul_(scale)
            self.outer.bias.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x).relu())


class Stack(nn.Module):
    def __init__(self, scales: tuple[float, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(scale) for scale in scales)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def stack(*scales: float) -> Network:
    torch.manual_seed(0)
    return Network(Stack(scales), {"x": torch.randn(4, 6)})


def found(network: Network) -> list[str]:
    return [block.path for block in blocks(network.traced, channel_groups(network.traced))]


def test_the_blocks_of_a_stack_are_its_layers() -> None:
    assert found(stack(1, 1, 1)) == ["layers.0", "layers.1", "layers.2"]


def test_a_plain_chain_has_no_blocks() -> None:
    network = Network(
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4)),
        {"input": torch.randn(2, 4)},
    )
    assert found(network) == []
    with pytest.raises(RefusedError, match="no block can be dropped"):
        DepthPruning(keep=0.5).plan(network)


def test_the_least_important_layer_leaves() -> None:
    network = stack(1.0, 0.01, 1.0)
    plan = DepthPruning(count=1).plan(network)
    assert [edit.row()[0] for edit in plan.edits] == ["layers.1"]
    assert Plan.from_json(plan.to_json()) == plan


def test_changes_against_networks_made_by_hand() -> None:
    network = stack(0.5, 1.0, 0.2)
    every = blocks(network.traced, channel_groups(network.traced))
    changes = output_changes(network, [], every, [network.example])
    x = network.example["x"]
    module: Any = network.module
    with torch.no_grad():
        whole = module(x).double()
        for index in range(3):
            y = x
            for number, layer in enumerate(module.layers):
                y = y if number == index else layer(y)
            other = module.head(y).double()
            wanted = (whole - other).square().sum() / (whole - whole.mean(0)).square().sum()
            assert changes[f"layers.{index}"] == pytest.approx(float(wanted), rel=1e-5)


def test_the_class_and_its_list_stay() -> None:
    network = stack(1.0, 0.5, 1.0, 0.1)
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    shallow = DepthPruning(keep=0.5).plan(network).apply(network)
    original: Any = network.module
    module: Any = shallow.module
    assert isinstance(module, Stack) and len(module.layers) == 2
    x = torch.randn(3, 6)
    expected = x
    for layer in (original.layers[0], original.layers[2]):
        expected = layer(expected)
    torch.testing.assert_close(shallow({"x": x})[0], original.head(expected).detach())
    assert all(
        torch.equal(before[name], tensor) for name, tensor in network.module.state_dict().items()
    )
    module(x).sum().backward()


@pytest.mark.parametrize("name", ["residual_cnn", "vit", "encoder", "causal_lm"])
def test_on_the_conformance_networks(name: str) -> None:
    network = build(name)
    paths = found(network)
    assert paths
    for path in paths:
        shallow = Plan((Drop(path, 0),)).apply(network)  # proved inside
        assert sum(p.numel() for p in shallow.module.parameters()) < sum(
            p.numel() for p in network.module.parameters()
        )
        assert shallow.traced.batched == network.traced.batched


def test_a_config_says_how_many_layers_are_left() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tinier.edits.config import standard

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        use_cache=False,
    )
    network = Network(LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(0, 30, (2, 5))})
    shallow = DepthPruning(count=1).plan(network).apply(network)
    module: Any = shallow.module
    assert module.config.num_hidden_layers == 2 and standard(module, shallow.example)
    assert [layer.self_attn.layer_idx for layer in module.model.layers] == [0, 1]


def test_what_cannot_be_dropped_is_refused() -> None:
    network = stack(1, 1)
    with pytest.raises(RefusedError, match="no such residual block"):
        Plan((Drop("head", 0),)).apply(network)
    with pytest.raises(
        RefusedError, match=r"3 blocks were to be dropped, there are 2: layers.0, layers.1"
    ):
        DepthPruning(count=3).plan(network)
    with pytest.raises(RefusedError, match="the smallest has 50%"):
        DepthPruning(keep=0.9).plan(network)
    for wrong in ({"keep": -0.1}, {"keep": 1.5}, {"count": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            DepthPruning(**wrong)  # type: ignore[arg-type]


def test_the_layers_of_an_encoder_leave_and_not_the_encoder() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    module = BertForSequenceClassification(config).eval()
    network = Network(module, {"input_ids": torch.randint(0, 30, (2, 5))})
    shallow = DepthPruning(count=2).plan(network).apply(network)
    layers: Any = shallow.module
    assert type(layers) is BertForSequenceClassification and len(layers.bert.encoder.layer) == 1
    before, after = (sum(macs(one.traced).values()) for one in (network, shallow))
    assert after < 0.5 * before


def dropped(plan: Plan) -> list[str]:
    return [edit.block for edit in plan.edits if isinstance(edit, Drop)]


@pytest.mark.parametrize(
    "exclude", ["layers.1", "layers.1.inner", "layers.1.inner.weight", "*1.outer", "layers.[12]"]
)
def test_what_is_excluded_keeps_its_block(exclude: str) -> None:
    network = stack(1.0, 0.01, 0.1, 1.0)  # the second one matters least
    assert dropped(DepthPruning(count=1).plan(network)) == ["layers.1"]
    plan = DepthPruning(count=1, exclude=(exclude,)).plan(network)
    assert dropped(plan) in (["layers.2"], ["layers.0"], ["layers.3"])
    assert exclude == "layers.[12]" or dropped(plan) == ["layers.2"]
    by_verb = tinier.prune(network, depth=1, keep=1.0, exclude=[exclude])
    assert by_verb.plan == plan


def test_a_whole_list_may_be_excluded() -> None:
    network = stack(1.0, 0.01)
    for depth in (1, 0.5):
        with pytest.raises(RefusedError, match="exclude="):
            tinier.prune(network, depth=depth, keep=1.0, exclude=["layers"])
    with pytest.raises(InputError, match=r"nothing is called layer\.1; did you mean layers\.1\?"):
        tinier.prune(network, depth=1, keep=1.0, exclude=["layer.1"])
