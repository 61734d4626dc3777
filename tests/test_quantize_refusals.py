"""What quantize, deliver and export refuse before any work, and what they say of what they do instead."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import tinier
from tinier.cli import app
from tinier.edits.quantize import QuantizeWeight
from tinier.errors import InputError, OutputError, ParityError
from tinier.network import Network
from tinier.targets.base import Artifact, known_targets
from tinier.targets.onnxruntime import OnnxRuntime
from tinier.targets.precision import ONNX, Precision
from tinier.verbs.smaller import Smaller


class Trap:
    """Data that nothing may look at."""

    def __len__(self) -> int:
        raise AssertionError("the data was looked at")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the data was asked for {name}")


class Small(nn.Module):
    """A convolution with a norm behind it, an activation function and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.act = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.head = nn.Linear(8, 32)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.head(self.act(self.bn(self.conv(x))).mean((2, 3))))
        return found


IMAGES = torch.randn(24, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def integers(found: Smaller) -> dict[str, int]:
    edits = [edit for edit in found.plan.edits if isinstance(edit, QuantizeWeight)]
    return {edit.tensor: (edit.high - edit.low).bit_length() for edit in edits}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": True}, "bits=True: 2 to 16"),
        ({"bits": 8.0}, "bits=8.0: 2 to 16"),
        ({"activations": 8.0}, "activations=8.0: 2 to 16 bits, a whole number"),
        ({"activations": True}, "activations=True"),
        ({"activations": None, "group": 8.0}, "group=8.0: a whole number"),
        ({"layers": {"head": 4.5}}, "layers: head=4.5: 2 to 16"),
        ({"layers": {"head": True}}, "layers: head=True"),
        ({"layers": ["head"]}, "a dict is needed"),
        ({"exclude": [3]}, r"exclude=\[3\]: names or patterns"),
        ({"restore": 1.5}, r"restore=1.5: a share of the loss in \(0, 1\)"),
        ({"threads": 0, "target": "onnxruntime"}, "threads=0: a whole number"),
        ({"bits": 4, "max_size": "1MB"}, "bits=4 and max_size: the size chooses"),
        ({"sensitivity": "fisher"}, "sensitivity='fisher': it is what max_size"),
        ({"target": "abacus"}, "no target 'abacus'; the targets are cpu, "),
        ({"target": "torch"}, "torch cannot take quantized networks"),
        ({"bits": 12, "target": "openvino"}, "openvino cannot take weights of 12 bits; it takes 2 to 8"),
        ({"activations": 16, "target": "onnxruntime"}, "activations of 16 bits; it takes 2 to 8"),
        ({"layers": {"head": 9}, "target": "onnxruntime"}, "weights of 9 bits"),
    ],
)  # fmt: skip
def test_arguments_are_refused_before_model_and_data(arguments: dict[str, Any], message: str) -> None:  # fmt: skip
    class Untouched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the model was run")

    with pytest.raises(InputError, match=message):
        tinier.quantize(Untouched(), IMAGES[:2], Trap(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exclude": ["haed"]}, "exclude: nothing is called haed; did you mean head"),
        ({"layers": {"body": 4}}, "layers: nothing is called body"),
        ({"exclude": ["act"]}, "exclude: act has no weights that become integers; leave it out"),
        ({"layers": {"norm": 4}}, "layers: norm has no weights that become integers"),
        ({"activations": None, "group": 3}, "head.weight: group size 3 does not divide 8 inputs; use"),
        ({"activations": None, "group": 2, "exclude": ["head"]}, "group=2: inputs of linear layers"),
    ],
)  # fmt: skip
def test_what_fits_no_layer_is_refused_before_data(arguments: dict[str, Any], message: str) -> None:
    network = Network(Small().eval(), {"x": IMAGES[:2]})
    with pytest.raises(InputError, match=message):
        tinier.quantize(network, data=Trap(), **arguments)


def test_a_layer_that_is_folded_means_the_one_it_is_folded_into() -> None:
    model = Small().eval()
    found = tinier.quantize(model, IMAGES[:2], activations=None, exclude=["bn"])
    assert integers(found) == {"head.weight": 8}
    assert any("bn is folded into conv.weight" in note for note in found.notes)
    mixed = tinier.quantize(model, IMAGES[:2], activations=None, layers={"bn": 4})
    assert integers(mixed) == {"conv.weight": 4, "head.weight": 8}
    plain = tinier.quantize(model, IMAGES[:2], activations=None, exclude=["conv", "norm"])
    assert integers(plain) == {"head.weight": 8}


def test_the_table_of_bits() -> None:
    assert ONNX.refuses({2, 8}, {2, 8}, True) is None
    assert ONNX.refuses({4, 9, 12}) == "weights of 9 and 12 bits; it takes 2 to 8 bits"
    assert [ONNX.container(bits) for bits in range(2, 9)] == [4, 4, 4, 8, 8, 8, 8]
    assert Precision((8,), (), False, (8,)).refuses({8}, {8}) is not None
    assert Precision((8,), (), False, (8,)).refuses({8}, (), True) is not None
    assert known_targets()["torch"]().precision.refuses({8}) is not None


