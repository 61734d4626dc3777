"""Activations rounded in the range of each run: the formula, the files, two runtimes, and what cannot be."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import nn
from typer.testing import CliRunner

import tinier
from tinier.cli import app
from tinier.edits.base import Plan
from tinier.edits.quantize import QuantizeDynamically
from tinier.errors import InputError, RefusedError
from tinier.graph.dynamic import round_dynamically, round_tokens
from tinier.measure.parity import parity
from tinier.methods.quantization import Quantization
from tinier.network import Network
from tinier.targets.base import Session, targets_for


def of_onnx(x: np.ndarray) -> np.ndarray:
    """Rounded by ONNX Runtime's DynamicQuantizeLinear."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    port = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in "xy"]
    graph = helper.make_graph(nodes, "g", port[:1], port[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("kind", ["both", "positive", "negative", "zeros", "one", "ties", "small"])
def test_it_is_what_onnx_says_bit_for_bit(kind: str) -> None:
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(3))
    values = {
        "both": x,
        "positive": x.abs() + 1,
        "negative": -x.abs() - 1,
        "zeros": torch.zeros(3, 4),
        "one": torch.full((1, 1), -2.5),
        "ties": torch.arange(0, 256).float().sub(100.5).div(2).clamp(-50, 77.5),
        "small": x * 1e-30,
    }[kind]
    assert np.array_equal(round_dynamically(values).numpy(), of_onnx(values.numpy()))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 64)
        self.second = nn.Linear(64, 64, bias=False)
        self.last = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(x))
        found: torch.Tensor = self.last(hidden + torch.tanh(self.second(hidden)))
        return found


@pytest.mark.parametrize("rank", [2, 3])
def test_products_of_integers_on_both_runtimes(tmp_path: Path, rank: int) -> None:
    torch.manual_seed(0)
    model, x = Layers().eval(), torch.randn(*(6, 5)[: rank - 1], 48)
    smaller = tinier.quantize(model, x, activations="dynamic")
    edits = [e for e in smaller.plan.edits if isinstance(e, QuantizeDynamically)]
    assert len(edits) == 3
    assert Plan.from_json(smaller.plan.to_json()) == smaller.plan
    with torch.no_grad():
        assert float((smaller.model(x) - model(x)).norm() / model(x).norm()) < 0.02
    done = tinier.deliver(smaller, tmp_path / "out", target="cpu", attribution=rank == 2)
    for name in ("onnxruntime", "openvino"):
        assert all(row.passed and not row.skipped for row in done.parity[name].rows)
    model_file = onnx.load(tmp_path / "out" / "model.onnx")
    operators = [node.op_type for node in model_file.graph.node]
    assert operators.count("MatMulInteger") == 3 and operators.count("DynamicQuantizeLinear") == 3
    assert "DequantizeLinear" not in operators and "MatMul" not in operators


