"""Integer weights alone in ONNX files: the forms, what two runtimes compute with them, sizes, and which kernels ONNX Runtime takes."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import tinier
from tinier.verbs import Smaller

RUNTIMES = ("onnxruntime", "openvino")


class Tied(nn.Module):
    """An embedding (rows, width) whose table is the weight of the last layer."""

    def __init__(self, rows: int = 96, width: int = 64) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, rows, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.body(self.table(ids))))
        return found


class Recurrent(nn.Module):
    """A recurrent layer, its last step, and a linear layer."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        layer: Any = kind
        self.layer: nn.RNNBase = layer(32, 64, batch_first=True, **options)
        self.head = nn.Linear(64 * (1 + self.layer.bidirectional), 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.layer(x)[0][:, -1])
        return found


class Upsampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two = nn.ConvTranspose2d(8, 24, 4, stride=2, padding=1)
        self.one = nn.ConvTranspose1d(24, 5, 3, stride=2, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.one(torch.relu(self.two(x)).flatten(2))
        return found


def weights_alone(model: nn.Module, example: Tensor, **options: Any) -> Smaller:
    return tinier.quantize(model.eval(), example, activations=None, **options)


def parameter_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def delivered(smaller: Smaller, folder: Path, data: Any = None) -> onnx.ModelProto:
    """The ONNX file, after both runtimes were run and agreed with the simulation."""
    done = tinier.deliver(smaller, folder / "out", target="cpu", data=data)
    assert set(RUNTIMES) <= set(done.parity)
    for target in RUNTIMES:
        assert all(row.passed and not row.skipped for row in done.parity[target].rows)
    return onnx.load(folder / "out" / "model.onnx")


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def at_run_time(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """What ONNX Runtime makes of a file when it opens it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return operators(onnx.load(folder / "optimized.onnx"))


def constants(model: onnx.ModelProto, least: int) -> dict[str, onnx.TensorProto]:
    """The constants of so many values."""
    return {t.name: t for t in model.graph.initializer if np.prod(list(t.dims)) >= least}


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "rank"),
    [
        (8, None, True, 2),
        (8, 32, False, 3),
        (4, None, True, 3),
        (4, 32, False, 2),
        (3, 64, True, 2),
    ],
)
def test_products(tmp_path: Path, bits: int, group: int | None, symmetric: bool, rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32, bias=False))
    x = torch.randn(*(6, 5)[: rank - 1], 128)
    smaller = weights_alone(model, x, bits=bits, group=group, symmetric=symmetric)
    file = delivered(smaller, tmp_path)
    assert operators(file)["DequantizeLinear"] == 2 and not operators(file)["Gemm"]
    kinds = {
        (8, True): onnx.TensorProto.INT8,
        (8, False): onnx.TensorProto.UINT8,
        (4, True): onnx.TensorProto.INT4,
        (4, False): onnx.TensorProto.UINT4,
    }
    large = constants(file, 64 * 32)
    assert {t.data_type for t in large.values()} == {kinds[8 if bits == 8 else 4, symmetric]}
    assert sorted(tuple(t.dims) for t in large.values()) == [(64, 32), (128, 64)]
    for node in file.graph.node:
        if node.op_type == "DequantizeLinear":
            assert len(node.input) == (2 if symmetric else 3), "a zero point of 0 is left out"
    runs = at_run_time(file, tmp_path)
    assert runs["MatMulNBits"] == 2 and not runs["DequantizeLinear"] and not runs["MatMul"]


@pytest.mark.parametrize(("inputs", "group"), [(50, None), (72, 24)])
def test_inputs_without_a_block_are_folded_at_load(
    tmp_path: Path, inputs: int, group: int | None
) -> None:
    """A kernel's blocks have 16, 32, 64 or 128 inputs."""
    model, x = nn.Sequential(nn.Linear(inputs, 40)), torch.randn(4, inputs)
    file = delivered(weights_alone(model, x, bits=4, group=group, symmetric=False), tmp_path)
    assert {t.data_type for t in constants(file, 40 * inputs).values()} == {onnx.TensorProto.UINT4}
    assert operators(file)["Cast"] == 1 and not operators(file)["DequantizeLinear"]
    assert set(at_run_time(file, tmp_path)) <= {"Gemm", "MatMul", "Add"}


def test_groups_of_a_multiple_of_a_block_repeat_their_scales(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(144, 40)), torch.randn(4, 144)
    file = delivered(weights_alone(model, x, bits=4, group=48), tmp_path)
    (scale,) = (t for t in file.graph.initializer if t.name.endswith("_scale"))
    values = onnx.numpy_helper.to_array(scale)  # (blocks, outputs)
    assert values.shape == (9, 40) and np.array_equal(values[0], values[2])
    assert at_run_time(file, tmp_path)["MatMulNBits"] == 1


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (3, 16)])
def test_embeddings_are_looked_up_as_integers(tmp_path: Path, bits: int, group: int | None) -> None:
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(200, 64)), torch.randint(200, (3, 7))
    smaller = weights_alone(model, ids, bits=bits, group=group)
    file = delivered(smaller, tmp_path)
    table = constants(file, 200 * 32)
    assert [t.data_type for t in table.values()] == [
        onnx.TensorProto.INT8 if bits == 8 else onnx.TensorProto.UINT8
    ]
    assert [list(t.dims) for t in table.values()] == [[200, 64 if bits == 8 else 32]]
    runs = at_run_time(file, tmp_path)
    assert not runs["DequantizeLinear"], "rows are dequantized, not the table"


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 8, 3, padding=1), (16, 8, 9, 9)),
        (nn.ConvTranspose2d(8, 8, 3, padding=1), (16, 8, 9, 9)),
        (nn.Linear(9, 9), (16, 9)),
        (nn.Linear(9, 9), (16, 8, 9)),
    ],
)
def test_a_float_layer_between_integer_ones_stays_float(
    tmp_path: Path, layer: nn.Module, shape: tuple[int, ...]
) -> None:
    """ONNX Runtime would round its weights by itself, with one scale for all channels."""
    torch.manual_seed(0)
    model = nn.Sequential(*(copy.deepcopy(layer) for _ in range(3))).eval()
    x = torch.randn(shape)
    smaller = tinier.quantize(model, x[:2], x, exclude=["1"], corrections=())
    file = onnx.load(tinier.export(smaller, tmp_path / "out").files[0])
    run = at_run_time(file, tmp_path)
    kept = sum(run[name] for name in ("Conv", "FusedConv", "ConvTranspose", "Gemm", "MatMul"))
    assert kept == (3 if isinstance(layer, nn.ConvTranspose2d) else 1), run


