"""Forms of operators that the coverage table met: each is pruned and equals its masked reference."""

import importlib
from collections.abc import Mapping
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinier.edits.base import Plan
from tinier.edits.proof import random_inputs
from tinier.edits.slice import Slice, prove
from tinier.graph.groups import Channels, Group, channel_groups
from tinier.network import Network
from tinier.targets.onnx_file import write_onnx

BATCH, LENGTH, WIDTH = 2, 6, 8


def halved(network: Network) -> tuple[Channels, Plan]:
    """Every group cut to half its channels, the odd ones, so that no prefix is right by luck."""
    channels = channel_groups(network.traced)
    edits = [
        Slice.of(group, range(1, group.size, 2)) for group in channels.groups if group.size > 1
    ]
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


class Losses(nn.Module):
    """A network that returns losses between its hidden states, as codebooks do."""

    def __init__(self, loss: str, reduction: str) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, WIDTH), nn.Linear(5, WIDTH)
        self.out = nn.Linear(WIDTH, 3)
        self.loss, self.reduction = getattr(F, loss), reduction

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = torch.sigmoid(self.left(x)), torch.sigmoid(self.right(x))
        loss = self.loss(left, right, reduction=self.reduction)
        left, right = torch.broadcast_tensors(left, right[:, :1])
        return self.out(left + right), loss.sum(0) if loss.ndim == 3 else loss


LOSSES = ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy"]
LOSSES += ["binary_cross_entropy_with_logits"]


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [("kl_div", "sum"), *((loss, how) for loss in LOSSES for how in ("mean", "sum"))],
)
def test_losses(loss: str, reduction: str) -> None:
    torch.manual_seed(0)
    check(Losses(loss, reduction), {"x": torch.randn(BATCH, 4, 5)}, "left.weight")


class OfType(nn.Module):
    """A table that takes its type from activations of another batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.inner, self.out = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.out(y + self.place.type_as(y))


def test_type_as_passes_the_first_operand_alone() -> None:
    torch.manual_seed(0)
    check(OfType(), {"x": torch.randn(BATCH, 4, 5)}, "place")


class Norms(nn.Module):
    def __init__(self, order: float | None) -> None:
        super().__init__()
        self.order = order
        self.inner, self.out = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.out(y / torch.linalg.norm(y, self.order, dim=-1, keepdim=True))


@pytest.mark.parametrize("order", [None, 1.0, 3.0, float("inf")])
def test_norms(order: float | None) -> None:
    torch.manual_seed(0)
    check(Norms(order), {"x": torch.randn(BATCH, 4, 5)}, "inner.weight")


def test_a_norm_of_negative_order_sees_zeros() -> None:
    assert "linalg_norm" in reasons(Norms(-1.0), {"x": torch.randn(BATCH, 4, 5)})


class Sampled(nn.Module):
    """Draws noise while it runs: inside (``like``), or of a shape that no channel decides."""

    def __init__(self, like: bool) -> None:
        super().__init__()
        self.like = like
        self.mean, self.inner = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(2 * WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x)
        noise = torch.randn_like(mean) if self.like else torch.rand(4, 1)
        return self.out(torch.relu(self.inner(mean + noise)))


@pytest.mark.parametrize("like", [False, True])
def test_random_operators(like: bool) -> None:
    """What noise is drawn for stays whole, everything else is cut, and both sides of the proof draw the same."""
    torch.manual_seed(0)
    example = {"x": torch.randn(BATCH, 4, 5)}
    network = Network(Sampled(like).eval(), example)
    _, plan = halved(network)
    pruned = plan.apply(network)
    assert prove(network, pruned, plan) <= 1e-5
    assert pruned.traced.module.get_parameter("inner.weight").shape[0] == WIDTH
    assert pruned.traced.module.get_parameter("mean.weight").shape[0] == (
        WIDTH if like else WIDTH // 2
    )


class ChannelAttention(nn.Module):
    """Attention whose keys are channels (DaViT, XCiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(5, WIDTH), nn.Linear(5, WIDTH)
        self.value, self.out = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))


def test_attention_over_channels() -> None:
    torch.manual_seed(0)
    check(ChannelAttention(), {"x": torch.randn(BATCH, 6, 5)}, "key.weight")


class Deformable(nn.Module):
    """Samples each head's channels at places of its own: heads folded into the batch of image and grid."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.place = nn.Conv2d(3, 16, 1), nn.Linear(5, 4 * 2)
        self.out = nn.Linear(16, 3)

    def forward(self, image: Tensor, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        value = self.value(image).reshape(batch * 4, 4, *image.shape[2:])
        grid = torch.tanh(self.place(x)).view(batch, length, 4, 2).transpose(1, 2)
        grid = grid.reshape(batch * 4, length, 1, 2)
        y = F.grid_sample(value, grid, align_corners=False)
        return self.out(y.view(batch, 16, length).transpose(1, 2))


def test_grids_have_the_batch_of_their_images() -> None:
    torch.manual_seed(0)
    example = {"image": torch.randn(BATCH, 3, 8, 8), "x": torch.randn(BATCH, 6, 5)}
    pruned = check(Deformable(), example, "place.weight")
    assert pruned.traced.module.get_parameter("place.weight").shape == (4, 5)


def test_placeholders_stay_in_random_inputs() -> None:
    """Tokens that are the same in every row keep their places, the others are drawn."""
    ids = torch.tensor([[1, 9, 9, 4, 5, 6, 7], [1, 9, 9, 6, 7, 8, 3]])
    found = random_inputs(Network(FoldedHeads(), {"ids": ids}), seed=0)["ids"]
    assert found[:, :3].tolist() == [[1, 9, 9]] * 3
    assert set(found[:, 3:].flatten().tolist()) <= {3, 4, 5, 6, 7, 8}
    assert len(found[:, 3:].unique(dim=0)) == 3


class Experts(nn.Module):
    """Rows sorted by expert, one matrix each, by the operator that transformers traces to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(3, 5, WIDTH))
        self.out = nn.Parameter(torch.randn(3, WIDTH, 4))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        product = torch.ops.transformers.grouped_mm_fallback
        return product(torch.relu(product(x, self.inner, ends)), self.out, ends)


def test_grouped_products_are_written_as_onnx(tmp_path: Path) -> None:
    importlib.import_module("transformers.integrations.moe")  # registers the operator
    torch.manual_seed(0)
    example = {"x": torch.randn(7, 5), "ends": torch.tensor([2, 2, 7], dtype=torch.int32)}
    network = Network(Experts().eval(), example)
    write_onnx(network, tmp_path / "experts.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "experts.onnx")
    for ends in ([2, 2, 7], [0, 7, 7], [3, 5, 7]):
        inputs = {**example, "ends": torch.tensor(ends, dtype=torch.int32)}
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        torch.testing.assert_close(torch.as_tensor(found), network(inputs)[0])
