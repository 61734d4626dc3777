"""Static quantization: folding, statistics, placement, plans, and the simulation against the float network."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from networks import NETWORKS, inputs
from networks import build as build_network
from tinier.edits.base import Plan, Values
from tinier.edits.quantize import Quantize, QuantizeWeight
from tinier.errors import DataError, InputError, RefusedError
from tinier.graph.fold import fold
from tinier.graph.placement import place
from tinier.measure.parity import parity
from tinier.methods.quantization import Quantization
from tinier.network import Network
from tinier.statistics import collect
from tinier.targets.base import targets_for
from tinier.targets.onnx_file import write_onnx
from tinier.tensors.saturation import PAIR_LIMIT, pair_sums

# Without the large ones and those that only repeat an operator.
FAST = [n for n in NETWORKS if n not in ("causal_lm", "encoder", "vit", "gru")]
build = cache(build_network)  # nothing changes a network, so that one trace of each is enough


def batches(name: str, count: int = 2, size: int = 8) -> list[dict[str, Tensor]]:
    return [inputs(name, size, seed) for seed in range(10, 10 + count)]


def quantized(network: Network, data: list[dict[str, Tensor]], **options: object) -> Network:
    method = Quantization(**options)  # type: ignore[arg-type]
    return method.plan(network, collect(network, data)).apply(network)


class Inverted(nn.Module):
    """An inverted residual of MobileNetV2: relu6, depthwise convolution, residual add, global average."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, 16, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(16)
        self.project = nn.Conv2d(16, 8, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU6(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem_norm(self.stem(x)))
        y = self.act(self.expand_norm(self.expand(x)))
        y = self.act(self.depthwise_norm(self.depthwise(y)))
        x = x + self.project_norm(self.project(y))
        return self.head(x.mean([2, 3]))


class Joined(nn.Module):
    """Clamps with other bounds that share a scale, pooling, upsampling, leaky relu, a convolution at the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.c = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = F.hardtanh(self.b(F.avg_pool2d(a, 2)))
        b = F.interpolate(b, scale_factor=2)
        return F.leaky_relu(self.c(torch.cat([a, b], 1)))


class Signal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 8, 5, padding=2)
        self.norm = nn.BatchNorm1d(8)
        self.grouped = nn.Conv1d(8, 8, 3, padding="same", groups=4)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = F.max_pool1d(F.relu(self.grouped(x)), 2)
        return self.head(F.adaptive_avg_pool1d(x, 1).flatten(1))


def own(module: Callable[[], nn.Module], *shape: int) -> tuple[Network, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    network = module()
    data = [{"x": torch.randn(8, *shape)} for _ in range(3)]
    network.train()
    for batch in data:
        network(batch["x"])
    return Network(network.eval(), {"x": data[0]["x"][:2]}), data


# Folding


@pytest.mark.parametrize("name", FAST)
def test_folding_changes_nothing_but_rounding(name: str) -> None:
    network = build(name)
    folded = fold(network.traced.module)
    for batch in batches(name):
        expected = network(batch)
        found = folded(*(batch[key] for key in network.traced.inputs))
        for a, b in zip(expected, found, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_folding_removes_batch_norms_and_is_deterministic() -> None:
    network, data = own(Inverted, 3, 12, 12)
    before = {name: value.clone() for name, value in network.traced.module.state_dict().items()}
    first, second = fold(network.traced.module), fold(network.traced.module)
    operators = [str(node.target) for node in first.graph.nodes]
    assert not any(
        "batch_norm" in operator or operator.endswith("_.default") for operator in operators
    )
    assert [node.name for node in first.graph.nodes] == [node.name for node in second.graph.nodes]
    assert "stem.bias" in dict(first.named_parameters())
    after = network.traced.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.allclose(first(data[0]["x"])[0], network(data[0])[0], atol=1e-5)


def test_shared_layers_with_norms_of_their_own_fold_apart() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.conv(F.relu(self.one(self.conv(x)))))

    network, data = own(Shared, 3, 6, 6)
    folded = fold(network.traced.module)
    assert torch.allclose(folded(data[0]["x"])[0], network(data[0])[0], atol=1e-5)


# Statistics


def test_statistics_do_not_depend_on_batching() -> None:
    network = build("residual_cnn")
    whole = inputs("residual_cnn", 12, seed=3)
    one = collect(network, [whole])
    many = collect(network, [{k: v[i : i + 4] for k, v in whole.items()} for i in (0, 4, 8)])
    assert one.examples == many.examples == 12
    first = next(iter(one.activations))
    assert torch.equal(one.activations[first].counts, many.activations[first].counts)
    for name, histogram in one.activations.items():
        other = many.activations[name]
        assert other.low == pytest.approx(histogram.low, abs=1e-5)
        assert other.high == pytest.approx(histogram.high, abs=1e-5)
        assert other.count == histogram.count


def test_bad_data_is_refused_with_the_operator() -> None:
    network = build("residual_cnn")
    with pytest.raises(DataError, match="no examples"):
        collect(network, [])
    with pytest.raises(DataError, match="no input x"):
        collect(network, [{"y": torch.zeros(2, 3, 8, 8)}])
    batch = inputs("residual_cnn", 4)
    batch["x"][1, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="x: NaN or infinity in the input"):
        collect(network, [batch])
    broken = build("residual_cnn").copy()
    with torch.no_grad():
        next(broken.module.parameters()).fill_(3e38)
    with pytest.raises(DataError, match="NaN or infinity in the output of aten"):
        collect(broken, batches("residual_cnn"))


# Placement


def test_pairs_come_after_activation_functions_and_around_adds() -> None:
    network, _ = own(Inverted, 3, 12, 12)
    module = fold(network.traced.module)
    placement = place(module)
    nodes = {node.name: node for node in module.graph.nodes}
    for name in placement.values:
        node = nodes[name]
        if "conv2d" in str(node.target):
            assert not any("hardtanh" in str(user.target) for user in node.users)
    adds = [node for node in nodes.values() if "aten.add" in str(node.target)]
    assert adds and all(source.name in placement.values for source in adds[0].all_input_nodes)
    assert adds[0].name in placement.values
    assert len(placement.weights) == 5
    assert placement.skipped == []
    (output,) = module.graph.find_nodes(op="output")
    assert output.args[0][0].name not in placement.values, "the logits stay float"


def test_what_moves_values_and_concatenations_share_one_scale() -> None:
    network, data = own(Joined, 3, 8, 8)
    plan = Quantization().plan(network, collect(network, data))
    module = fold(network.traced.module)
    (joined,) = [node for node in module.graph.nodes if "aten.cat" in str(node.target)]
    last = {edit.tensor: edit for edit in plan.edits if isinstance(edit, Quantize)}
    together = [joined.name, *(source.name for source in joined.all_input_nodes)]
    assert len({(last[name].scale, last[name].zero_point) for name in together}) == 1


class Loudness(nn.Module):
    """A spectrum, its logarithm, and a convolution of that: what is quiet matters as much as what is loud."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Conv1d(1, 16, 32, stride=16, bias=False)
        self.features, self.head = nn.Conv1d(16, 8, 3), nn.Linear(8, 4)
        turns = torch.arange(32) * torch.arange(1, 17)[:, None] * torch.pi / 16
        with torch.no_grad():
            self.spectrum.weight.copy_((turns.cos() * torch.hann_window(32))[:, None])

    def forward(self, x: Tensor) -> Tensor:
        power = self.spectrum(x) * self.spectrum(x)
        features = torch.relu(self.features(torch.log10(power + 1e-9)))
        found: Tensor = self.head(features.mean(2)).softmax(1).log()
        return found


def test_what_a_logarithm_is_taken_of_stays_float() -> None:
    torch.manual_seed(0)
    module = Loudness().eval()
    x = torch.randn(16, 1, 256) * torch.logspace(0, -3, 16)[:, None, None]
    network = Network(module, {"x": x[:2]})
    placed = place(fold(network.traced.module))
    # That of a softmax is about its input.
    assert set(placed.weights) == {"features.weight", "head.weight"}
    assert {
        reason.split(" is taken")[0] for name, _, reason in placed.skipped if "conv1d" in name
    } == {"a logarithm of its result"}
    plan = Quantization().plan(network, collect(network, [{"x": x}]))
    # Its weights are stored as integers and computed with in float.
    rounded = {edit.tensor for edit in plan.edits if isinstance(edit, Quantize)}
    assert "log10" in rounded and not rounded & {"x", "conv1d", "mul", "add"}
    gap = (plan.apply(network)({"x": x})[0] - network({"x": x})[0]).abs().max()
    assert float(gap) < 0.05


def test_float_readers_read_float() -> None:
    """A layer norm's output goes to linear layers in integers, and to the residual add as it is."""
    network = build("encoder")
    placement = place(fold(network.traced.module))
    assert any(readers for readers in placement.values.values())
    reasons = {operator: reason for _, operator, reason in placement.skipped}
    assert "aten.layer_norm.default" in reasons
    assert "aten.scaled_dot_product_attention.default" in reasons


# Plans


def test_plan_leaves_everything_as_it_is_and_is_deterministic() -> None:
    network = build("residual_cnn")
    before = {name: value.clone() for name, value in network.module.state_dict().items()}
    statistics = collect(network, batches("residual_cnn"))
    method = Quantization(ranges="mse")
    plan, again = method.plan(network, statistics), method.plan(network, statistics)
    assert plan == again
    assert Plan.from_json(plan.to_json()) == plan
    assert "8 bits" in str(plan)
    one, two = plan.apply(network), Plan.from_json(plan.to_json()).apply(network)
    batch = inputs("residual_cnn", 4, seed=5)
    assert torch.equal(one(batch)[0], two(batch)[0])
    states = one.module.state_dict(), two.module.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    after = network.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(value.dtype == torch.int8 for value in states[0].values())


def test_options_and_networks_that_cannot_be() -> None:
    network = build("mlp")
    with pytest.raises(InputError, match="ranges='mode'"):
        Quantization(ranges="mode")
    with pytest.raises(InputError, match="bits=1"):
        Quantization(bits=1)
    with pytest.raises(InputError, match="needs data"):
        Quantization().plan(network)
    statistics = collect(network, batches("mlp"))
    plan = Quantization().plan(network, statistics)
    with pytest.raises(RefusedError, match="quantized already"):
        Quantization().plan(plan.apply(network), statistics)
    with pytest.raises(RefusedError, match="no value nowhere"):
        Plan((Quantize("nowhere", 1.0, 0, 0, 255),)).apply(network)
    with pytest.raises(RefusedError, match=r"no parameter nothing\.weight"):
        one, zero = Values(torch.ones(1, 1)), Values(torch.zeros(1, 1, dtype=torch.int64))
        Plan((QuantizeWeight("nothing.weight", one, zero, -127, 127),)).apply(network)
    other = build("residual_cnn")
    with pytest.raises(RefusedError, match="statistics have nothing of"):
        Quantization().plan(other, statistics)
    nothing = Network(nn.ReLU(), {"input": torch.randn(2, 3)})
    with pytest.raises(RefusedError, match="no weight to quantize"):
        Quantization().plan(nothing, collect(nothing, [{"input": torch.randn(2, 3)}]))


# The simulation


def relative_error(a: Network, b: Network, batch: dict[str, Tensor]) -> float:
    x, y = a(batch)[0], b(batch)[0]
    return float((x - y).abs().max() / (y.max() - y.min()))


@pytest.mark.parametrize("name", FAST)
def test_every_network_is_quantized_or_refused(name: str) -> None:
    network = build(name)
    data = batches(name)
    try:
        result = quantized(network, data)
    except RefusedError as refusal:
        assert name == "generator"
        assert "no convolution or linear layer" in str(refusal)
        return
    assert relative_error(result, network, data[0]) < 0.2


@pytest.mark.parametrize("name", ["mlp", "residual_cnn"])
def test_more_bits_reach_the_float_network(name: str) -> None:
    network, data = build(name), batches(name)
    errors = [
        relative_error(quantized(network, data, bits=b, activations=b), network, data[0])
        for b in (6, 10, 14)
    ]
    assert errors[1] < errors[0] / 4
    assert errors[2] < errors[1] / 4
    assert errors[2] < 1e-3


def test_dead_channels_and_zero_weights() -> None:
    network, data = own(Inverted, 3, 12, 12)
    module = network.copy().module
    weights = dict(module.named_parameters())
    with torch.no_grad():
        weights["expand.weight"].zero_()
        weights["project_norm.weight"][0] = 0
        weights["project_norm.weight"][1] = 1e-30
        weights["project_norm.bias"][:2] = 0.5
    dead = Network(module, network.example)
    for rule in ("minmax", "mse"):
        for saturation_free in (False, True):
            result = quantized(dead, data, ranges=rule, saturation_free=saturation_free)
            assert relative_error(result, dead, data[0]) < 0.05


def test_saturation_free_weights() -> None:
    network, data = own(Inverted, 3, 12, 12)
    method = Quantization(saturation_free=True)
    result = method.plan(network, collect(network, data)).apply(network)
    statistics = collect(network, data)
    assert any("no sum saturates" in note for note in method.decide(network, statistics)[1])
    assert Quantization().decide(network, statistics)[1] == ()
    for name, value in result.module.state_dict().items():
        if value.dtype == torch.int8 and "depthwise" not in name:
            assert int(pair_sums(value).max()) <= PAIR_LIMIT, name


def test_after_another_edit() -> None:
    """What edits give is a graph module: it is quantized like any other."""
    network, data = build("residual_cnn"), batches("residual_cnn")
    graph = Network(network.traced.module, network.example)
    assert isinstance(graph.module, fx.GraphModule)
    expected, found = quantized(network, data), quantized(graph, data)
    assert torch.allclose(expected(data[0])[0], found(data[0])[0], atol=1e-6)


def test_named_outputs_stay_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.fc(x), "twice": x * 2}

    network, data = own_dict(Two())
    result = quantized(network, data)
    assert result.traced.outputs == ("logits", "twice")
    assert torch.allclose(result(data[0])[1], data[0]["x"] * 2, atol=0.05)


