"""Outlier channels in float: the function stays, the error falls, the file has both products, nothing is split that does not pay."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import tinier
from tinier.edits.assign import Fold
from tinier.edits.base import Plan
from tinier.edits.outliers import SplitOutliers
from tinier.edits.quantize import QuantizeWeight
from tinier.errors import InputError, RefusedError
from tinier.methods.outlier_channels import OutlierChannels
from tinier.network import Network
from tinier.statistics import Statistics

WILD = {5: 60.0, 40: 30.0}  # channel → how much larger than the others


class Layers(nn.Module):
    """Two layers that read the input, of which one is a product with a matrix, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(64, 48), nn.Linear(48, 10)
        self.b = nn.Parameter(torch.randn(64, 48) / 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.c(torch.relu(self.a(x)) + torch.tanh(torch.mm(x, self.b)))
        return found


def made(wild: dict[int, float] = WILD) -> tuple[Network, Tensor, Tensor]:
    """A network, data, and other data, with wild channels whose weights are small, so that the others matter as much."""
    torch.manual_seed(0)
    model = Layers().eval()
    data, other = torch.randn(96, 64), torch.randn(96, 64)
    for channel, factor in wild.items():
        for x in (data, other):
            x[:, channel] *= factor
        with torch.no_grad():
            model.a.weight[:, channel] /= factor
            model.b[channel] /= factor
    return Network(model, {"x": data[:2]}), data, other


def error(found: nn.Module, network: Network, x: Tensor) -> float:
    with torch.no_grad():
        wanted = network.module(x)
        return float((found(x) - wanted).norm() / wanted.norm())


def splits(plan: Plan) -> list[SplitOutliers]:
    return [edit for edit in plan.edits if isinstance(edit, SplitOutliers)]


def test_the_float_function_stays() -> None:
    network, _, x = made()
    plan = Plan((Fold(), SplitOutliers("x", (5, 40, 7), ("a.weight", "b"))))
    split = plan.apply(network)
    assert error(split.module, network, x) < 1e-6
    a, second = (split.module.get_parameter(n) for n in ("a.weight", "a.weight_outliers"))
    assert torch.equal(second, network.module.get_parameter("a.weight")[:, [5, 40, 7]])
    assert not a[:, [5, 40, 7]].any() and a[:, :5].all()
    assert split.module.get_parameter("b_outliers").shape == (3, 48)
    assert Plan.from_json(plan.to_json()) == plan
    assert torch.equal(plan.apply(network).module(x), split.module(x))


@pytest.mark.parametrize("edit", [
    SplitOutliers("nowhere", (1,), ("a.weight",)),
    SplitOutliers("x", (64,), ("a.weight",)),
    SplitOutliers("x", (1, 1), ("a.weight",)),
    SplitOutliers("x", (), ("a.weight",)),
    SplitOutliers("x", (1,), ("c.weight",)),
    SplitOutliers("x", (1,), ("d.weight",)),
])  # fmt: skip
def test_edits_that_do_not_fit_are_refused(edit: SplitOutliers) -> None:
    with pytest.raises(RefusedError):
        Plan((edit,)).apply(made()[0])


@pytest.mark.parametrize("activations", [8, "dynamic", "dynamic_per_token"])
def test_the_wild_channels_are_found_and_the_error_falls(activations: int | str) -> None:
    network, data, other = made()
    plain, done = (
        tinier.quantize(network, data=data, activations=activations, corrections=c)
        for c in ((), "outlier_channels")
    )
    (edit,) = splits(done.plan)
    assert edit.channels == (5, 40) and set(edit.weights) == {"a.weight", "b"}
    assert error(done.model, network, other) < 0.25 * error(plain.model, network, other)
    integers = {e.tensor for e in done.plan.edits if isinstance(e, QuantizeWeight)}
    assert integers == {"a.weight", "b", "c.weight"}
    assert torch.equal(done.plan.apply(network).module(other), done.model(other))


def test_nothing_is_split_where_no_channel_is_wild() -> None:
    network, data, _ = made({})
    done = tinier.quantize(network, data=data, corrections="outlier_channels")
    assert not splits(done.plan)
    assert any("no channel is worth" in note for note in done.notes)
    float_layers = tinier.quantize(
        made()[0], data=made()[1], corrections="outlier_channels", exclude=["a", "b"]
    )
    assert not splits(float_layers.plan), "layers that stay float are not split"


def test_one_channel_of_one_layer_is_where_the_error_says() -> None:
    """Of all single channels and none, what is chosen leaves the least error of the layers' results."""
    network, data, _ = made({9: 100.0})
    method = OutlierChannels(ranges="minmax", weight_ranges="minmax", share=0.02)
    statistics = Statistics({}, len(data), samples=({"x": data},))
    folded = Plan((Fold(),)).apply(network)
    (edit,) = splits(method.plan(folded, statistics))
    weights = [network.module.get_parameter("a.weight"), network.module.get_parameter("b").T]

    def wrong(channel: int | None) -> float:
        x, total = data[0::2].clone(), 0.0
        keep = torch.ones(64)
        if channel is not None:
            keep[channel] = 0
        low, high = (x * keep).aminmax()
        step = (high.clamp(min=0) - low.clamp(max=0)) / 255
        zero = (-low / step).round()
        rounded = (((x * keep) / step).round() + zero).clamp(0, 255).sub(zero) * step
        for weight in weights:
            inner = weight.detach() * keep
            scale = inner.abs().amax(1, keepdim=True) / 127
            outer = x * (1 - keep) @ weight.detach().T
            y, z = x @ weight.detach().T, rounded @ ((inner / scale).round() * scale).T + outer
            total += float((y - z).square().sum() / y.square().sum())
        return total

    best = min([None, *range(64)], key=wrong)
    assert edit.channels == (best,) == (9,)
    with pytest.raises(InputError, match="needs examples"):
        method.plan(folded)
    with pytest.raises(InputError, match=r"share=1\.0"):
        OutlierChannels(share=1.0)


@pytest.mark.parametrize("activations", [8, "dynamic", "dynamic_per_token"])
def test_the_file_has_both_products(tmp_path: Path, activations: int | str) -> None:
    network, data, _ = made()
    done = tinier.quantize(
        network, data=data, activations=activations, corrections="outlier_channels"
    )
    written = tinier.deliver(done, tmp_path / "out", data=data)
    assert all(row.passed and not row.skipped for row in written.parity["onnxruntime"].rows)
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    (gather,) = (node for node in graph.node if node.op_type == "Gather")
    assert np.array_equal(constants[gather.input[1]], [5, 40])
    products = [n for n in graph.node if gather.output[0] in n.input]
    assert [n.op_type in ("MatMul", "Gemm") for n in products] == [True, True]
    # Two of 64 inputs of two layers are in float.
    macs = written.as_dict(done)["macs"]
    assert macs["all"] == 64 * 48 * 2 + 48 * 10


def test_it_goes_with_training_and_other_corrections() -> None:
    network, data, other = made()
    both = tinier.quantize(
        network,
        data=data,
        bits=4,
        corrections=("outlier_channels", "bias_correction", "smooth_quant"),
    )
    assert error(both.model, network, other) < 0.3
    split = tinier.quantize(network, data=data, bits=4, corrections="outlier_channels")
    trained = tinier.recover(split, data, epochs=1)
    assert splits(trained.plan) == splits(split.plan)
    assert torch.equal(trained.plan.apply(network).module(other), trained.model(other))


def test_floats_have_no_outliers() -> None:
    network, data, _ = made()
    with pytest.raises(InputError, match="outlier_channels is for activations that are rounded"):
        tinier.quantize(network, data=data, activations=None, corrections=["outlier_channels"])
    with pytest.raises(InputError, match="needs data"):
        tinier.quantize(network, activations="dynamic", corrections=["outlier_channels"])