class Step(nn.Module):
    """One step of a recurrent cell, from its input and both states."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell = cell(24, 40)

    def forward(self, x: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.cell, nn.LSTMCell):
            return tuple(self.cell(x, (hidden, memory)))
        return (self.cell(x, hidden) + memory,)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("activations", [None, 8])
def test_cells_are_stored_as_integers(tmp_path: Path, cell: Any, activations: int | None) -> None:
    torch.manual_seed(0)
    x = {"x": torch.randn(32, 24), "hidden": torch.randn(32, 40), "memory": torch.randn(32, 40)}
    model, few = Step(cell).eval(), {name: value[:2] for name, value in x.items()}
    data = {name: value.numpy() for name, value in x.items()}
    smaller = tinier.quantize(model, few, data, activations=activations)
    file = delivered(smaller, tmp_path, data)
    kinds = {t.data_type for t in constants(file, 24 * 40).values()}
    assert kinds == {onnx.TensorProto.INT8}
    with torch.no_grad():
        expected = model(**x)
    for found, wanted in zip(smaller.network(x), expected, strict=True):
        assert float((found - wanted).abs().max()) < 0.03


def test_a_large_vocabulary_has_its_zero_points_as_constants(tmp_path: Path) -> None:
    """onnxscript folds no casts of as many values."""
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(30000, 8)), torch.randint(30000, (3, 7))
    file = delivered(weights_alone(model, ids), tmp_path)
    assert [list(t.dims) for t in constants(file, 30000 * 8).values()] == [[30000, 8]]


def test_several_tables_beside_each_other(tmp_path: Path) -> None:
    """Operators have names of their own, whatever the exporter called the lookups."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(40, 32) for _ in range(3))

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = sum(table(ids) for table in self.tables)  # type: ignore[assignment]
            return found

    ids = torch.arange(12).reshape(2, 6)
    found = tinier.quantize(Sum().eval(), ids, bits=4, activations=None)
    artifact = tinier.export(found, tmp_path / "out", target="onnxruntime")
    nodes = [node.name for node in onnx.load(artifact.files[0]).graph.node]
    assert len(set(nodes)) == len(nodes)
    session = onnxruntime.InferenceSession(artifact.files[0], providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"ids": ids.numpy()})
    assert np.abs(actual - found.model(ids).detach().numpy()).max() < 1e-6