@pytest.mark.parametrize("arguments", [{"bits": 12}, {"activations": 16}])
def test_bits_that_a_runtime_lacks_are_refused_and_nothing_is_written(
    arguments: dict[str, int], tmp_path: Path
) -> None:
    found = tinier.quantize(Small().eval(), IMAGES[:2], IMAGES, **arguments)  # type: ignore[arg-type]
    for target in ("onnxruntime", "openvino", "cpu"):
        for write in (tinier.deliver, tinier.export):
            with pytest.raises(InputError, match=r"(1[26] bits; it takes 2 to 8|one runtime)"):
                write(found, tmp_path / "out", target=target)
    assert not list(tmp_path.iterdir())


def test_the_command_line_refuses_before_the_model_is_read(tmp_path: Path) -> None:
    run = CliRunner()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    out = str(tmp_path / "out")
    for arguments, message in (
        (["-o", str(mine)], "was not made by tinier"),
        (["-o", str(tmp_path / "no" / "out")], "does not exist"),
        (["-o", out, "--target", "abacus"], "no target 'abacus'"),
        (["-o", out, "--target", "torch"], "torch cannot take quantized networks"),
        (["-o", out, "--bits", "12"], "weights of 12 bits; it takes 2 to 8"),
        (["-o", out, "--layer", "head=9"], "weights of 9 bits"),
        (["-o", out, "--activations", "16"], "activations of 16 bits"),
        (["-o", out, "--fastest", "--max-size", "1MB"], "leave one out"),
    ):
        done = run.invoke(app, ["quantize", str(tmp_path / "none.onnx"), *arguments])
        assert done.exit_code == 2 and message in done.output, done.output
    assert not (tmp_path / "out").exists()


def test_export_passes_the_gate_or_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Small().eval()
    found = tinier.quantize(model, IMAGES[:2], IMAGES)
    first = tinier.export(found, tmp_path / "a" / "b")
    assert first.files == (tmp_path / "a" / "b" / "model.onnx",) and first.files[0].is_file()
    second = tinier.export(found, tmp_path / "a" / "b", target="openvino")
    assert all(file.is_file() for file in (*first.files, *second.files))
    before = first.files[0].read_bytes()
    other = tinier.quantize(model, IMAGES[:2], IMAGES, bits=2)
    honest = OnnxRuntime.lower

    def wrong(self: OnnxRuntime, network: Network, folder: Path) -> Artifact:
        return honest(self, other.network, folder)

    monkeypatch.setattr(OnnxRuntime, "lower", wrong)
    for folder in (tmp_path / "new", tmp_path / "a" / "b"):
        with pytest.raises(ParityError, match="artifact for onnxruntime computes something else"):
            tinier.export(found, folder)
    assert not (tmp_path / "new").exists() and first.files[0].read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    (tmp_path / "a" / "b" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not made by tinier"):
        tinier.export(found, tmp_path / "a" / "b")


def test_sizes_of_files_are_said_and_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    x = torch.randn(64, 64)
    three = tinier.quantize(model, x[:2], activations=None, bits=3)
    count = 2 * 64 * 256
    (said,) = [note for note in three.notes if "without gaps" in note]
    assert f"{3 * count // 8:,} bytes" in said and f"{4 * count // 8:,} in the file" in said
    eight = tinier.quantize(model, x[:2], activations=None)
    assert not any("without gaps" in note for note in eight.notes)
    limit = 24_000
    for activations in (None, 8):
        fits = tinier.quantize(
            model, x[:2], x, activations=activations, max_size=limit, target="onnxruntime",
            choices=(3, 4, 6, 8),
        )  # fmt: skip
        assert set(integers(fits).values()) != {8}
        done = tinier.deliver(fits, tmp_path / str(activations), data=x)
        size = done.artifacts["onnxruntime"].size
        assert size <= limit and f"weights in {size:,} bytes" in " ".join(fits.notes)
        packed = done.packed["onnxruntime"]
        whole = tinier.pack(done.artifacts["onnxruntime"].files[0], tmp_path / "packed")
        assert packed == (tmp_path / "packed").stat().st_size and whole.ratio > 1
        assert packed < size


class Places(nn.Module):
    """Layers without a Gram matrix: an embedding, a recurrent layer, a grouped transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.rnn = nn.Embedding(20, 8), nn.LSTM(8, 6, batch_first=True)
        self.up, self.head = nn.ConvTranspose1d(6, 6, 2, groups=2), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        wide = self.up(self.rnn(self.table(ids))[0].transpose(1, 2))
        found: Tensor = self.head(wide.transpose(1, 2))
        return found


def test_what_is_done_instead_is_said(tmp_path: Path) -> None:
    ids = torch.randint(0, 20, (32, 7), generator=torch.Generator().manual_seed(0))
    model = Places().eval()
    fed = tinier.quantize(model, ids[:2], ids, activations=None, rounding="error_feedback")
    said = " ".join(fed.notes)
    assert "table.weight: an embedding is looked up" in said
    assert "without error feedback" in said and "rnn.weight_hh_l0" in said
    weighed = tinier.quantize(model, ids[:2], ids, activations=None, weight_ranges="importance")
    notes = [note for note in weighed.notes if "counts the same" in note]
    assert notes and not any("rnn.weight_ih_l0" in note for note in notes)
    done = tinier.deliver(fed, tmp_path / "out", data=ids)
    rows = done.as_dict(fed)["float"]
    assert [row[0].startswith("conv_transpose") for row in rows] == [True]
    assert "up.weight cannot be stored" in rows[0][2]
