"""Multiply-accumulates against the formulas of the papers, and as a function of what is kept."""

import pytest
import torch
from torch import Tensor, nn

from networks import build
from tinier.demo.resnet import ResNet20
from tinier.edits.slice import Slice
from tinier.graph.groups import channel_groups
from tinier.graph.macs import Cost, describe, mac_terms, macs, parameter_terms
from tinier.methods.channel_pruning import ChannelPruning
from tinier.network import Network


def network(module: nn.Module, *shape: int, batch: int = 2) -> Network:
    return Network(module.eval(), {"x": torch.randn(batch, *shape)})


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_layers_by_formula_at_batch_one(batch: int) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, padding=1)
            self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
            self.up = nn.ConvTranspose2d(6, 2, 2, stride=2)
            self.fc = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.up(self.depthwise(self.conv(x))))

    counts = list(macs(network(Layers(), 4, 8, 8, batch=batch).traced).values())
    assert counts == [64 * 6 * 4 * 9, 36 * 6 * 9, 36 * 6 * 2 * 4, 2 * 12 * 12 * 5]


def test_attention_counts_both_products() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert sum(macs(network(Attention(), 3, 7, 4).traced).values()) == 2 * 3 * 7 * 7 * 4


def test_resnet20_has_31_million() -> None:
    traced = network(ResNet20(), 1, 28, 28).traced
    # He et al. 2015 count 41 M for 32 × 32 colour images; 28 × 28 grey ones have 0.77 of the positions.
    assert sum(macs(traced).values()) == pytest.approx(31e6, rel=0.01)
    rows = describe(traced)
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in ResNet20().parameters())
    assert rows[0].layer == "conv1" and rows[0].shape == (0, 16, 28, 28)
    assert sum(row.macs for row in rows) == sum(macs(traced).values())


@pytest.mark.parametrize("name", ["grouped_cnn", "vit"])
def test_cost_of_kept_sizes_is_the_cost_of_the_pruned_network(name: str) -> None:
    original = build(name)
    traced = original.traced
    channels = channel_groups(traced)
    plan = ChannelPruning(keep=0.6).plan(original)
    kept = {edit.group: len(edit.kept) for edit in plan.edits}  # type: ignore[attr-defined]
    sizes = {g.atom: kept[g.name] for g in channels.groups if g.name in kept}
    pruned = Slice.apply_all(list(plan.edits), original)
    assert round(Cost(mac_terms(traced, channels)).at(sizes)) == sum(macs(pruned.traced).values())
    smaller = dict(pruned.traced.module.named_parameters())
    for term in parameter_terms(traced, channels):
        assert term.at(sizes) == smaller[term.name].numel()


def test_change_is_the_difference() -> None:
    traced = build("dense_cnn").traced
    channels = channel_groups(traced)
    cost, atom = Cost(mac_terms(traced, channels)), channels.groups[0].atom
    expected = cost.at({atom: 1}) - cost.at({})
    assert cost.change({}, atom, 1) == pytest.approx(expected)
