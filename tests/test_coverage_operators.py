"""Forms of operators that the coverage table met: each is pruned and equals its masked reference."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinier.edits.base import Plan
from tinier.edits.slice import Slice, prove
from tinier.graph.groups import Channels, Group, channel_groups
from tinier.network import Network

BATCH, LENGTH, WIDTH = 2, 6, 8


def halved(network: Network) -> tuple[Channels, Plan]:
    """Every group cut to half its channels, the odd ones, so that no prefix is right by luck."""
    channels = channel_groups(network.traced)
    edits = [Slice.of(group, range(1, group.size, 2)) for group in channels.groups if group.size > 1]
    return channels, Plan(tuple(edits))


def check(module: nn.Module, example: Mapping[str, Tensor], cut: str) -> Network:
    """Prune, and see that it is equal, at other batch sizes too, and that the parameter ``cut`` became smaller."""
    network = Network(module.eval(), example)
    channels, plan = halved(network)
    pruned = plan.apply(network)
    assert prove(network, pruned, plan) <= 1e-5
    before = network.traced.module.get_parameter(cut).numel()
    after = pruned.traced.module.get_parameter(cut).numel()
    assert after < before, f"{cut} was not cut: {channels}"
    for size in (1, 5):
        assert pruned(network.batch(size))[0].shape == network(network.batch(size))[0].shape
    return pruned


def reasons(module: nn.Module, example: Mapping[str, Tensor]) -> set[str]:
    """Operators that pin something, whatever it is."""
    channels = channel_groups(Network(module.eval(), example).traced)
    return {why.operator for pinned in channels.pins for why in pinned.pins}


def group(channels: Channels, parameter: str, dim: int) -> Group:
    return next(
        found
        for found in channels.groups
        if any(slot.parameter == parameter and slot.dim == dim for slot in found.slots)
    )


class FoldedHeads(nn.Module):
    """Batch and heads in one axis while the length is open: two sizes that no −1 can stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, WIDTH)
        self.query, self.key = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.value, self.out = nn.Linear(WIDTH, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        batch, length, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, length, 4, 4).permute(0, 2, 1, 3).reshape(batch * 4, -1, 4)

        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        y = torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v
        y = y.reshape(batch, 4, length, 4).transpose(1, 2).reshape(batch, length, 16)
        return self.out(y)


def test_two_open_sizes() -> None:
    ids = torch.randint(12, (BATCH, LENGTH))
    pruned = check(FoldedHeads(), {"ids": ids}, "value.weight")
    longer = torch.randint(12, (BATCH + 1, LENGTH + 2))
    assert pruned({"ids": longer})[0].shape == (BATCH + 1, LENGTH + 2, 3)
