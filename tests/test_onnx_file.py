"""ONNX files: what is in them, what is not, and what cannot be written."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import Tensor, nn

import tinier
from networks import build, inputs
from tinier.errors import RefusedError
from tinier.methods.quantization import Quantization
from tinier.network import Network
from tinier.statistics import collect
from tinier.targets.base import targets_for
from tinier.targets.onnx_file import write_onnx


def run(path: Path, batch: dict[str, Tensor]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in batch.items()})


def assert_clean(path: Path) -> onnx.ModelProto:
    """Standard operators, and nothing of this machine."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version <= 21) for entry in model.opset_import] == [("", True)]
    content = path.read_bytes()
    for trace in (b".py", b"site-packages", str(Path.home()).encode(), b"pkg.torch", b"/work"):
        assert trace not in content, trace
    assert not model.metadata_props and not model.graph.metadata_props and not model.functions
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    return model


def test_float_network(tmp_path: Path) -> None:
    network = build("residual_cnn")
    path = tmp_path / "float.onnx"
    write_onnx(network, path)
    model = assert_clean(path)
    assert [value.name for value in model.graph.input] == ["x"]
    assert [value.name for value in model.graph.output] == ["output"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    operators = [node.op_type for node in model.graph.node]
    assert "GlobalAveragePool" in operators and "ReduceMean" not in operators
    for size in (1, 5):
        batch = inputs("residual_cnn", size)
        assert np.allclose(run(path, batch)[0], network(batch)[0].numpy(), atol=1e-4)
    first = path.read_bytes()
    write_onnx(network.copy(), path)
    assert path.read_bytes() == first, "equal networks give equal files"


def test_quantized_network(tmp_path: Path) -> None:
    network = build("residual_cnn")
    data = [inputs("residual_cnn", 8, seed) for seed in (1, 2)]
    result = Quantization().plan(network, collect(network, data)).apply(network)
    write_onnx(network, tmp_path / "float.onnx")
    write_onnx(result, tmp_path / "integers.onnx")
    model = assert_clean(tmp_path / "integers.onnx")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = [name for name in tensors if name.endswith("weight_integers")]
    assert len(weights) == 9
    assert all(tensors[name].data_type == onnx.TensorProto.INT8 for name in weights)
    large = [
        t for t in tensors.values() if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1
    ]
    assert not large, "no float weights stay in the file"
    names = [name for node in model.graph.node for name in [*node.input, *node.output]]
    assert not any(
        name.startswith("val_")
        for n in model.graph.node
        if "Linear" in n.op_type
        for name in n.input
    )
    assert "x_quantized" in names and "x_scale" in names


def test_fixed_batch_and_named_outputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"logits": self.fc(x) + y, "twice": y * 2}

    network = Network(Two(), {"x": torch.randn(1, 4), "y": torch.randn(1, 3)})
    write_onnx(network, tmp_path / "two.onnx")
    model = assert_clean(tmp_path / "two.onnx")
    assert [value.name for value in model.graph.input] == ["x", "y"]
    assert [value.name for value in model.graph.output] == ["logits", "twice"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


def test_what_onnx_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    class Bessel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(RefusedError, match="bessel_j0"):
        write_onnx(Network(Bessel(), {"x": torch.randn(2, 3)}), tmp_path / "no.onnx")
    assert not (tmp_path / "no.onnx").exists()


class SmallTerm(nn.Module):
    """A quotient whose divisor is kept from zero by 1e-12."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.relu()
        return y / (y.sum(-1, keepdim=True) + 1e-12)


class PaddedPool(nn.Module):
    """Zeros around negative values, then maxima: zeros win, which −∞ would not."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(nn.functional.pad(-x.square() - 1, (1, 1, 1, 1)), 3, 2)


class FiveDimensions(nn.Module):
    """Attention inside windows, with a mask of numbers or of booleans."""

    mask: Tensor

    def __init__(self, boolean: bool) -> None:
        super().__init__()
        mask = torch.tril(torch.ones(4, 4, dtype=torch.bool))
        self.register_buffer("mask", mask if boolean else mask.float().log())

    def forward(self, x: Tensor) -> Tensor:
        y = x.view(x.shape[0], 2, 2, 4, 4)
        return nn.functional.scaled_dot_product_attention(y, y * 2, y + 1, self.mask, scale=0.3)


class AllMasked(nn.Module):
    """A row that may look at nothing: torch gives zeros."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.view(x.shape[0], 8, 8)
        mask = torch.ones(8, 8, dtype=torch.bool).tril(-1)
        return nn.functional.scaled_dot_product_attention(y, y, y, mask)


class Negative(nn.Module):
    """Bytes, the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        return (255 - x).float() / 255


class Unbound(nn.Module):
    """Rows apart: onnxscript's optimizer stumbles over a sequence without sizes."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.view(x.shape[0], 2, -1).unbind(1)
        return first * 2 - second


class Inverted(nn.Module):
    """A fraction minus integers."""

    def forward(self, mask: Tensor) -> Tensor:
        return (1.0 - mask) * -2.5


HARD: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {
    "small_term": (SmallTerm(), {"x": torch.tensor([[-1.0, -2.0], [1.0, 3.0]])}),
    "padded_pool": (PaddedPool(), {"x": torch.linspace(-2, 2, 64).view(2, 1, 4, 8)}),
    "five_dimensions": (FiveDimensions(False), {"x": torch.linspace(-2, 2, 128).view(2, 64)}),
    "boolean_mask": (FiveDimensions(True), {"x": torch.linspace(-2, 2, 128).view(2, 64)}),
    "unbound": (Unbound(), {"x": torch.linspace(-2, 2, 24).view(2, 12)}),
    "all_masked": (AllMasked(), {"x": torch.linspace(-2, 2, 128).view(2, 64)}),
    "negative": (Negative(), {"x": torch.arange(12, dtype=torch.uint8).view(2, 6)}),
    "inverted": (Inverted(), {"mask": torch.tensor([[1, 0, 1], [0, 0, 1]])}),
}


class Patches(nn.Module):
    """Patches of an image behind something else, in rows: a token that is the same in each example, other patches, or a float function."""

    def __init__(self, before: str) -> None:
        super().__init__()
        self.before = before
        self.patches, self.others = (nn.Conv2d(3, 32, 4, stride=4) for _ in range(2))
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        patches, others = (
            layer(x).flatten(2).transpose(1, 2) for layer in (self.patches, self.others)
        )
        before = {
            "token": self.token.expand(len(x), -1, -1),
            "patches": others,
            "float": torch.sigmoid(others),
        }
        found: Tensor = self.head(torch.cat([before[self.before], patches], 1))
        return found


@pytest.mark.parametrize("before", ["token", "patches", "float"])
def test_rows_behind_an_integer_convolution(before: str, tmp_path: Path) -> None:
    """OpenVINO would lose the convolution's bias beside a free size, and could not multiply the rows."""
    torch.manual_seed(0)
    found = tinier.quantize(Patches(before).eval(), x := torch.randn(2, 3, 16, 16), x)
    more = torch.randn(16, 3, 16, 16)
    for name in ("onnxruntime", "openvino"):
        artifact = tinier.export(found, tmp_path / name, target=name)
        (target,) = targets_for(name)
        (actual,) = target.open(artifact.files[0], 1).run({"x": more.numpy()})
        wanted = found.network({"x": more})[0].numpy()
        assert np.mean(np.abs(actual - wanted) > 1e-4 * np.ptp(wanted)) < 0.01
    nodes = onnx.load(tmp_path / "onnxruntime" / "model.onnx").graph.node
    assert not any(node.op_type == "Shape" for node in nodes)


@pytest.mark.parametrize("padding", [0, 1])
def test_windows_that_overhang(padding: int, tmp_path: Path) -> None:
    """Integers of pooling with ``ceil_mode``, which runtimes divide otherwise than floats: the gate is in ``export``."""
    torch.manual_seed(0)
    pool = nn.AvgPool2d(3, 2, padding, ceil_mode=True)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(8, 4, 3), nn.Flatten()]
    model, x = nn.Sequential(*layers).eval(), torch.randn(16, 3, 8, 8)
    found = tinier.quantize(model, x[:2], x, corrections=())
    for name in ("onnxruntime", "openvino"):
        artifact = tinier.export(found, tmp_path / name, target=name)
        (wanted,) = found.network({"input": x})
        (target,) = targets_for(name)
        (actual,) = target.open(artifact.files[0], 1).run({"input": x.numpy()})
        assert np.mean(np.abs(actual - wanted.numpy()) > 1e-4 * np.ptp(actual)) < 0.01


@pytest.mark.parametrize("name", HARD)
def test_what_exporters_and_runtimes_get_wrong(name: str, tmp_path: Path) -> None:
    module, example = HARD[name]
    network = Network(module.eval(), example)
    path = tmp_path / "hard.onnx"
    write_onnx(network, path)
    model = assert_clean(path)
    wanted = network(example)[0].numpy()
    np.testing.assert_allclose(run(path, example)[0], wanted, rtol=1e-5, atol=1e-6)
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([value.numpy() for value in example.values()])[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
