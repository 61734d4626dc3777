"""The single steps: prune, quantize, recover, export, save, load."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tinier
from tinier.errors import InputError, OutputError, RefusedError
from tinier.graph.macs import macs
from tinier.targets.onnxruntime import OnnxRuntime
from tinier.verbs import Smaller, export, load, prune, quantize, recover, save
from toy import images

EXAMPLE = images(2, 0)[0]


@pytest.fixture(scope="module")
def pruned(cnn: nn.Module) -> Smaller:
    return prune(cnn, EXAMPLE, keep=0.5)


@pytest.fixture(scope="module")
def quantized(pruned: Smaller) -> Smaller:
    return quantize(pruned, None, images(100, 3)[0])


def accuracy(smaller: Smaller, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((smaller.network({"x": x})[0].argmax(1) == y).float().mean())


def test_prune_keeps_the_share_and_the_class(cnn: nn.Module, pruned: Smaller) -> None:
    before = {name: tensor.clone() for name, tensor in cnn.state_dict().items()}
    whole = sum(macs(pruned.original.traced).values())
    assert sum(macs(pruned.network.traced).values()) <= 0.5 * whole
    assert type(pruned.model) is type(cnn)
    assert all(torch.equal(before[name], tensor) for name, tensor in cnn.state_dict().items())
    # What was kept is what the original had there.
    smaller, original = pruned.model.state_dict(), cnn.state_dict()
    assert pruned.kept
    for name, dims in pruned.kept.items():
        expected = original[name]
        for dim, indices in dims.items():
            expected = expected.index_select(dim, torch.tensor(indices))
        assert torch.equal(smaller[name], expected)
    assert "slice" in str(pruned)


def test_keeping_everything_changes_nothing(cnn: nn.Module) -> None:
    same = prune(cnn, EXAMPLE, keep=1.0)
    x = images(20, 4)[0]
    assert torch.equal(same.network({"x": x})[0], same.original({"x": x})[0])


def test_recover_gives_quality_back(pruned: Smaller) -> None:
    x, y = images(300, 8)
    before = accuracy(pruned, x, y)
    recovered = recover(pruned, images(256, 3)[0], epochs=6)
    again = recover(pruned, images(256, 3)[0], epochs=6)
    assert accuracy(recovered, x, y) >= max(before, 0.95)
    assert accuracy(pruned, x, y) == before and recovered.plan == pruned.plan
    for a, b in zip(recovered.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_quantize_keeps_the_history(pruned: Smaller, quantized: Smaller) -> None:
    assert quantized.original is pruned.original
    assert quantized.plan.edits[: len(pruned.plan.edits)] == pruned.plan.edits
    again = quantize(pruned, None, images(100, 3)[0])
    assert again.plan == quantized.plan
    x = images(50, 6)[0]
    exact, close = (one.network({"x": x})[0] for one in (pruned, quantized))
    assert 0 < (exact - close).abs().max() < 0.1 * exact.abs().max()


def test_export_runs_as_the_simulation(quantized: Smaller, tmp_path: Path) -> None:
    artifact = export(quantized, tmp_path / "new")
    assert artifact.files == (tmp_path / "new" / "model.onnx",)
    x = images(32, 6)[0]
    outputs = OnnxRuntime().open(artifact.files[0], 1).run({"x": x.numpy()})[0]
    np.testing.assert_allclose(outputs, quantized.network({"x": x})[0].numpy(), atol=1e-5)


def test_export_says_what_a_runtime_cannot_take(quantized: Smaller, tmp_path: Path) -> None:
    with pytest.raises((InputError, RefusedError), match="torch cannot take the network"):
        export(quantized, tmp_path / "new", target="torch")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="no target 'abacus'"):
        export(quantized, tmp_path / "new", target="abacus")


def test_save_and_load(cnn: nn.Module, pruned: Smaller, quantized: Smaller, tmp_path: Path) -> None:
    x = images(20, 4)[0]
    save(pruned, tmp_path / "pruned")
    save(quantized, tmp_path / "quantized")
    assert sorted(f.name for f in (tmp_path / "pruned").iterdir()) == [
        "model.safetensors", "plan.json",
    ]  # fmt: skip
    for name in ("pruned", "quantized"):
        back = load(tmp_path / name, into=cnn, example=EXAMPLE)
        assert type(back.model) is type(cnn)
        assert torch.equal(back.network({"x": x})[0], pruned.network({"x": x})[0])
        assert back.kept == pruned.kept
    # Saving over what save wrote is fine, over anything else it is not.
    save(quantized, tmp_path / "pruned")
    (tmp_path / "pruned" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not made by tinier"):
        save(pruned, tmp_path / "pruned")
    assert (tmp_path / "pruned" / "notes.txt").read_text() == "mine"


def test_load_refuses_what_does_not_fit(
    cnn: nn.Module, mlp: nn.Module, pruned: Smaller, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"has no plan\.json"):
        load(tmp_path, into=cnn, example=EXAMPLE)
    folder = tmp_path / "out"
    save(pruned, folder)
    with pytest.raises((InputError, RefusedError)):
        load(folder, into=mlp, example=EXAMPLE)
    plan = (folder / "plan.json").read_text()
    rows = json.loads(plan)
    rows["edits"][0]["kind"] = "explode"
    for text in ("", "[]", "{}", '{"edits": 3}', json.dumps(rows)):
        (folder / "plan.json").write_text(text)
        with pytest.raises(InputError, match=r"plan\.json cannot be read"):
            load(folder, into=cnn, example=EXAMPLE)
    (folder / "plan.json").write_text(plan)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load(folder, into=cnn, example=EXAMPLE)


def test_the_public_names_are_there() -> None:
    for name in tinier.__all__:
        found: Any = getattr(tinier, name)
        assert found is not None and (found.__doc__ or name == "__version__")
