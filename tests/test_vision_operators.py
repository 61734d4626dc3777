"""Operators of vision, generative and audio networks: each network is cut to half, which proves it against the masked reference."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tinier.edits.base import Plan
from tinier.edits.slice import Slice, prove
from tinier.graph.axes import Atom, Mismatch, concat, resolve, unify
from tinier.graph.groups import channel_groups
from tinier.graph.macs import Cost, mac_terms
from tinier.methods.channel_pruning import ChannelPruning
from tinier.network import Network, name_inputs
from tinier.sources.load import load


def half(module: nn.Module, *shape: int, **options: Any) -> tuple[Network, Network]:
    """A network with random parameters, and what pruning to half of its MACs makes of it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    example = name_inputs(module, torch.randn(3, *shape, generator=generator))
    network = Network(module.eval(), example)
    plan = ChannelPruning(keep=0.5, round_to=1, **options).plan(network)
    pruned = plan.apply(network)
    assert prove(network, pruned, plan, seed=3) <= 1e-5
    cost = [Cost(mac_terms(n.traced, channel_groups(n.traced))).at({}) for n in (network, pruned)]
    assert 0 < cost[1] <= 0.5 * cost[0]
    inputs = {name: torch.randn(5, *shape, generator=generator) for name in example}
    assert all(out.shape[0] == 5 for out in pruned(inputs))
    return network, pruned


class Standardised(nn.Conv2d):
    """Weight standardisation as NFNet and BiT do it: a batch norm in training over the weight."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=1)


def test_standardised_weights_are_cut() -> None:
    """The statistics of a filter are those of the inputs that are left, which is no reason to keep the width."""
    layers = [Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 12, 3), nn.ReLU()]
    network, pruned = half(nn.Sequential(*layers, nn.Conv2d(12, 4, 1)), 3, 6, 6)
    groups = channel_groups(network.traced).groups
    assert [(g.size, g.kind) for g in groups] == [(8, "channel"), (12, "channel")]
    # By hand: the standardised weight of the kept part.
    first = next(module for module in pruned.module.modules() if isinstance(module, Standardised))
    weight = first.weight.detach()
    mean = weight.mean((1, 2, 3), keepdim=True)
    by_hand = (weight - mean) / (weight.var((1, 2, 3), correction=0, keepdim=True) + 1e-6).sqrt()
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(first(x), F.conv2d(x, by_hand, first.bias, padding=1))


def test_activations_normalised_by_their_own_batch_stay() -> None:
    """Over activations the same operator makes a normalised group of what it runs over."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.batch_norm(self.a(x), None, None, training=True))

    network = Network(Net().eval(), {"x": torch.randn(3, 5, 6)})
    kinds = {group.kind for group in channel_groups(network.traced).groups}
    assert kinds == {"normalised"}


def test_spectral_norm_is_cut_with_its_vectors() -> None:
    norm = parametrizations.spectral_norm
    layers = [norm(nn.Conv2d(3, 8, 3)), nn.LeakyReLU(), norm(nn.Conv2d(8, 10, 3)), nn.Flatten()]
    _, pruned = half(nn.Sequential(*layers, nn.Linear(40, 4)), 3, 6, 6)
    shapes = {name: tuple(tensor.shape) for name, tensor in pruned.module.named_buffers()}
    parameters = dict(pruned.module.named_parameters())
    for layer in ("0", "2"):
        original = parameters[f"{layer}.parametrizations.weight.original"]
        assert shapes[f"{layer}.parametrizations.weight.0._u"] == (original.shape[0],)
        assert shapes[f"{layer}.parametrizations.weight.0._v"] == (original[0].numel(),)