class Square(nn.Module):
    """Products with a parameter (inputs, outputs) as it is, of as many inputs as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, self.weight)


def test_a_square_weight_is_read_the_way_it_lies(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Square().eval(), torch.randn(6, 64)
    smaller = tinier.quantize(model, x, activations="dynamic")
    done = tinier.deliver(smaller, tmp_path / "out", target="cpu")
    for name in ("onnxruntime", "openvino"):
        assert all(row.passed and not row.skipped for row in done.parity[name].rows)
    operators = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert "MatMulInteger" in operators and "MatMul" not in operators


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_one_product_has_the_same_integers(tmp_path: Path, name: str) -> None:
    """So that only the order of float operations is left: a thousandth of what rounding changes."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(48, 64)).eval(), torch.randn(6, 48)
    smaller = tinier.quantize(model, x, activations="dynamic")
    done = tinier.deliver(smaller, tmp_path / "out", target=name)
    (runtime,) = targets_for(name)
    session = runtime.open(tmp_path / "out" / done.artifacts[name].files[0].name, 1)
    actual = session.run({session.inputs[0].name: x.numpy()})[0]
    with torch.no_grad():
        expected, before = smaller.model(x).numpy(), model(x).numpy()
    assert np.abs(actual - expected).max() < 1e-3 * np.abs(expected - before).max()


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (12,)])
def test_each_row_has_a_scale_of_its_own(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, 12)[..., : shape[-1]]
    found = round_tokens(x)
    for row, got in zip(x.view(-1, 12), found.view(-1, 12), strict=True):
        step = float(row.abs().max()) / 127
        assert float((got - row).abs().max()) <= 0.5001 * step
        assert torch.allclose(got, (row / step).round() * step, rtol=1e-6, atol=0)
        assert torch.equal(round_tokens(row), got), "whatever else is in the batch"
    assert torch.equal(round_tokens(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_a_row_of_wild_values_does_not_spoil_the_others() -> None:
    torch.manual_seed(0)
    model, x = Layers().eval(), torch.randn(16, 48)
    x[0] *= 1000
    with torch.no_grad():
        wanted = model(x)[1:]
        errors = [
            float((tinier.quantize(model, x, activations=how).model(x)[1:] - wanted).norm() / wanted.norm())
            for how in ("dynamic", "dynamic_per_token")
        ]  # fmt: skip
    assert errors[1] < 0.02 < 0.2 < errors[0]


@pytest.mark.parametrize("rank", [2, 3])
def test_products_with_a_scale_for_each_row_on_both_runtimes(tmp_path: Path, rank: int) -> None:
    torch.manual_seed(0)
    model, x = Layers().eval(), torch.randn(*(6, 5)[: rank - 1], 48)
    smaller = tinier.quantize(model, x, activations="dynamic_per_token")
    edits = [e for e in smaller.plan.edits if isinstance(e, QuantizeDynamically)]
    assert len(edits) == 3 and all(edit.per_token for edit in edits)
    assert Plan.from_json(smaller.plan.to_json()) == smaller.plan
    done = tinier.deliver(smaller, tmp_path / "out", target="cpu", attribution=rank == 2)
    for name in ("onnxruntime", "openvino"):
        assert all(row.passed and not row.skipped for row in done.parity[name].rows)
    assert done.as_dict(smaller)["macs"]["integer"] == done.as_dict(smaller)["macs"]["all"]
    operators = [n.op_type for n in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert operators.count("MatMulInteger") == 3 == operators.count("ReduceMax")
    assert not {"DequantizeLinear", "MatMul", "Gemm", "DynamicQuantizeLinear"} & {*operators}
    with torch.no_grad():
        expected, before = smaller.model(x).numpy(), model(x).numpy()
    (runtime,) = targets_for("onnxruntime")
    session = runtime.open(tmp_path / "out" / "model.onnx", 1)
    actual = session.run({session.inputs[0].name: x.numpy()})[0]
    assert np.abs(actual - expected).max() < 0.2 * np.abs(expected - before).max()


def test_several_readers_share_the_rounded_rows(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) * self.b(x)

    found = tinier.quantize(Two().eval(), torch.randn(4, 16), activations="dynamic_per_token")
    tinier.deliver(found, tmp_path / "out")
    operators = [n.op_type for n in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert operators.count("QuantizeLinear") == 1 and operators.count("MatMulInteger") == 2


class Unrounded(Session):
    """Integer weights alone: what the same network computes without rounding its activations."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        outputs = self.network({name: torch.from_numpy(x) for name, x in inputs.items()})
        return [output.numpy() for output in outputs]


@pytest.mark.parametrize("kind", ["dynamic", "dynamic_per_token"])
def test_the_gate_knows_what_rounding_changes(kind: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5)), torch.randn(16, 32)
    rounded = tinier.quantize(model, (x[:2],), activations=kind).network
    alone = tinier.quantize(model, (x[:2],), activations=None).network
    (name,) = rounded.example
    found = parity(rounded, Unrounded(alone), [{name: x}])
    assert found.passed, found.reason
    assert found.rows[0].difference > 0 and found.rows[0].noise == pytest.approx(1, rel=1e-4)


def test_without_a_linear_layer_it_is_refused() -> None:
    with pytest.raises(RefusedError, match="no linear layer is there to multiply"):
        tinier.quantize(nn.Conv2d(2, 4, 3).eval(), torch.randn(2, 2, 8, 8), activations="dynamic")
    both = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    found = tinier.quantize(both, torch.randn(2, 2, 8, 8), activations="dynamic")
    assert any(
        note.startswith("1 weights are stored as integers and computed in float")
        for note in found.notes
    )
    with pytest.raises(InputError, match="per_token=True: that is of dynamic ranges"):
        Quantization(per_token=True)


def test_what_cannot_be() -> None:
    model, x = Layers().eval(), torch.randn(4, 48)
    with pytest.raises(InputError, match='bits, None, "dynamic" or "dynamic_per_token"'):
        tinier.quantize(model, x, activations="static")
    with pytest.raises(InputError, match="group=16: integer operators"):
        tinier.quantize(model, x, activations="dynamic", group=16)
    with pytest.raises(InputError, match="symmetric=False: integer operators"):
        tinier.quantize(model, x, activations="dynamic", symmetric=False)


def test_the_command_line_needs_no_data(tmp_path: Path) -> None:
    model, x = Layers().eval(), torch.randn(4, 48)
    tinier.save(tinier.prune(model, x, keep=0.999), tmp_path / "model.pt2")
    arguments = ["quantize", str(tmp_path / "model.pt2"), "-o", str(tmp_path / "out")]
    alone = CliRunner().invoke(app, [*arguments, "--per-token"])
    assert alone.exit_code == 2 and "--dynamic" in alone.output
    arguments.append("--dynamic")
    rows = CliRunner().invoke(app, [*arguments, "--per-token"])
    assert rows.exit_code == 0, rows.output
    operators = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert operators.count("ReduceMax") == 3
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    operators = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert operators.count("MatMulInteger") == 3
