"""The packed file: the same bits come back, and files that nobody packed are refused before they cost anything."""

import hashlib
import json
import random
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tinier
from networks import NETWORKS, build
from test_cli import tinier as command
from test_packing import paths, replaced
from tinier.demo.run import network as demo_network
from tinier.edits.mask import unmask
from tinier.errors import InputError, OutputError, RefusedError, TinierError
from tinier.methods.quantization import Quantization
from tinier.methods.weight_pruning import WeightPruning
from tinier.methods.weight_sharing import WeightSharing
from tinier.network import Network
from tinier.report import packed_file
from tinier.report.packed_file import DTYPES, PackedFile, write
from tinier.targets.onnx_file import write_onnx
from tinier.tensors import entropy_code


@cache
def built(name: str) -> Network:
    return build(name)


def bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def same(one: Any, two: Any) -> None:
    """The same names, types, shapes and bits."""
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype and one[name].shape == two[name].shape
        assert bits(one[name]) == bits(two[name]), name


def patterns(dtype: torch.dtype, *shape: int) -> Tensor:
    """Random bits of a type; truth values are 0 and 1."""
    count = int(np.prod(shape)) * dtype.itemsize
    if not count:
        return torch.empty(shape, dtype=dtype)
    raw = np.random.default_rng(count).integers(0, 2 if dtype == torch.bool else 256, count)
    return torch.from_numpy(raw.astype(np.uint8)).view(dtype).reshape(shape)