def own_dict(module: nn.Module) -> tuple[Network, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    data = [{"x": torch.randn(6, 4)} for _ in range(2)]
    return Network(module.eval(), data[0]), data


# The artifact


ARTIFACTS = ["inverted", "joined", "signal", "residual_cnn", "mlp", "dense_cnn"]


def case(name: str) -> tuple[Network, list[dict[str, Tensor]]]:
    networks: dict[str, Callable[[], tuple[Network, list[dict[str, Tensor]]]]] = {
        "inverted": lambda: own(Inverted, 3, 12, 12),
        "joined": lambda: own(Joined, 3, 8, 8),
        "signal": lambda: own(Signal, 2, 32),
    }
    return networks.get(name, lambda: (build(name), batches(name)))()


@pytest.mark.parametrize("name", ARTIFACTS)
def test_the_simulation_is_the_artifact(name: str, tmp_path: Path) -> None:
    """ONNX Runtime runs integers, and agrees within one step of the output at batch 1 and 16."""
    network, data = case(name)
    result = quantized(network, data, ranges="mse")
    write_onnx(result, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    floats = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "MaxPool", "Add", "AveragePool"}
    if name == "mlp":
        floats -= {"Add"}  # a part of GELU
    assert not floats & set(operators), operators
    assert "QLinearConv" in operators or "QGemm" in operators
    whole = torch.cat([batch["x"] for batch in data])
    for size in (1, 16):
        batch = {"x": whole[:size]}
        expected = result(batch)[0].numpy()
        found = session.run(None, {"x": batch["x"].numpy()})[0]
        step = (expected.max() - expected.min()) / 255
        assert np.abs(expected - found).max() <= step


@pytest.mark.parametrize("name", ARTIFACTS)
def test_the_simulation_is_the_artifact_on_openvino(name: str, tmp_path: Path) -> None:
    """OpenVINO multiplies integers, too; it leaves out roundings between operators that it fuses, which is worth two steps here."""
    network, data = case(name)
    result = quantized(network, data, ranges="mse")
    (target,) = targets_for("openvino")
    artifact = target.lower(result, tmp_path)
    whole = {"x": torch.cat([batch["x"] for batch in data])[:16]}
    one = {"x": whole["x"][:1]}
    session = target.open(artifact.files[0], 1)
    compared = parity(result, session, [one, whole])
    assert compared.passed, compared.reason
    expected = result(whole)[0].numpy()
    step = (expected.max() - expected.min()) / 255
    found = session.run({"x": whole["x"].numpy()})[0]
    assert np.abs(expected - found).max() <= 2 * step
    arrays = {"x": one["x"].numpy()}
    kinds = {kernel.kind for kernel in target.kernels(artifact.files[0], arrays, 1, runs=1)}
    assert kinds & {"Convolution", "FullyConnectedQuantizedLegacy"}