@pytest.mark.parametrize("group", [None, 32])
def test_a_tied_table_is_stored_once(tmp_path: Path, group: int | None) -> None:
    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(96, (3, 7))
    file = delivered(weights_alone(model, ids, group=group), tmp_path)
    tables = constants(file, 96 * 64)
    assert [list(t.dims) for t in tables.values()] == [[64, 96]], "columns by rows, for the product"
    assert at_run_time(file, tmp_path)["MatMulNBits"] == 2
    uneven = Tied(96, 50)  # no block divides 50: the product reads the table folded
    file = delivered(weights_alone(uneven, ids), tmp_path)
    assert [list(t.dims) for t in constants(file, 96 * 50).values()] == [[96, 50]]


def test_a_tied_table_of_four_bits_takes_no_more_than_one_of_eight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Tied(256), torch.randint(256, (3, 7))
    file = delivered(weights_alone(model, ids, bits=4, group=64), tmp_path)
    assert sum(len(t.raw_data) for t in constants(file, 256 * 32).values()) == 256 * 64
    assert at_run_time(file, tmp_path)["MatMulNBits"] == 2


@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.LSTM, {"num_layers": 2, "bidirectional": True}), (nn.GRU, {})],
)
def test_recurrent_weights_are_folded_at_load(
    tmp_path: Path, kind: type[nn.RNNBase], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model, x = Recurrent(kind, **options), torch.randn(4, 3, 32)
    file = delivered(weights_alone(model, x), tmp_path)
    weights = [t for t in constants(file, 64 * 32).values() if t.data_type != 1]
    layers, sides = (2, 2) if options else (1, 1)
    assert len(weights) == 2 * layers * sides
    runs = at_run_time(file, tmp_path)
    assert runs[kind.__name__] == layers
    assert not runs["DequantizeLinear"] + runs["Cast"]


@pytest.mark.parametrize("bits", [8, 4])
def test_recurrent_layers_take_as_many_bytes_as_their_integers(tmp_path: Path, bits: int) -> None:
    torch.manual_seed(0)

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(64, 128, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(x)[0]
            return found

    model, x = Steps(), torch.randn(4, 9, 64)
    file = delivered(weights_alone(model, x, bits=bits), tmp_path)
    before = parameter_bytes(model)
    # 4 · 128 channels: scales, biases and the graph take some.
    assert before / len(file.SerializeToString()) > (3.5 if bits == 8 else 6)
    binary = tmp_path / "out" / "openvino_model.bin"
    assert before / binary.stat().st_size > (3.5 if bits == 8 else 6)


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, False)])
def test_convolutions(tmp_path: Path, bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(6, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=4), nn.Flatten()
    )
    x = torch.randn(2, 6, 8, 8)
    file = delivered(weights_alone(model, x, bits=bits, symmetric=symmetric), tmp_path)
    kinds = {(8, True): onnx.TensorProto.INT8, (4, False): onnx.TensorProto.UINT4}
    assert {t.data_type for t in constants(file, 1000).values()} == {kinds[bits, symmetric]}
    runs = at_run_time(file, tmp_path)
    assert not runs["DequantizeLinear"] + runs["Cast"] + runs["Mul"], "computed once, at load"


@pytest.mark.parametrize("bits", [8, 4])
def test_transposed_convolutions(tmp_path: Path, bits: int) -> None:
    torch.manual_seed(0)
    model, x = Upsampling(), torch.randn(2, 8, 6, 6)
    file = delivered(weights_alone(model, x, bits=bits), tmp_path)
    scales = [t for t in file.graph.initializer if t.name.endswith("_scale")]
    assert sorted(tuple(t.dims) for t in scales) == [(1, 5, 1), (1, 24, 1, 1)], "outputs: axis 1"
    runs = at_run_time(file, tmp_path)
    assert runs["ConvTranspose"] == 2 and not runs["DequantizeLinear"] + runs["Cast"]


def test_pairs_of_integer_operators_stay(tmp_path: Path) -> None:
    """With quantized activations the pairs fuse; what stays float beside them is folded."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 8, 4, stride=2), nn.Flatten()
    ).append(nn.Linear(8 * 14 * 14, 10))
    x = torch.randn(16, 3, 8, 8)
    smaller = tinier.quantize(model.eval(), x[:2], x)
    file = delivered(smaller, tmp_path, x)
    assert operators(file)["Cast"] == 1
    runs = at_run_time(file, tmp_path)
    assert runs["QLinearConv"] == 1 and runs["ConvTranspose"] == 1 and not runs["Cast"]