class TestSameBits:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_every_network(self, name: str, tmp_path: Path) -> None:
        network = built(name)
        tinier.pack(network, tmp_path / "m.tinier")
        state = network.module.state_dict()
        found = tinier.unpack(tmp_path / "m.tinier")
        assert isinstance(found, dict)
        same(found, state)
        blank = build(name, seed=1).module
        filled = tinier.unpack(tmp_path / "m.tinier", blank)
        assert type(filled) is type(blank) and filled is not blank
        same(filled.state_dict(), state)  # type: ignore[union-attr]
        x = network.example
        for a, b in zip(network(x), Network(filled, x)(x), strict=True):  # type: ignore[arg-type]
            assert torch.equal(a, b)

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
    def test_every_type(self, dtype: torch.dtype, tmp_path: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for shape in ((), (0, 3), (1,), (5, 3), (90, 70)):
            tensors[f"noise {shape}"] = patterns(dtype, *shape)
            tensors[f"constant {shape}"] = torch.ones(shape).to(dtype)
        tensors["transposed"] = patterns(dtype, 90, 70).T
        write(tensors.items(), {}, tmp_path / "m.tinier")
        same(PackedFile(tmp_path / "m.tinier").load(), tensors)

    def test_floats_that_are_no_numbers(self, tmp_path: Path) -> None:
        words = torch.tensor([0, -(2**31), 2143289344, 2143289345, -1, 1], dtype=torch.int32)
        module = nn.Linear(6, 100, bias=False)
        module.weight = nn.Parameter(words.repeat(100, 1).view(torch.float32))
        tinier.pack(module, tmp_path / "m.tinier")
        filled = tinier.unpack(tmp_path / "m.tinier", nn.Linear(6, 100, bias=False))
        assert bits(filled.weight) == bits(module.weight)  # type: ignore[union-attr, arg-type]

    def test_pruned_and_shared(self, tmp_path: Path) -> None:
        network = built("residual_cnn")
        masked = WeightPruning(keep=0.3).plan(network).apply(network)
        shared = WeightSharing(bits=4).plan(masked).apply(masked)
        plain = unmask(shared).module.state_dict()
        packed = tinier.pack(shared, tmp_path / "m.tinier")
        same(tinier.unpack(tmp_path / "m.tinier"), plain)
        # Held zeros are plain ones: the model before masks takes them, and the one with these masks.
        same(tinier.unpack(tmp_path / "m.tinier", network).state_dict(), plain)  # type: ignore[union-attr]
        again = tinier.unpack(tmp_path / "m.tinier", shared)
        for a, b in zip(shared(network.example), Network(again, network.example)(network.example), strict=True):  # type: ignore[arg-type] # fmt: skip
            assert torch.equal(a, b)
        kinds = [row.kind for row in packed.rows]
        assert any("shared values, 4 bits" in kind for kind in kinds)
        with pytest.raises(InputError, match="other zeros than the model holds"):
            tinier.pack(network, tmp_path / "dense.tinier")
            tinier.unpack(tmp_path / "dense.tinier", shared)

    def test_quantized_at_the_bits_of_the_integers(self, tmp_path: Path) -> None:
        network = Network(nn.Sequential(nn.Linear(128, 256)).eval(), {"input": torch.ones(2, 128)})
        for width in (3, 4, 8):
            method = Quantization(bits=width, activations=None, weight_ranges="minmax")
            quantized = method.plan(network).apply(network)
            packed = tinier.pack(quantized, tmp_path / "m.tinier")
            same(tinier.unpack(tmp_path / "m.tinier"), quantized.module.state_dict())
            row = next(row for row in packed.rows if f"integers, {width} bits" in row.kind)
            assert row.values == 128 * 256 and row.bits <= width

    def test_tied_and_equal_tensors_once(self, tmp_path: Path) -> None:
        one = nn.Linear(90, 90, bias=False)
        single = tinier.pack(one, tmp_path / "1.tinier")
        twice = nn.Sequential(one, nn.Linear(90, 90, bias=False))
        twice[1].weight = one.weight
        tied = tinier.pack(twice, tmp_path / "2.tinier")
        assert tied.packed < single.packed + 40 and tied.raw == single.raw
        twice[1].weight = nn.Parameter(one.weight.detach().clone())
        equal = tinier.pack(twice, tmp_path / "3.tinier")
        assert equal.packed == tied.packed and equal.raw == 2 * single.raw
        same(tinier.unpack(tmp_path / "3.tinier"), twice.state_dict())

    def test_the_same_bytes_every_time(self, tmp_path: Path) -> None:
        for name in ("1", "2"):
            tinier.pack(built("vit"), tmp_path / name)
        assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()

    def test_sizes_add_up(self, tmp_path: Path) -> None:
        network = built("residual_cnn")
        packed = tinier.pack(network, tmp_path / "m.tinier")
        size = (tmp_path / "m.tinier").stat().st_size
        assert size == packed.packed == sum(row.packed for row in packed.rows)
        state = network.module.state_dict().values()
        assert packed.raw == sum(t.numel() * t.element_size() for t in state)
        assert packed.total.values == sum(t.numel() for t in state)
        assert packed.as_dict()["rows"][-1]["bits_per_value"] == 8 * size / packed.total.values
        assert f"{packed.ratio:.1f} times smaller" in str(packed)


def test_safetensors_both_ways(tmp_path: Path) -> None:
    tensors = {"../a": torch.randn(3, 4), "b": torch.zeros(2), "c": torch.zeros(2)}
    save_file(tensors, tmp_path / "in.safetensors")
    tinier.pack(tmp_path / "in.safetensors", tmp_path / "m.tinier")
    out = tinier.unpack(tmp_path / "m.tinier", tmp_path / "out.safetensors")
    assert out == tmp_path / "out.safetensors"
    same(load_file(tmp_path / "out.safetensors"), tensors)
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a safetensors file"):
        tinier.pack(tmp_path / "no.safetensors", tmp_path / "n.tinier")


class TestDoesNotFit:
    def test_other_models(self, tmp_path: Path) -> None:
        tinier.pack(nn.Linear(3, 2), tmp_path / "m.tinier")
        for other, what in (
            (nn.Linear(3, 2, bias=False), "what the model has not: bias"),
            (nn.Sequential(nn.Linear(3, 2)), "has no 0.bias and 1 more"),
            (nn.Linear(3, 4), r"the model's torch.float32 \(4"),
            (nn.Linear(3, 2).double(), r"the model's torch.float64 \(2"),
        ):
            with pytest.raises(InputError, match=what):
                tinier.unpack(tmp_path / "m.tinier", other)

    def test_what_cannot_be_packed(self, tmp_path: Path) -> None:
        class Odd(nn.Linear):
            def get_extra_state(self) -> dict[str, int]:
                return {"calls": 3}

        with pytest.raises(RefusedError, match="_extra_state: a state that is a dict"):
            tinier.pack(Odd(2, 2), tmp_path / "m.tinier")
        with pytest.raises(RefusedError, match="weight is on the meta device"):
            tinier.pack(nn.Linear(2, 2, device="meta"), tmp_path / "m.tinier")
        with pytest.raises(InputError, match="sparse_coo"):
            write([("x", torch.eye(2).to_sparse())], {}, tmp_path / "m.tinier")
        assert not list(tmp_path.iterdir())  # nothing half-written

    def test_places_to_write(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="make it first"):
            tinier.pack(nn.Linear(2, 2), tmp_path / "no" / "m.tinier")
        with pytest.raises(OutputError, match="is a folder"):
            tinier.pack(nn.Linear(2, 2), tmp_path)
        with pytest.raises(InputError, match="No such file"):
            tinier.unpack(tmp_path / "none.tinier")


class TestOnnx:
    @pytest.mark.parametrize("name", ["residual_cnn", "lstm"])
    def test_the_file_comes_back(self, name: str, tmp_path: Path) -> None:
        network = built(name)
        write_onnx(WeightSharing(bits=4).plan(network).apply(network), tmp_path / "m.onnx")
        packed = tinier.pack(str(tmp_path / "m.onnx"), tmp_path / "m.tinier")
        out = tinier.unpack(tmp_path / "m.tinier", tmp_path / "back.onnx")
        data = (tmp_path / "m.onnx").read_bytes()
        assert out == tmp_path / "back.onnx" and out.read_bytes() == data
        assert packed.raw == len(data) and packed.packed < 0.45 * len(data)
        assert any(row.kind == "graph" for row in packed.rows)

    def test_tensors_in_odd_places(self, tmp_path: Path) -> None:
        """In nodes, in another order than the file's, within each other, as lists of floats, of four bits, empty."""
        rng = np.random.default_rng(0)
        zeros, noise = np.zeros(3000, np.float32), rng.normal(size=500).astype(np.float32)
        listed = helper.make_tensor("l", TensorProto.FLOAT, [500], (noise * 2).tolist())
        four = helper.make_tensor("4", TensorProto.INT4, [101], rng.integers(-8, 8, 101))
        nodes = [
            helper.make_node("Constant", [], [f"c{i}"], value=numpy_helper.from_array(array, "c"))
            for i, array in enumerate((noise, zeros[:100], noise[::-1].copy(), noise[3:90]))
        ]
        constants = [
            numpy_helper.from_array(array, f"i{i}")
            for i, array in enumerate((zeros, noise, zeros[:10], np.zeros((0, 2), np.float32)))
        ]
        output = helper.make_tensor_value_info("c0", TensorProto.FLOAT, [500])
        graph = helper.make_graph(nodes, "g", [], [output], [*constants, listed, four])
        data = helper.make_model(graph).SerializeToString()
        (tmp_path / "m.onnx").write_bytes(data)
        tinier.pack(tmp_path / "m.onnx", tmp_path / "m.tinier")
        tinier.unpack(tmp_path / "m.tinier", tmp_path / "back.onnx")
        assert (tmp_path / "back.onnx").read_bytes() == data

    def test_refusals(self, tmp_path: Path) -> None:
        (tmp_path / "m.onnx").write_bytes(b"no onnx \xff\xff")
        with pytest.raises(InputError, match="not an ONNX file"):
            tinier.pack(tmp_path / "m.onnx", tmp_path / "m.tinier")
        with pytest.raises(InputError, match="No such file"):
            tinier.pack(tmp_path / "none.onnx", tmp_path / "m.tinier")
        write_onnx(built("mlp"), tmp_path / "m.onnx")
        tinier.pack(tmp_path / "m.onnx", tmp_path / "m.tinier")
        for into in (None, built("mlp"), tmp_path / "m.safetensors"):
            with pytest.raises(InputError, match="name the file to write"):
                tinier.unpack(tmp_path / "m.tinier", into)
        model = onnx.load(str(tmp_path / "m.onnx"))
        onnx.save(model, str(tmp_path / "e.onnx"), save_as_external_data=True, size_threshold=0)
        with pytest.raises(InputError, match="in other files"):
            tinier.pack(tmp_path / "e.onnx", tmp_path / "e.tinier")

    def test_parts_of_another_file(self, tmp_path: Path) -> None:
        parts = [("0 a", torch.arange(99.0)), ("graph", torch.arange(9, dtype=torch.uint8))]
        digest = hashlib.sha256(b"").hexdigest()
        for starts in ([0], [10**12], [-1], ["0"], [], None, [0, 0]):
            facts = {"kind": "onnx", "starts": starts, "sha256": digest}
            write(parts, facts, tmp_path / "m.tinier")
            with pytest.raises(InputError):
                tinier.unpack(tmp_path / "m.tinier", tmp_path / "back.onnx")
            assert not (tmp_path / "back.onnx").exists()
        write([], {"kind": "onnx", "starts": [], "sha256": digest}, tmp_path / "m.tinier")
        with pytest.raises(InputError, match="not those of an ONNX file"):
            tinier.unpack(tmp_path / "m.tinier", tmp_path / "back.onnx")


def forged(file: Path, change: Callable[[dict[str, Any]], object], more: bytes = b"") -> Path:
    """The file with another header, more blocks, and a hash that fits."""
    data = file.read_bytes()
    front = packed_file._FRONT
    magic, version, code, length, head, *_ = front.unpack_from(data)
    name = entropy_code.CODES[code]
    text = entropy_code.decode(name, data[front.size : front.size + head], length)
    header = json.loads(text)
    header = change(header) or header
    text = json.dumps(header).encode()
    body = data[front.size + head :] + more
    start = front.pack(magic, version, 0, len(text), len(text), len(body), bytes(32))[:-32]
    made = file.with_name("forged.tinier")
    made.write_bytes(start + hashlib.sha256(start + text + body).digest() + text + body)
    return made


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("packed") / "m.tinier"
    torch.manual_seed(0)
    shared = torch.randint(0, 9, (70, 30)).float()
    tensors = {"a": torch.randn(50, 60), "b": shared, "c": torch.ones(3), "d": shared * 0}
    write(tensors.items(), {"kind": "weights"}, file)
    return file


class TestHostileFiles:
    def test_truncated(self, file: Path, tmp_path: Path) -> None:
        data = file.read_bytes()
        for length in (0, 5, 8, 40, 71, 72, 100, len(data) // 2, len(data) - 1):
            (tmp_path / "cut").write_bytes(data[:length])
            with pytest.raises(InputError, match=r"not a file that tinier packed|were written"):
                tinier.unpack(tmp_path / "cut")
        (tmp_path / "longer").write_bytes(data + b"\0")
        with pytest.raises(InputError, match="were written"):
            tinier.unpack(tmp_path / "longer")

    def test_every_flipped_byte_is_seen(self, file: Path, tmp_path: Path) -> None:
        data = file.read_bytes()
        rng = random.Random(0)
        for place in [*range(80), *(rng.randrange(len(data)) for _ in range(40))]:
            wrong = bytearray(data)
            wrong[place] ^= 1 << rng.randrange(8)
            (tmp_path / "wrong").write_bytes(wrong)
            with pytest.raises(InputError):
                tinier.unpack(tmp_path / "wrong")

    def test_other_files_and_versions(self, file: Path, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(b"PK\x03\x04" + bytes(200))
        with pytest.raises(InputError, match="not a file that tinier packed"):
            tinier.unpack(tmp_path / "x")
        data = bytearray(file.read_bytes())
        data[8:12] = struct.pack("<I", 2)
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(InputError, match="in format 2; this tinier reads format 1"):
            tinier.unpack(tmp_path / "x")

    def test_a_header_that_is_a_bomb(self, tmp_path: Path) -> None:
        for length in (1 << 20, 1 << 40):
            head = entropy_code.code(b" " * (1 << 22), "deflate")
            front = packed_file._FRONT.pack(
                packed_file.MAGIC, 1, 2, length, len(head), 0, bytes(32)
            )[:-32]
            data = front + hashlib.sha256(front + head).digest() + head
            (tmp_path / "x").write_bytes(data)
            with pytest.raises(InputError, match=r"are read|cannot be read"):
                tinier.unpack(tmp_path / "x")

    @pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "nan", "[]", "{}", '{"facts": 1}'])
    def test_headers_that_are_none(self, file: Path, text: str, tmp_path: Path) -> None:
        data = text.encode()
        front = packed_file._FRONT.pack(
            packed_file.MAGIC, 1, 0, len(data), len(data), 0, bytes(32)
        )[:-32]
        (tmp_path / "x").write_bytes(front + hashlib.sha256(front + data).digest() + data)
        with pytest.raises(InputError):
            tinier.unpack(tmp_path / "x")

    def test_huge_sizes_are_refused_before_anything_is_made(self, file: Path) -> None:
        def claim(count: int) -> Callable[[dict[str, Any]], None]:
            def change(header: dict[str, Any]) -> None:
                header["blocks"][0]["count"] = count

            return change

        with pytest.raises(InputError, match=r"say to become .* at_most"):
            tinier.unpack(forged(file, claim(10**12)))
        with pytest.raises(InputError, match="count is 1000000000000000000000"):
            tinier.unpack(forged(file, claim(10**21)))
        with pytest.raises(InputError, match="become"):
            tinier.unpack(file, at_most="1kB")
        assert isinstance(tinier.unpack(file, at_most="1MB"), dict)

    def test_a_model_is_not_filled_with_a_bomb(self, tmp_path: Path) -> None:
        """A constant is a few bytes in a file, however large it is: 400 MB here, which is never made."""
        tinier.pack(nn.Linear(3, 2), tmp_path / "m.tinier")

        def swell(header: dict[str, Any]) -> None:
            header["blocks"].append(
                {"dtype": "float32", "count": 10**8, "bytes": 4, "form": "codebook", "book": 1, "bits": 0,
                 "streams": [["stored", 4]]}
            )  # fmt: skip

        made = forged(tmp_path / "m.tinier", swell, bytes(4))
        with pytest.raises(InputError, match=r"say to become 400,000,032; at most"):
            tinier.unpack(made, nn.Linear(3, 2))
        made = forged(tmp_path / "m.tinier", lambda header: None, bytes(4))
        with pytest.raises(InputError, match="do not fill the file"):
            tinier.unpack(made, nn.Linear(3, 2))

    def test_any_value_of_the_header_replaced(self, file: Path) -> None:
        """Refused with a reason, or a dict of tensors: never another error."""
        original = PackedFile(file).load()
        found: list[dict[str, Any]] = []
        forged(file, lambda header: found.append(header))
        nonsense: tuple[Any, ...] = (None, -1, 2, 10**30, "x", "../../etc/passwd", [], {}, [[]])
        refused = 0
        for path in paths(found[0]):
            for value in nonsense:
                made = forged(file, lambda header, p=path, v=value: replaced(header, p, v))  # type: ignore[misc]
                try:
                    assert isinstance(tinier.unpack(made), dict)
                except TinierError:
                    refused += 1
        assert refused > 300
        same(PackedFile(file).load(), original)

    def test_names_are_names(self, file: Path, tmp_path: Path) -> None:
        """A name like a path is a key, and writes nothing anywhere."""
        names = ["../../../tmp/x", "/etc/passwd", "a\x00b", "C:\\x", ""]
        write([(name, torch.ones(2)) for name in names], {"kind": "weights"}, tmp_path / "m.tinier")
        found = tinier.unpack(tmp_path / "m.tinier")
        assert isinstance(found, dict) and sorted(found) == sorted(names)
        assert [entry.name for entry in tmp_path.iterdir()] == ["m.tinier"]

        def twice(header: dict[str, Any]) -> None:
            header["tensors"][1][0] = header["tensors"][0][0]

        with pytest.raises(InputError, match="two tensors have one name"):
            tinier.unpack(forged(file, twice))

    def test_tensors_beyond_their_block(self, file: Path) -> None:
        for shape, start in (([3001], 0), ([3000], 1), ([0, 1 << 47, 1 << 47], 0)):

            def change(header: dict[str, Any], shape: Any = shape, start: int = start) -> None:
                header["tensors"][0][1:] = [shape, 0, start]

            with pytest.raises(InputError, match="larger than its block"):
                tinier.unpack(forged(file, change))

    def test_truth_values_are_two(self, tmp_path: Path) -> None:
        write([("b", torch.ones(99, dtype=torch.uint8) * 3)], {"kind": "weights"}, tmp_path / "m")

        def change(header: dict[str, Any]) -> None:
            header["blocks"][0]["dtype"] = "bool"

        with pytest.raises(InputError, match="neither 0 nor 1"):
            tinier.unpack(forged(tmp_path / "m", change))

    def test_an_unknown_kind(self, tmp_path: Path) -> None:
        write([], {"kind": "program"}, tmp_path / "m.tinier")
        with pytest.raises(InputError, match="'program'; weights and onnx are known"):
            tinier.unpack(tmp_path / "m.tinier")


class TestCommandLine:
    def test_onnx_both_ways(self, tmp_path: Path) -> None:
        write_onnx(built("mlp"), tmp_path / "m.onnx")
        done = command("pack", tmp_path / "m.onnx", "-o", tmp_path / "m.tinier")
        assert done.exit_code == 0, done.output
        for word in ("bits per weight", "float32", "graph", "header", "smaller"):
            assert word in done.output
        again = command("pack", tmp_path / "m.onnx", "-o", tmp_path / "m.tinier", "--json")
        facts = json.loads(again.stdout)
        assert facts["rows"][-1]["raw"] == (tmp_path / "m.onnx").stat().st_size
        done = command("unpack", tmp_path / "m.tinier", "-o", tmp_path / "back.onnx")
        assert done.exit_code == 0, done.output
        assert (tmp_path / "back.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()

    def test_a_function_without_example_inputs(self, tmp_path: Path) -> None:
        out = tmp_path / "m.tinier"
        done = command("pack", "tinier.demo.run:network", "-o", out)
        assert done.exit_code == 0, done.output
        done = command("unpack", out, "-o", tmp_path / "m.safetensors")
        assert done.exit_code == 0, done.output
        same(load_file(tmp_path / "m.safetensors"), dict(demo_network().state_dict()))

    def test_refusals(self, tmp_path: Path) -> None:
        (tmp_path / "m.tinier").write_bytes(b"nothing")
        done = command("unpack", tmp_path / "m.tinier", "-o", tmp_path / "x.onnx")
        assert done.exit_code == 2 and "not a file that tinier packed" in done.output
        done = command("unpack", tmp_path / "m.tinier", "-o", tmp_path / "x.pt")
        assert done.exit_code == 2 and "safetensors" in done.output
        tinier.pack(nn.Linear(30, 30), tmp_path / "m.tinier")
        small = ("--at-most", "1kB")
        done = command("unpack", tmp_path / "m.tinier", "-o", tmp_path / "x.safetensors", *small)
        assert done.exit_code == 2 and "at most 1,000 are allowed" in " ".join(done.output.split())
