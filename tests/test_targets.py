"""Every target writes what its runtime runs: the same function, readable by the runtime's own users, safe to open."""

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn

from tinier.errors import InputError, MissingError, RefusedError
from tinier.network import Network
from tinier.targets.base import Artifact, Target, is_quantized, known_targets, targets_for

RUNTIMES = ["onnxruntime", "openvino", "torch"]
pairs = torch.ops.quantized_decomposed


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class TwoInputs(nn.Module):
    """Token ids and a mask in, a dict of two outputs out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
        pooled = (self.embed(ids) * mask.unsqueeze(-1)).sum(1)
        return {"scores": self.head(pooled), "pooled": pooled}


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = pairs.quantize_per_tensor(x, 0.1, 0, -128, 127, torch.int8)
        return pairs.dequantize_per_tensor(q, 0.1, 0, -128, 127, torch.int8)


def example(name: str, batch: int) -> dict[str, Tensor]:
    seeded = torch.Generator().manual_seed(batch)
    if name == "two_inputs":
        ids = torch.randint(0, 7, (batch, 4), generator=seeded)
        return {"ids": ids, "mask": torch.ones(batch, 4)}
    shape = (3, 8, 8) if name == "cnn" else (6,)
    return {"x": torch.randn(batch, *shape, generator=seeded)}


MODULES: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
    "cnn": CNN,
    "two_inputs": TwoInputs,
}


def build(name: str) -> Network:
    torch.manual_seed(0)
    named = example(name, 2)
    if name == "mlp":
        named = {"input": named["x"]}  # as nn.Sequential calls it
    return Network(MODULES[name](), named, name)


@pytest.fixture(scope="module")
def lowered(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], tuple[Network, Artifact]]:
    """Each network on each target; the ONNX file is written once."""
    made = {}
    for name in MODULES:
        network, onnx_file = build(name), None
        for target in targets_for([*RUNTIMES, "null"]):
            folder = tmp_path_factory.mktemp(f"{name}-{target.name}")
            artifact = target.lower(network, folder, onnx_file)
            onnx_file = onnx_file or artifact.files[0]
            made[name, target.name] = network, artifact
    return made


Lowered = dict[tuple[str, str], tuple[Network, Artifact]]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_target_computes_the_network_at_any_batch(
    runtime: str, name: str, lowered: Lowered
) -> None:
    network, artifact = lowered[name, runtime]
    session = targets_for(runtime)[0].open(artifact.files[0], 1)
    assert session.threads == 1
    assert [port.name for port in session.inputs] == list(network.example)
    assert all(port.shape[0] is None for port in session.inputs)
    for batch in (1, 5):
        inputs = network.batch(batch)
        expected = network(inputs)
        outputs = session.run({key: value.numpy() for key, value in inputs.items()})
        assert len(outputs) == len(expected)
        for got, wanted in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize("runtime", [*RUNTIMES, "null"])
def test_artifacts_have_known_names_sizes_and_no_private_facts(
    runtime: str, lowered: Lowered
) -> None:
    _, artifact = lowered["cnn", runtime]
    names = {
        "onnxruntime": ["model.onnx"],
        "openvino": ["openvino_model.xml", "openvino_model.bin"],
        "torch": ["model.pt2"],
        "null": ["model.null.json", "model.null.bin"],
    }
    assert [file.name for file in artifact.files] == names[runtime]
    assert artifact.size == sum(len(file.read_bytes()) for file in artifact.files) > 0
    assert targets_for(runtime)[0].files(artifact.files[0]) == artifact.files
    for file in artifact.files:
        content = file.read_bytes()
        if runtime == "torch":
            with zipfile.ZipFile(file) as archive:
                content = b"".join(archive.read(name) for name in archive.namelist())
        assert b"test_targets" not in content and os.fsencode(Path.home()) not in content
    assert len(list(artifact.files[0].parent.iterdir())) == len(artifact.files)


@pytest.mark.parametrize(
    ("runtime", "name"), [*((runtime, "two_inputs") for runtime in RUNTIMES), ("null", "mlp")]
)
def test_three_lines_run_the_artifact_without_tinier(
    runtime: str, name: str, lowered: Lowered
) -> None:
    network, artifact = lowered[name, runtime]
    lines = targets_for(runtime)[0].usage(artifact, network)
    assert len(lines.splitlines()) == 3
    blocked = f"import sys; sys.modules['tinier'] = None\n{lines}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", blocked],
        cwd=artifact.files[0].parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ones = {key: torch.ones_like(value) for key, value in network.batch(1).items()}
    if runtime != "null":
        assert f"{network(ones)[0].ravel()[0].item():.3f}"[:-1] in done.stdout


def test_openvino_keeps_float_weights(lowered: Lowered) -> None:
    network, artifact = lowered["mlp", "openvino"]
    values = sum(tensor.numel() for tensor in network.module.state_dict().values())
    assert artifact.files[1].stat().st_size >= 4 * values


def test_the_null_target_returns_zeros_and_its_declared_size(lowered: Lowered) -> None:
    network, artifact = lowered["two_inputs", "null"]
    session = targets_for("null")[0].open(artifact.files[0], 1)
    inputs = {key: value.numpy() for key, value in network.batch(4).items()}
    scores, pooled = session.run(inputs)
    assert scores.shape == (4, 3) and pooled.shape == (4, 6)
    assert not scores.any() and not pooled.any()
    values = sum(tensor.numel() for tensor in network.module.state_dict().values())
    assert artifact.files[1].stat().st_size == 4 * values


def test_names_of_targets() -> None:
    assert list(known_targets()) == ["null", "onnxruntime", "openvino", "torch"]
    assert [target.name for target in targets_for("cpu")] == RUNTIMES
    assert [target.name for target in targets_for(["torch", "cpu"])] == [
        "torch",
        "onnxruntime",
        "openvino",
    ]
    with pytest.raises(InputError, match=r"no target 'gpu'.*cpu, null, onnxruntime"):
        targets_for("gpu")


def test_a_missing_runtime_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_targets()["openvino"], "package", "not-a-package")
    status = known_targets()["openvino"].status()
    assert not status.installed and "not-a-package" in status.reason
    assert "pip install 'tinier[openvino]'" in status.install
    with pytest.raises(MissingError, match=r"pip install 'tinier\[openvino\]'"):
        targets_for("openvino")
    assert [target.name for target in targets_for("cpu")] == ["onnxruntime", "torch"]


def test_torch_refuses_quantized_networks(tmp_path: Path) -> None:
    quantized = Network(Rounded(), {"x": torch.randn(2, 3)})
    assert is_quantized(quantized) and not is_quantized(build("mlp"))
    target = targets_for("torch")[0]
    assert "float arithmetic" in str(target.refuses(quantized))
    with pytest.raises(RefusedError, match="float arithmetic"):
        target.lower(quantized, tmp_path)
    assert targets_for("onnxruntime")[0].refuses(quantized) is None


@pytest.mark.parametrize("runtime", [*RUNTIMES, "null"])
@pytest.mark.parametrize("content", [None, b"", b"garbage\x00\xff" * 50])
def test_bad_files_are_named(runtime: str, content: bytes | None, tmp_path: Path) -> None:
    target = targets_for(runtime)[0]
    file = tmp_path / f"bad{target.suffix}"
    if content is not None:
        file.write_bytes(content)
        file.with_suffix(".bin").write_bytes(content)
    with pytest.raises(InputError, match=f"bad{target.suffix}"):
        target.open(file, 1)


def test_openvino_without_its_weights(lowered: Lowered, tmp_path: Path) -> None:
    _, artifact = lowered["mlp", "openvino"]
    alone = tmp_path / "openvino_model.xml"
    alone.write_bytes(artifact.files[0].read_bytes())
    with pytest.raises(InputError, match=r"openvino_model\.bin.*no such file"):
        targets_for("openvino")[0].open(alone, 1)


def test_tensors_outside_the_folder_are_refused(lowered: Lowered, tmp_path: Path) -> None:
    model = onnx.load(lowered["mlp", "onnxruntime"][1].files[0])
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../outside.bin")
    tensor.ClearField("raw_data")
    file = tmp_path / "model.onnx"
    file.write_bytes(model.SerializeToString())
    for runtime in ("onnxruntime", "openvino"):
        with pytest.raises(InputError, match=r"\.\./outside\.bin, outside its folder"):
            targets_for(runtime)[0].open(file, 1)


def _rewritten(source: Path, file: Path, change: Callable[[str, bytes], bytes]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return file


def _pickled(name: str, data: bytes) -> bytes:
    if not name.endswith("weights_config.json"):
        return data
    config = json.loads(data)
    next(iter(config["config"].values()))["use_pickle"] = True
    return json.dumps(config).encode()


def _foreign(name: str, data: bytes) -> bytes:
    if not name.endswith("models/model.json"):
        return data
    return data.replace(b"torch.ops.aten.relu.default", b"torch.os.system")


def _evaluated(name: str, data: bytes) -> bytes:
    if not name.endswith("models/model.json"):
        return data
    return data.replace(b"Symbol('", b"__import__('os').abort() or Symbol('")


class Payload:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.abort, ()


def _sampled(name: str, data: bytes) -> bytes:
    if not name.endswith("sample_inputs/model.pt"):
        return data
    buffer = io.BytesIO()
    torch.save((Payload(),), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_pickled, "pickled tensors"),
        (_foreign, r"operator torch\.os\.system"),
        (_evaluated, "the size __import__"),
        (_sampled, "pickled objects"),
    ],
)
def test_archives_that_could_run_code_are_refused(
    change: Callable[[str, bytes], bytes], message: str, lowered: Lowered, tmp_path: Path
) -> None:
    _, artifact = lowered["mlp", "torch"]
    file = _rewritten(artifact.files[0], tmp_path / "model.pt2", change)
    with pytest.raises(InputError, match=message):
        targets_for("torch")[0].open(file, 1)


def test_an_untouched_archive_opens_again(lowered: Lowered, tmp_path: Path) -> None:
    file = _rewritten(
        lowered["mlp", "torch"][1].files[0], tmp_path / "model.pt2", lambda name, data: data
    )
    assert targets_for("torch")[0].open(file, 1).inputs[0].name == "input"


def test_torch_checkpoints_are_not_archives(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt2"
    torch.save({"weight": torch.zeros(2)}, file)
    with pytest.raises(InputError, match=r"checkpoint\.pt2"):
        targets_for("torch")[0].open(file, 1)


def test_torch_takes_read_only_inputs_and_keeps_the_process_threads(lowered: Lowered) -> None:
    network, artifact = lowered["mlp", "torch"]
    before = torch.get_num_threads()
    session = targets_for("torch")[0].open(artifact.files[0], before + 1)
    inputs = {key: value.numpy().copy() for key, value in network.example.items()}
    for array in inputs.values():
        array.setflags(write=False)
    np.testing.assert_allclose(
        session.run(inputs)[0], network(network.example)[0].numpy(), atol=1e-6
    )
    assert torch.get_num_threads() == before


def test_targets_have_no_state() -> None:
    assert all(issubclass(cls, Target) and not vars(cls()) for cls in known_targets().values())
