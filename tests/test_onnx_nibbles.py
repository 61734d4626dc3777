"""Four-bit weights beside quantized activations: half the file, the same integers, the same operators."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import tinier
from tinier.targets.base import targets_for
from tinier.targets.onnx_file import to_onnx
from tinier.targets.onnx_integers import integer_tensor
from tinier.targets.onnx_nibbles import halve
from tinier.verbs.smaller import Smaller


def made(**arguments: Any) -> tuple[Smaller, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 30)).eval()
    x = torch.randn(16, 4, 6, 6)
    return tinier.quantize(model, x[:2], x, corrections=(), **arguments), x


@pytest.mark.parametrize("activations", [8, 3, "dynamic"])
def test_half_the_file_and_the_same_results(activations: int | str, tmp_path: Path) -> None:
    sizes = {}
    for bits in (4, 8):
        found, x = made(bits=bits, activations=activations)
        file = tmp_path / f"{bits}.onnx"
        file.write_bytes(to_onnx(found.network).SerializeToString())
        sizes[bits] = file.stat().st_size
    integers = 4 * 32 * 9 + 32 * 256 + 256 * 30
    assert sizes[8] - sizes[4] == pytest.approx(integers / 2, rel=0.06)
    found, x = made(bits=4, activations=activations)
    wanted = found.network({"input": x})[0].numpy()
    for target in targets_for(("onnxruntime", "openvino")):
        session = target.open(target.lower(found.network, tmp_path).files[0], 1)
        (result,) = session.run({"input": x.numpy()})
        # Where a sum lies between two integers, the order of a float sum decides.
        assert np.mean(np.abs(result - wanted) > 1e-4 * np.ptp(wanted)) < 0.01


@pytest.mark.parametrize(
    ("activations", "operators"),
    [(8, {"QLinearConv", "QGemm"}), ("dynamic", {"DynamicQuantizeMatMul"})],
)
def test_the_runtime_multiplies_integers(
    activations: int | str, operators: set[str], tmp_path: Path
) -> None:
    found, x = made(bits=4, activations=activations)
    (target,) = targets_for("onnxruntime")
    artifact = target.lower(found.network, tmp_path)
    kernels = target.kernels(artifact.files[0], {"input": x[:1].numpy()}, 1, runs=2)
    kinds = {kernel.kind for kernel in kernels}
    assert operators <= kinds and not kinds & {"Gemm", "MatMul", "Cast", "DequantizeLinear"}


def test_what_does_not_fit_or_is_read_otherwise_stays() -> None:
    """Larger integers, few of them, and those that another operator reads."""
    rng = np.random.default_rng(0)
    small = rng.integers(-8, 8, (16, 16)).astype(np.int8)
    large = small.copy()
    large[0, 0] = 8
    constants = {"fits": small, "large": large, "few": small[:2, :2], "shared": small}
    tensors = [integer_tensor(value, name, nibble=False) for name, value in constants.items()]
    scale = onnx.numpy_helper.from_array(np.array(0.5, np.float32), "scale")
    nodes = [
        onnx.helper.make_node("DequantizeLinear", [name, "scale"], [f"{name}_float"])
        for name in constants
    ]
    nodes.append(onnx.helper.make_node("Identity", ["shared"], ["same"]))
    outputs = [onnx.helper.make_tensor_value_info(f"{n}_float", 1, None) for n in constants]
    outputs.append(onnx.helper.make_tensor_value_info("same", 3, None))
    graph = onnx.helper.make_graph(nodes, "main", [], outputs, [*tensors, scale])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    halve(model)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kinds["fits"] == onnx.TensorProto.INT4
    assert {kinds[name] for name in ("large", "few", "shared")} == {onnx.TensorProto.INT8}
    back = onnx.numpy_helper.to_array(model.graph.initializer[0]).astype(np.int8)
    np.testing.assert_array_equal(back, small)
