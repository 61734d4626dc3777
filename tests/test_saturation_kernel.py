"""Kernels of ONNX Runtime and OpenVINO that saturate for real, on a CPU without VNNI: this one if it has none, an emulated one otherwise.

User-mode emulation by ``qemu-x86_64`` (``apt-get install qemu-user``) runs the same Python and the same runtimes as on a Haswell.
"""

import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tinier.measure.machine import machine
from tinier.methods.quantization import Quantization
from tinier.network import Network
from tinier.statistics import collect
from tinier.targets.onnx_file import write_onnx
from tinier.tensors.saturation import PAIR_LIMIT, pair_sums

RUNTIMES = ("onnxruntime", "openvino")

# Runs every model of a folder on the inputs beside it, by both runtimes, and by ONNX Runtime with its 8-bit weights made unsigned.
RUN = """
import sys
from pathlib import Path
import numpy as np, onnxruntime, openvino
core = openvino.Core()
exact = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
def ort(file, inputs, widened):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", widened)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, inputs)))
def ov(file, inputs):
    model = core.compile_model(core.read_model(file), "CPU", exact)
    return {port.any_name: value for port, value in model(inputs).items()}
for file in Path(sys.argv[1]).glob("*.onnx"):
    inputs = dict(np.load(file.with_suffix(".npz")))
    np.savez(file.with_suffix(".onnxruntime.npz"), **ort(file, inputs, "0"))
    if len(inputs) == 1:  # it takes no file in which several weights share their zero point
        np.savez(file.with_suffix(".widened.npz"), **ort(file, inputs, "1"))
    np.savez(file.with_suffix(".openvino.npz"), **ov(file, inputs))
"""


def without_vnni() -> list[str]:
    """The command that a program runs under to see a CPU that has AVX2 and no VNNI."""
    if "avx2" in machine().flags and not machine().vnni:
        return []
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip(
            "this CPU's kernels do not saturate, and no qemu-x86_64 (apt-get install qemu-user) is there to emulate one"
        )
    return [emulator, "-cpu", "Haswell-noTSX"]