class PerExample(nn.Module):
    """StyleGAN2: every example has a filter of its own, one group of a convolution for each."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(6, 2, 1)
        self.weight, self.style = nn.Parameter(torch.randn(1, 6, 8, 3, 3)), nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        style = self.style(x.mean((2, 3)))
        weight = self.weight * style.view(batch, 1, 8, 1, 1)
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        y = self.into(x).reshape(1, batch * 8, *x.shape[2:])
        y = F.conv2d(y, weight.view(batch * 6, 8, 3, 3), padding=1, groups=batch)
        return self.out(y.view(batch, 6, *x.shape[2:]))


def test_a_filter_for_each_example() -> None:
    network, pruned = half(PerExample(), 3, 5, 5)
    assert {group.size for group in channel_groups(network.traced).groups} == {8, 6}
    # Each example alone gives what it gives among others.
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    together = pruned({"x": x})[0]
    alone = torch.cat([pruned({"x": x[[i, i]]})[0][:1] for i in range(4)])
    torch.testing.assert_close(together, alone)


class ZeroKeys(nn.Module):
    """SwinV2: the bias of the keys is set to zero in place, through a view of a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias.clone()
        bias[8:16].zero_()
        qkv = F.linear(x, self.qkv.weight, bias).view(*x.shape[:2], 3, 4, 2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def test_a_view_written_in_place_changes_its_base_in_the_reference() -> None:
    network, _ = half(ZeroKeys(), 5, 8)
    assert {group.kind for group in channel_groups(network.traced).groups} == {"head", "head_dim"}


class Diagonal(nn.Module):
    """diffusers' UNet1D: a kernel is written along the diagonal of a filter."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 8, 3)
        self.register_buffer("kernel", torch.tensor([0.25, 0.5, 0.25]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        weight = y.new_zeros(8, 8, 3)
        places = torch.arange(8)
        weight[places, places] = self.kernel[None].expand(8, -1)
        return self.out(F.conv1d(y, weight))


def test_a_filter_with_a_kernel_on_its_diagonal() -> None:
    network = Network(Diagonal().eval(), {"x": torch.randn(3, 2, 12)})
    (group,) = channel_groups(network.traced).groups
    plan = Plan((Slice.of(group, (0, 3, 4)),))
    pruned = plan.apply(network)  # position 0 stays: what was cut must not be put there
    assert prove(network, pruned, plan, seed=1) <= 1e-5


class Enlarge(nn.Module):
    """diffusers' AutoencoderDC: channels are repeated, with the size of the result said beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        return self.out(y.repeat_interleave(2, 1, output_size=16).relu())


def test_repeated_channels_of_a_given_number() -> None:
    network = Network(Enlarge().eval(), {"x": torch.randn(3, 3, 4, 4)})
    group = channel_groups(network.traced).group("into")
    assert group is not None
    plan = Plan((Slice.of(group, (1, 2, 6)),))
    pruned = plan.apply(network)
    assert prove(network, pruned, plan, seed=1) <= 1e-5
    weights = {name: tuple(p.shape) for name, p in pruned.module.named_parameters()}
    assert weights["into.weight"][0] == 3
    assert weights["out.weight"][1] == 6


def test_norms_without_weights_say_their_width() -> None:
    """Their width is an attribute alone, of which torch warns where it is another than that of what comes in."""
    layers = [nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.Conv2d(8, 12, 3)]
    norm = nn.BatchNorm2d(12, affine=False)
    _, pruned = half(nn.Sequential(*layers, norm, nn.Conv2d(12, 4, 1)), 3, 8, 8)
    assert isinstance(pruned.module, nn.Sequential)
    widths = [layer.weight.shape[0] for layer in pruned.module if isinstance(layer, nn.Conv2d)]
    assert [pruned.module[1].num_features, pruned.module[3].num_features] == widths[:2]


class Frames(nn.Module):
    """DNSMOS: overlapping frames of a signal by two views of it, one of them shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.cat([x[:, :-4].reshape(-1, 40, 4), x[:, 4:].reshape(-1, 40, 4)], 2)
        return self.out(self.into(frames).relu())


def test_overlapping_frames_end() -> None:
    network, _ = half(Frames(), 164)
    pins = {why.reason for pinned in channel_groups(network.traced).pins for why in pinned.pins}
    assert any("given by the network's input" in reason for reason in pins)


def test_an_axis_that_meets_itself_shifted() -> None:
    """Halves that swap places become one; what overlaps itself has no common form but single positions."""
    first, second = Atom(8), Atom(8)
    unify(concat(first, second), concat(second, first))  # rotary embeddings
    assert resolve(first) is resolve(second)
    one, many, other = Atom(2), Atom(900), Atom(2)
    with pytest.raises(Mismatch, match="shifted"):
        unify(concat(one, many), concat(many, other))


def test_an_onnx_resize_by_scales(tmp_path: Path) -> None:
    """The scales are floats of a constant, which are numbers of the graph and no data; the batch stays free."""
    torch_like = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"]),
        helper.make_node("Resize", ["a", "", "scales"], ["b"], mode="nearest", **torch_like),
        helper.make_node("Conv", ["b", "w"], ["y"]),
    ]
    tensors = {
        "v": torch.randn(8, 3, 1, 1).numpy(),
        "w": torch.randn(2, 8, 1, 1).numpy(),
        "scales": torch.tensor([1.0, 1, 2, 2]).numpy(),
    }
    graph = helper.make_graph(
        nodes,
        "resize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2, 12, 12])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    path = tmp_path / "resize.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path
    )
    network = load(path, {"x": torch.randn(2, 3, 6, 6)})
    assert network.traced.batched
    assert [group.size for group in channel_groups(network.traced).groups] == [8]
