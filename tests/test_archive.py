"""Archives (.pt2): a pruned network without its class, written and read back without pickle."""

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from networks import build
from tinier.errors import InputError, ModelError
from tinier.graph.archive import read, write
from tinier.methods.channel_pruning import ChannelPruning
from tinier.network import Network
from tinier.sources.load import load


def halved(name: str) -> Network:
    original = build(name)
    return ChannelPruning(keep=0.6, round_to=1).plan(original).apply(original)


@pytest.mark.parametrize("name", ["residual_cnn", "vit", "causal_lm", "vae"])
def test_a_pruned_network_comes_back_without_its_class(name: str, tmp_path: Path) -> None:
    smaller = halved(name)
    file = tmp_path / "model.pt2"
    write(smaller.traced, smaller.example, file)
    again = load(file, dict(smaller.example))
    assert again.traced.batched
    assert set(again.traced.outputs) == set(smaller.traced.outputs)
    for size in (1, 2, 5):  # the batch size is free
        if size == 1 and name == "causal_lm":
            continue
        inputs = smaller.batch(size)
        for found, wanted in zip(again(inputs), smaller(inputs), strict=True):
            torch.testing.assert_close(found, wanted)
    parameters = dict(smaller.module.named_parameters())
    assert {n: p.shape for n, p in again.module.named_parameters()} == {
        n: p.shape for n, p in parameters.items()
    }
    sum(output.float().square().mean() for output in _outputs(again)).backward()  # type: ignore[union-attr]
    assert sum(p.grad is not None and bool(p.grad.any()) for p in again.module.parameters()) > 2


def _outputs(network: Network) -> list[torch.Tensor]:
    return [
        leaf
        for leaf in torch.utils._pytree.tree_leaves(network.module(**network.example))
        if isinstance(leaf, torch.Tensor)
    ]


def test_a_network_from_an_archive_is_pruned_like_any_other(tmp_path: Path) -> None:
    smaller = halved("residual_cnn")
    file = tmp_path / "model.pt2"
    write(smaller.traced, smaller.example, file)
    again = load(file)
    assert not any(tensor.any() for tensor in again.example.values())  # no example goes into a file
    twice = ChannelPruning(keep=0.7, round_to=1).plan(again).apply(again)
    count = [sum(p.numel() for p in n.module.parameters()) for n in (twice, again)]
    assert count[0] < count[1]


def test_frozen_parameters_come_back_frozen(tmp_path: Path) -> None:
    network = build("mlp")
    first = next(iter(network.module.parameters())).requires_grad_(False)
    file = tmp_path / "model.pt2"
    write(network.traced, network.example, file)
    frozen = [p for p in load(file).module.parameters() if not p.requires_grad]
    assert [p.shape for p in frozen] == [first.shape]


def test_nothing_in_an_archive_is_a_pickle_but_its_empty_example(tmp_path: Path) -> None:
    network = build("mlp")
    file = tmp_path / "model.pt2"
    write(network.traced, network.example, file)
    with zipfile.ZipFile(file) as archive:
        names = [name.split("/", 1)[1] for name in archive.namelist()]
        text = archive.read(
            next(n for n in archive.namelist() if n.endswith("model.json"))
        ).decode()
    assert [name for name in names if name.endswith((".pt", ".pkl"))] == [
        "data/sample_inputs/model.pt"
    ]
    assert "networks.py" not in text and str(Path.cwd()) not in text
    assert read(file).example_inputs is not None


def test_wrong_archives_and_examples_are_refused(tmp_path: Path) -> None:
    network = build("mlp")
    file = tmp_path / "model.pt2"
    write(network.traced, network.example, file)
    with pytest.raises(ModelError, match="takes x"):
        load(file, {"y": torch.zeros(2, 12)})
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=r"model\.pt2"):
        load(file)
    with pytest.raises(ModelError, match="no such file"):
        load(tmp_path / "absent.pt2")


def test_writes_in_place_are_written(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 2)).eval()
    network, file = load(module, torch.randn(4, 8)), tmp_path / "model.pt2"
    write(network.traced, network.example, file)
    again = load(file, network.example)
    torch.testing.assert_close(again(network.example), network(network.example))
    assert ChannelPruning(keep=0.5).plan(again).edits