class Layers(nn.Module):
    """One layer of each kind, side by side, with channels of equal weights: activations of 1 give the largest sums."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(5, 6, 3, bias=False)
        self.grouped = nn.Conv2d(6, 6, 3, groups=2, bias=False)
        self.multiplied = nn.Conv2d(4, 8, 3, groups=4, bias=False)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.linear = nn.Linear(9, 5, bias=False)
        self.matmul = nn.Linear(9, 5, bias=False)
        with torch.no_grad():
            for weight in self.parameters():
                weight[0] = 1.0
                weight[1] = -0.7

    def forward(self, images: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return {
            "convolution": self.convolution(images[:, :5]),
            "grouped": self.grouped(images[:, :6]),
            "multiplied": self.multiplied(images[:, :4]),
            "depthwise": self.depthwise(images[:, 2:]),
            "linear": self.linear(rows[:, 0]),
            "matmul": self.matmul(rows),
        }


# Input channels and window of convolutions, inputs of matrix products.
CONVOLUTIONS = {"4x3x3": (4, 3, 3), "3x3x3": (3, 3, 3), "5x3": (5, 3), "6x1x1": (6, 1, 1)}
PRODUCTS = {"8": (8,), "9": (9,)}
SHAPES = CONVOLUTIONS | PRODUCTS
# Activations and weights. Only signed weights saturate.
TYPES = {"u8s8": ("uint8", "int8"), "s8s8": ("int8", "int8"), "u8u8": ("uint8", "uint8")}
# All types of one convolution and one product; that which saturates of the rest.
TYPED = ("3x3x3", "9")
SCANS = [f"{s}.{t}" for s in SHAPES for t in TYPES if s in TYPED or t == "u8s8"]


def pairs_of_ones(shape: tuple[int, ...]) -> np.ndarray:
    """(pairs, *shape): a channel for each two of its inputs, 127 there and 0 elsewhere."""
    count = int(np.prod(shape))
    pairs = list(combinations(range(count), 2))
    weight = np.zeros((len(pairs), count), np.int64)
    for row, pair in zip(weight, pairs, strict=True):
        row[list(pair)] = 127
    return weight.reshape(len(pairs), *shape)


def scan(shape: tuple[int, ...], activation: str, kind: str) -> onnx.ModelProto:
    """A layer with the weights of `pairs_of_ones` between quantize/dequantize pairs, for inputs of 255."""
    zero = 128 if kind == "uint8" else 0
    weight = (pairs_of_ones(shape) + zero).astype(kind)
    least = 0 if activation == "uint8" else -128
    product = len(shape) == 1
    constants = {
        "one": np.array(1, np.float32),
        "step": np.array(512, np.float32),
        "least": np.array(least, activation),
        "weight": weight.T.copy() if product else weight,
        "zero": np.array(zero, kind),
    }
    nodes = [
        ("QuantizeLinear", ["x", "one", "least"], "integers"),
        ("DequantizeLinear", ["integers", "one", "least"], "rounded"),
        ("DequantizeLinear", ["weight", "one", "zero"], "weights"),
        ("MatMul" if product else "Conv", ["rounded", "weights"], "sums"),
        ("QuantizeLinear", ["sums", "step", "least"], "result"),
        ("DequantizeLinear", ["result", "step", "least"], "y"),
    ]
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [output]) for kind, inputs, output in nodes],
        "scan",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _save(file: Path, values: dict[str, Tensor]) -> None:
    np.savez(file, **{name: value.numpy() for name, value in values.items()})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, their inputs, what the simulation gives and what the runtimes give on the CPU without VNNI."""
    folder = tmp_path_factory.mktemp("saturation")
    command = without_vnni()
    torch.manual_seed(0)
    example = {"images": torch.rand(2, 6, 5, 5), "rows": torch.rand(2, 3, 9)}
    example["images"][0] = 1
    example["rows"][0] = 1
    network = Network(Layers().eval(), example)
    for name, free in (("plain", False), ("repaired", True)):
        method = Quantization(ranges="minmax", saturation_free=free)
        result = method.plan(network, collect(network, [example])).apply(network)
        write_onnx(result, folder / f"{name}.onnx")
        _save(folder / f"{name}.npz", example)
        with torch.no_grad():
            values = dict(zip(result.traced.outputs, result(example), strict=True))
        _save(folder / f"{name}.simulated.npz", values)
    for name in SCANS:
        shape, types = name.split(".")
        onnx.save(scan(SHAPES[shape], *TYPES[types]), folder / f"{name}.onnx")
        np.savez(folder / f"{name}.npz", x=np.full((1, *SHAPES[shape]), 255, np.float32))
    command += [sys.executable, "-c", RUN, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def worst(folder: Path, model: str, runtime: str, layer: str) -> float:
    """Largest difference from the simulation, in parts of the largest output."""
    found = np.load(folder / f"{model}.{runtime}.npz")[layer]
    simulated = np.load(folder / f"{model}.simulated.npz")[layer]
    return float(np.abs(found - simulated).max() / np.abs(simulated).max())


@pytest.mark.parametrize("layer", ["convolution", "grouped", "multiplied", "linear", "matmul"])
def test_kernels_saturate_and_repaired_weights_do_not(folder: Path, layer: str) -> None:
    for runtime in RUNTIMES:
        # Of each sum of two products 2 · 127 · 255 = 64770, 32767 are left.
        assert worst(folder, "plain", runtime, layer) > 0.3, runtime
        assert worst(folder, "repaired", runtime, layer) < 1e-6, runtime


def test_depthwise_kernels_do_not_saturate_and_are_left_alone(folder: Path) -> None:
    for runtime in RUNTIMES:
        assert worst(folder, "plain", runtime, "depthwise") < 1e-6
        assert worst(folder, "repaired", runtime, "depthwise") < 1e-6
    plain, repaired = (np.load(folder / f"{m}.simulated.npz") for m in ("plain", "repaired"))
    assert np.array_equal(plain["depthwise"], repaired["depthwise"])
    assert not np.array_equal(plain["grouped"], repaired["grouped"])


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_pair_what_pair_sums_adds(folder: Path, shape: str) -> None:
    """A channel loses half of its sum exactly if the kernel adds its two weights in 16 bits."""
    weight = torch.from_numpy(pairs_of_ones(SHAPES[shape]))
    proved = (pair_sums(weight) <= PAIR_LIMIT).numpy()
    for types in ("u8s8", "s8s8") if shape in TYPED else ("u8s8",):
        saturated = {}
        for runtime in RUNTIMES:
            y = np.load(folder / f"{shape}.{types}.{runtime}.npz")["y"]
            y = (
                y.reshape(-1, len(proved))
                if shape in PRODUCTS
                else y.reshape(1, len(proved), -1)[0].T
            )
            lost = y < 40000
            assert np.array_equal(lost, lost[:1].repeat(len(lost), 0))
            assert bool((y[~lost] > 64000).all())
            saturated[runtime] = lost[0]
            assert not bool((saturated[runtime] & proved).any()), (types, runtime)
        # And no pair is counted that neither of them adds.
        either = saturated["onnxruntime"] | saturated["openvino"]
        assert np.array_equal(either, ~proved), types


@pytest.mark.parametrize("shape", TYPED)
def test_kernels_for_unsigned_weights_do_not_saturate(folder: Path, shape: str) -> None:
    for runtime in RUNTIMES:
        assert np.load(folder / f"{shape}.u8u8.{runtime}.npz")["y"].min() > 64000
    for types in TYPES:  # ONNX Runtime can turn signed weights into unsigned ones itself
        assert np.load(folder / f"{shape}.{types}.widened.npz")["y"].min() > 64000
