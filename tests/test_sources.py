"""Networks from modules, ONNX files and Hugging Face directories, and everything that must be refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import transformers
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn

import tinier
from tinier.errors import ModelError
from tinier.graph.states import quiet
from tinier.methods.channel_pruning import ChannelPruning
from tinier.methods.quantization import Quantization
from tinier.network import Network
from tinier.sources import onnx_compare
from tinier.sources.load import load
from tinier.statistics import collect
from tinier.targets.onnx_file import write_onnx
from tinier.verbs.disk import write_all


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(image))).mean((2, 3)))


def graph_file(
    path: Path,
    nodes: list[Any],
    inputs: dict[str, list[Any]],
    rank: int,
    constants: dict[str, np.ndarray],
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(k, kind, v) for k, v in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, str(path))
    return path


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def mlp_file(path: Path) -> Path:
    nodes = [
        helper.make_node("MatMul", ["input.1", "w.1"], ["h"]),
        helper.make_node("Add", ["b", "h"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Gemm", ["r", "v", "c"], ["y"], transB=1),
    ]
    constants = {"w.1": random(6, 5), "b": random(5), "v": random(3, 5), "c": random(3)}
    return graph_file(path, nodes, {"input.1": ["N", 6]}, 2, constants)


# --- modules


def test_a_module_with_its_example() -> None:
    module = Small()
    network = load(module, torch.randn(2, 3, 8, 8))
    assert network.module is module
    assert list(network.example) == ["image"]
    assert network.traced.batched and network.name == "Small"
    assert load(network, name="other").name == "other"


def test_an_example_of_one_is_repeated_where_the_batch_is_free() -> None:
    network = load(Small(), (torch.randn(1, 3, 8, 8),), name="net")
    assert network.example["image"].shape[0] == 2
    assert network.traced.batched and network.name == "net"


def test_a_module_of_fixed_batch_keeps_it() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(1, 12) * 2

    network = load(Fixed(), torch.randn(1, 3, 4))
    assert network.example["x"].shape == (1, 3, 4) and not network.traced.batched


def test_bad_modules() -> None:
    with pytest.raises(ModelError, match=r"example inputs are needed.*example="):
        load(Small())
    with pytest.raises(ModelError, match=r"does not run on the example \(image \(2, 5, 8, 8\)"):
        load(Small(), torch.randn(2, 5, 8, 8))
    with pytest.raises(ModelError, match="no input picture; it takes image"):
        load(Small(), {"picture": torch.randn(2, 3, 8, 8)})
    with pytest.raises(ModelError, match="int cannot be compressed"):
        load(3)


# --- ONNX


def test_onnx_weights_are_parameters_and_inputs_keep_their_names(tmp_path: Path) -> None:
    path = mlp_file(tmp_path / "mlp.onnx")
    network = load(str(path))
    assert network.name == "mlp" and list(network.example) == ["input_1"]
    assert network.traced.batched
    shapes = {name: tuple(value.shape) for name, value in network.module.named_parameters()}
    # Products with a matrix are linear layers: weights are (out, in).
    assert shapes == {
        "w.1": (5, 6),
        "weights.b": (5,),
        "weights.v": (3, 5),
        "weights.c": (3,),
    }
    targets = [str(node.target) for node in network.traced.module.graph.nodes]
    assert targets.count("aten.linear.default") == 2 and "aten.matmul.default" not in targets
    x = torch.randn(7, 6)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = session.run(None, {"input.1": x.numpy()})[0]
    np.testing.assert_allclose(network({"input_1": x})[0], wanted, atol=1e-5)
    loss = network.module(input_1=x).square().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.module.parameters())


def test_onnx_names_that_become_equal_stay_apart(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "w.1"], ["h"]),
        helper.make_node("Mul", ["h", "w/1"], ["y"]),
    ]
    constants = {"w.1": random(3), "w/1": random(3) + 5}
    network = load(graph_file(tmp_path / "n.onnx", nodes, {"x": ["N", 3]}, 2, constants))
    x = torch.randn(2, 3)
    expected = x * torch.from_numpy(constants["w.1"] * constants["w/1"])
    torch.testing.assert_close(network({"x": x})[0], expected)


def test_onnx_shape_arithmetic_keeps_the_batch_free(tmp_path: Path) -> None:
    # reshape(x, (shape(x)[0] * 2, 6)), then back, as exporters write it.
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        helper.make_node("Mul", ["n", "two"], ["m"]),
        helper.make_node("Concat", ["m", "six"], ["t"], axis=0),
        helper.make_node("Reshape", ["x", "t"], ["r"]),
        helper.make_node("Relu", ["r"], ["a"]),
        helper.make_node("Concat", ["n", "minus"], ["u"], axis=0),
        helper.make_node("Reshape", ["a", "u"], ["f"]),
        helper.make_node("Slice", ["f", "one", "end", "one"], ["y"]),
    ]
    constants = {
        "zero": np.array([0]),
        "two": np.array([2]),
        "six": np.array([6]),
        "minus": np.array([-1]),
        "one": np.array([1]),
        "end": np.array([2**62]),
    }
    network = load(graph_file(tmp_path / "s.onnx", nodes, {"x": ["N", 12]}, 2, constants))
    assert network.traced.batched
    assert not list(network.module.parameters())
    x = torch.randn(5, 12)
    torch.testing.assert_close(network.traced.module(x)[0], F.relu(x)[:, 1:])


def test_onnx_batch_norm_statistics_are_no_parameters(tmp_path: Path) -> None:
    nodes = [helper.make_node("BatchNormalization", ["x", "g", "b", "m", "v"], ["y"])]
    constants = {"g": random(3), "b": random(3), "m": random(3), "v": random(3) ** 2}
    file = graph_file(tmp_path / "b.onnx", nodes, {"x": ["N", 3, 4, 4]}, 4, constants)
    network = load(file)
    assert {name for name, _ in network.module.named_parameters()} == {"weights.g", "weights.b"}
    assert {name for name, _ in network.module.named_buffers()} == {"constants.m", "constants.v"}


def test_onnx_of_fixed_batch_keeps_it(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    network = load(graph_file(tmp_path / "f.onnx", nodes, {"x": [1, 4]}, 2, {}))
    assert network.example["x"].shape == (1, 4) and not network.traced.batched


def test_onnx_with_an_open_size_needs_an_example(tmp_path: Path) -> None:
    nodes = [helper.make_node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=0)]
    file = graph_file(tmp_path / "o.onnx", nodes, {"x": ["N", "frames", 4]}, 2, {})
    with pytest.raises(ModelError, match=r"input x.*dimension 1 \(frames\) open.*example="):
        load(file)
    assert load(file, torch.randn(1, 9, 4)).example["x"].shape == (2, 9, 4)
    with pytest.raises(ModelError, match=r"example input x is .*\(2, 9, 5\)"):
        load(file, torch.randn(2, 9, 5))
    with pytest.raises(ModelError, match="no input z; it has x"):
        load(file, {"z": torch.randn(2, 9, 4)})


def test_onnx_that_torch_exported(tmp_path: Path) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(50, 16)
            self.places = nn.Embedding(32, 16)
            self.query = nn.Linear(16, 48)
            self.norm = nn.LayerNorm(16)
            self.head = nn.Linear(16, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            n, length = input_ids.shape
            x = self.words(input_ids) + self.places(torch.arange(length))
            q, k, v = self.query(self.norm(x)).view(n, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, 16)
            return self.head(x[:, 0])

    torch.manual_seed(0)
    for module, inputs, dims in (
        (Small().eval(), torch.randn(2, 3, 8, 8), {0: "n"}),
        (Encoder().eval(), torch.randint(0, 50, (2, 10)), {0: "n", 1: "length"}),
    ):
        path = tmp_path / f"{type(module).__name__}.onnx"
        name = "image" if isinstance(module, Small) else "input_ids"
        sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        free = {name: {dim: sizes[dim] for dim in dims}}
        with quiet():
            torch.onnx.export(
                module, (inputs,), str(path), dynamo=True, dynamic_shapes=free, verbose=False
            )
        network = load(path)
        assert network.traced.batched
        assert sum(p.numel() for p in network.module.parameters()) >= 0.9 * sum(
            p.numel() for p in module.parameters()
        )
        other = torch.cat([inputs, inputs, inputs])
        if len(dims) == 2:
            other = other[:, :7]
        with torch.no_grad():
            wanted = module(other)
            got = network.traced.module(other)[0]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_onnx_names_of_values_are_no_names_of_weights(tmp_path: Path) -> None:
    # What torch's exporter calls its own values, given to weights by an earlier export.
    nodes = [
        helper.make_node("MatMul", ["x", "val_1"], ["h"]),
        helper.make_node("Add", ["h", "add"], ["a"]),
        helper.make_node("Mul", ["a", "linear"], ["m"]),
        helper.make_node("Pow", ["m", "val_0"], ["p"]),
        helper.make_node("Sub", ["p", "layer.0.shift"], ["y"]),
    ]
    constants = {
        "val_1": random(4, 4),
        "add": random(4),
        "linear": random(4),
        "val_0": np.array(2.0, np.float32),
        "layer.0.shift": random(4),
    }
    network = load(graph_file(tmp_path / "n.onnx", nodes, {"x": ["N", 4]}, 2, constants))
    names = [*dict(network.module.named_parameters()), *dict(network.module.named_buffers())]
    assert "layer.0.shift" in names and all("." in name for name in names)
    write_onnx(network, tmp_path / "again.onnx")
    again = load(tmp_path / "again.onnx")
    write_onnx(again, tmp_path / "third.onnx")
    x = {"x": torch.randn(3, 4)}
    torch.testing.assert_close(again(x)[0], network(x)[0])


def test_onnx_layers_that_share_equal_biases_are_not_coupled(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "a.weight", "a.bias"], ["h"]),
        helper.make_node("Gemm", ["h", "b.weight", "a.bias"], ["y"]),
    ]
    constants = {"a.weight": random(4, 4), "b.weight": random(4, 4) + 1, "a.bias": random(4)}
    network = load(graph_file(tmp_path / "s.onnx", nodes, {"x": ["N", 4]}, 2, constants))
    names = {name for name, _ in network.module.named_parameters()}
    assert names == {"a.weight", "b.weight", "a.bias", "b.bias"}


def test_onnx_gather_and_scatter_of_coordinates(tmp_path: Path) -> None:
    # y[n, l] = x[n, i[n, l]], once with batch_dims and once with the batch among the coordinates.
    nodes = [
        helper.make_node("Shape", ["ids"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        helper.make_node("Range", ["zero", "n", "one"], ["rows"]),
        helper.make_node("Unsqueeze", ["rows", "ones"], ["column"]),
        helper.make_node("Expand", ["column", "s"], ["full"]),
        helper.make_node("Unsqueeze", ["full", "last"], ["first"]),
        helper.make_node("Unsqueeze", ["ids", "last"], ["second"]),
        helper.make_node("Concat", ["first", "second"], ["coordinates"], axis=-1),
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("GatherND", ["x", "coordinates"], ["g"]),
        helper.make_node("GatherND", ["x", "second"], ["h"], batch_dims=1),
        helper.make_node("ScatterND", ["g", "coordinates", "h"], ["z"]),
        helper.make_node("Add", ["z", "h"], ["y"]),
    ]
    constants = {
        "zero": np.array(0),
        "one": np.array(1),
        "ones": np.array([1]),
        "last": np.array([-1]),
        "table": random(6, 3),
    }
    file = graph_file(
        tmp_path / "g.onnx", nodes, {"ids": ["N", "L"]}, 3, constants, kind=TensorProto.INT64
    )
    network = load(file, torch.arange(6).repeat(2, 1))
    assert network.traced.batched and not network.notes
    ids = torch.stack([torch.randperm(5) for _ in range(4)])
    got = network.traced.module(ids)[0]
    wanted = onnxruntime.InferenceSession(str(file)).run(None, {"ids": ids.numpy()})[0]
    np.testing.assert_allclose(got.detach().numpy(), wanted, atol=1e-6)


def test_onnx_that_needs_a_fixed_size_says_so(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("Relu", ["r"], ["y"], name="activation"),
    ]
    constants = {"shape": np.array([1, 4])}
    network = load(graph_file(tmp_path / "f.onnx", nodes, {"x": ["N", 4]}, 2, constants))
    assert network.example["x"].shape == (1, 4) and not network.traced.batched
    assert "the batch size is fixed at 1" in network.notes[0] and "Reshape" in network.notes[0]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Add", ["x", "places"], ["y"]),
    ]
    constants = {"table": random(6, 3), "places": random(16, 3)}
    file = graph_file(
        tmp_path / "l.onnx", nodes, {"ids": ["N", "L"]}, 3, constants, kind=TensorProto.INT64
    )
    network = load(file)
    assert network.traced.batched
    assert "dimension 1 of input ids is fixed at 16" in network.notes[0]
    assert network.copy().notes == network.notes
    write_onnx(network, tmp_path / "again.onnx")
    sizes = onnx.load(str(tmp_path / "again.onnx")).graph.input[0].type.tensor_type.shape.dim
    assert sizes[0].dim_param and sizes[1].dim_value == 16


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        make: Any = transformers.BertConfig
        config = make(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=32,
            max_position_embeddings=32,
            num_labels=3,
        )
        self.model = transformers.BertForSequenceClassification(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        result = self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )
        return result.logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["old", "new"])
def test_onnx_of_an_encoder_keeps_batch_and_length_free(tmp_path: Path, way: str) -> None:
    torch.manual_seed(0)
    module = Bert().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    ids = torch.randint(0, 50, (2, 8))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids * 0}
    path = tmp_path / "bert.onnx"
    if way == "old":
        with quiet():
            torch.onnx.export(
                module,
                tuple(inputs.values()),
                str(path),
                dynamo=False,
                opset_version=14,
                input_names=list(inputs),
                output_names=["logits"],
                dynamic_axes={name: {0: "batch", 1: "length"} for name in inputs},
            )
    else:
        write_onnx(load(module, inputs), path)
    network = load(path)
    assert network.traced.batched and not network.notes
    assert len([n for n, _ in network.module.named_parameters() if "query" in n]) >= 2
    pruned = ChannelPruning(keep=0.5).plan(network, None).apply(network)
    write_onnx(pruned, tmp_path / "again.onnx")
    runs = [
        (module, path, 1e-4),
        (network.traced.module, path, 1e-4),
        (pruned.traced.module, tmp_path / "again.onnx", 1e-4),
    ]
    if way == "old":
        statistics = collect(pruned, [dict(pruned.example)])
        quantized = Quantization().plan(pruned, statistics).apply(pruned)
        write_onnx(quantized, tmp_path / "quantized.onnx")
        runs.append((quantized.traced.module, tmp_path / "quantized.onnx", 0.2))
    for run, file, tolerance in runs:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        for batch, length in ((1, 16), (3, 5)):
            ids = torch.randint(0, 50, (batch, length))
            mask = torch.ones_like(ids)
            mask[0, 3:] = 0
            batch_of = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
            with torch.no_grad():
                result = run(*batch_of.values())
            got = result if isinstance(result, Tensor) else result[0]
            wanted = session.run(None, {name: v.numpy() for name, v in batch_of.items()})[0]
            np.testing.assert_allclose(got.numpy(), wanted, atol=tolerance)


def test_onnx_of_vision_networks_exported_the_old_way(tmp_path: Path) -> None:
    make: Any = transformers.ViTConfig
    config = make(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
    )
    vit: Any = transformers.ViTForImageClassification
    for module, opset in ((vit(config), 17), (Small(), 14)):
        path = tmp_path / "old.onnx"
        image = torch.rand(2, 3, 8, 8)
        with quiet():
            torch.onnx.export(
                module.eval(),
                (image,),
                str(path),
                dynamo=False,
                opset_version=opset,
                input_names=["image"],
                dynamic_axes={"image": {0: "batch"}},
            )
        network = load(path)
        assert network.traced.batched and not network.notes
        write_onnx(network, tmp_path / "again.onnx")


def test_onnx_gather_counts_from_the_end(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gather", ["x", "last"], ["y"], axis=1)]
    constants = {"last": np.array(-1)}
    file = graph_file(tmp_path / "g.onnx", nodes, {"x": ["N", 5, 2]}, 2, constants)
    x = torch.randn(3, 5, 2)
    torch.testing.assert_close(load(file)({"x": x})[0], x[:, -1])


def test_onnx_functions_are_inlined(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    twice = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], opsets[:1]
    )
    graph = helper.make_graph(
        [helper.make_node("Twice", ["x"], ["y"], domain="mine")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
    )
    model = helper.make_model(graph, opset_imports=opsets, functions=[twice], ir_version=8)
    onnx.save(model, str(tmp_path / "f.onnx"))
    x = torch.randn(3, 2)
    torch.testing.assert_close(load(tmp_path / "f.onnx")({"x": x})[0], 2 * x)


def test_files_that_are_no_onnx(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load(tmp_path / "none.onnx")
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(ModelError, match="file is empty"):
        load(tmp_path / "empty.onnx")
    for content in (b"hello, this is a text\n", b"PK\x03\x04" + bytes(50)):
        (tmp_path / "text.onnx").write_bytes(content)
        with pytest.raises(ModelError, match="not an ONNX file"):
            load(tmp_path / "text.onnx")


def test_an_operator_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    node = helper.make_node("StringNormalizer", ["x"], ["y"], name="clean")
    file = graph_file(tmp_path / "s.onnx", [node], {"x": ["N"]}, 1, {}, kind=TensorProto.STRING)
    with pytest.raises(ModelError, match=r"StringNormalizer.*|STRING"):
        load(file)
    made = helper.make_node("MelWeightMatrixOfMine", ["x"], ["y"], name="odd", domain="my.domain")
    graph = helper.make_graph(
        [made],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.domain", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), str(tmp_path / "m.onnx"))
    with pytest.raises(ModelError, match=r"MelWeightMatrixOfMine of my\.domain \(node odd\)"):
        load(tmp_path / "m.onnx")


def test_an_invalid_onnx(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["nobody_made_it"], ["y"])]
    file = graph_file(tmp_path / "i.onnx", nodes, {"x": ["N", 4]}, 2, {})
    with pytest.raises(ModelError, match="not a valid ONNX model"):
        load(file)


def test_a_quantized_onnx(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantize_x"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    constants: dict[str, np.ndarray] = {"s": np.array(0.1, np.float32), "z": np.array(0, np.uint8)}
    file = graph_file(tmp_path / "q.onnx", nodes, {"x": ["N", 4]}, 2, constants)
    with pytest.raises(
        ModelError, match=r"already quantized \(operator QuantizeLinear, node quantize_x"
    ):
        load(file)


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/passwd", "a/../../secret.bin", "link.bin"]
)
def test_external_data_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(random(4).tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    path = graph_file(
        folder / "e.onnx",
        [helper.make_node("Add", ["x", "w"], ["y"])],
        {"x": ["N", 4]},
        2,
        {"w": random(4)},
    )
    proto = onnx.load(str(path))
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "16"}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"external data of w.*(outside|symbolic link)"):
        load(path)


def test_external_data_beside_the_file_are_read(tmp_path: Path) -> None:
    path = mlp_file(tmp_path / "mlp.onnx")
    inside = load(path)
    proto = onnx.load(str(path))
    onnx.save(
        proto,
        str(tmp_path / "ext.onnx"),
        save_as_external_data=True,
        location="ext.data",
        size_threshold=0,
    )
    x = {"input_1": torch.randn(3, 6)}
    torch.testing.assert_close(load(tmp_path / "ext.onnx")(x), inside(x))
    (tmp_path / "ext.data").unlink()
    with pytest.raises(ModelError, match="are missing"):
        load(tmp_path / "ext.onnx")


def test_a_wrong_import_is_refused_with_the_difference() -> None:
    ones = np.ones((2, 3), np.float32)
    with pytest.raises(ModelError, match=r"differs from ONNX Runtime by 0\.01 .*not used"):
        onnx_compare._compare_output(Path("m.onnx"), "output 0", ones + 0.01, ones)
    onnx_compare._compare_output(Path("m.onnx"), "output 0", ones + 1e-6, ones)


# --- other files


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    for ending in (".pt", ".pth", ".bin", ".pkl", ".ckpt"):
        path = tmp_path / f"model{ending}"
        path.write_bytes(b"x")
        with pytest.raises(ModelError, match=r"never loaded.*weights_only=True.*save_file"):
            load(path)
    (tmp_path / "w.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="has weights but not the network"):
        load(tmp_path / "w.safetensors")
    (tmp_path / "m.keras").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"not a \.keras file, which is a zip archive"):
        load(tmp_path / "m.keras")
    with pytest.raises(ModelError, match="no such file"):
        load("nowhere/model.pt")
    (tmp_path / "m.txt").write_bytes(b"x")
    with pytest.raises(ModelError, match="not a model that can be read"):
        load(tmp_path / "m.txt")


# --- Hugging Face


def bert(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


def test_a_hugging_face_encoder(tmp_path: Path) -> None:
    model = bert(tmp_path / "bert")
    network = load(tmp_path / "bert")
    assert network.folder == tmp_path / "bert" and network.name == "bert"
    assert list(network.example) == ["input_ids", "attention_mask", "token_type_ids"]
    assert network.traced.batched and network.traced.outputs == ("logits",)
    with torch.no_grad():
        wanted = model(**network.example).logits
    torch.testing.assert_close(network(network.example)[0], wanted)


def test_a_hugging_face_image_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    network = load(tmp_path)
    assert network.example["pixel_values"].shape == (2, 3, 16, 16)
    assert network.traced.batched


@pytest.mark.parametrize("kind", ["T5", "Bart", "Whisper"])
def test_hugging_face_encoders_with_a_decoder(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"vocab_size": 60, "d_model": 16, "pad_token_id": 0}
    options |= {"decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "T5":
        options |= {"d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
    for side in ("encoder", "decoder"):
        options |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 24}
    if kind == "Whisper":
        options |= {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20}
    config = getattr(transformers, f"{kind}Config")(**options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    model.save_pretrained(tmp_path)
    network = load(tmp_path)
    assert network.example["decoder_input_ids"].shape == (2, 12)
    if kind == "Whisper":
        assert network.example["input_features"].shape == (2, 8, 20)
    with torch.no_grad():
        wanted = model(**network.example, use_cache=False).logits
    torch.testing.assert_close(network(network.example)[0], wanted)
    longer = {k: torch.cat([v, v], 1) for k, v in network.example.items() if v.ndim == 2}
    longer["decoder_input_ids"] = longer["decoder_input_ids"][:, :17]
    inputs = {**network.example, **longer}
    with torch.no_grad():
        torch.testing.assert_close(network.traced.module(**inputs)[0], network(inputs)[0])
    assert ChannelPruning(keep=0.8, round_to=1).plan(network).edits


def test_folders_of_results_name_the_file_in_them(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    smaller = tinier.prune(model, torch.randn(2, 8))
    tinier.save(smaller, tmp_path / "saved")
    with pytest.raises(ModelError, match=r"tinier.load\('.*saved', into=model\) rebuilds"):
        load(tmp_path / "saved")
    write_all(smaller, tmp_path / "all")
    with pytest.raises(ModelError, match=r"name the model in it: .*model\.pt2") as caught:
        load(tmp_path / "all")
    load(Path(str(caught.value).rpartition(": ")[2]))


def test_bad_hugging_face_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        load(tmp_path)
    config.write_text(json.dumps({"auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(ModelError, match="auto_map asks to run code"):
        load(tmp_path)
    config.write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(
        ModelError, match=r"pytorch_model\.bin is a pickle(.|\n)*safe_serialization=True"
    ):
        load(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    bert(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_file(
        {"nothing": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ModelError, match="the weights lack"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["MyOwnModel"]}))
    with pytest.raises(ModelError, match="no class MyOwnModel"):
        load(tmp_path)


def test_loading_leaves_a_network_alone() -> None:
    network = Network(Small(), {"image": torch.randn(2, 3, 8, 8)}, "a")
    assert load(network) is network


def test_an_input_named_like_a_builtin_keeps_its_free_batch(tmp_path: Path) -> None:
    # torch.fx renames such nodes; the input's own name is what counts.
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["bytes", "w"], ["out"])],
            "g",
            [helper.make_tensor_value_info("bytes", TensorProto.FLOAT, ["n", 4])],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 3])],
            [numpy_helper.from_array(np.ones((4, 3), np.float32), "w")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    onnx.save(model, tmp_path / "m.onnx")
    network = load(tmp_path / "m.onnx")
    assert network.traced.batched and not network.notes and list(network.example) == ["bytes"]
