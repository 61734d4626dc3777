"""tinier.share and tinier share: few values a tensor, in the user's class, in few bytes, and back."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import tinier
from tinier.cli import app
from tinier.edits.share import Share
from tinier.errors import InputError, RefusedError
from tinier.network import Network
from tinier.statistics import observe
from tinier.tensors.clustering import codebook
from toy import TinyCNN, images, trained


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.ndim > 1}


def test_every_tensor_takes_the_values_of_its_codebook() -> None:
    model, (x, _) = trained(TinyCNN), images(8, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = tinier.share(model, (x[:2],), bits=3)
    assert type(found.model) is TinyCNN and found.trainable is None
    for name, value in weights(found.model).items():
        old = weights(model)[name]
        centres, _ = codebook(old, 8)
        nearest = centres[(old[..., None] - centres).abs().argmin(-1)]
        assert torch.equal(value, nearest) and len(value.unique()) <= 8
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert any("8 values" in note for note in found.notes)
    assert torch.equal(found.plan.apply(found.original).module(x), found.model(x))


def test_more_bits_lose_less_and_take_more_bytes(tmp_path: Path) -> None:
    model, (x, _) = trained(TinyCNN), images(64, 3)
    losses, sizes = [], []
    with torch.no_grad():
        for bits in (1, 2, 4, 8):
            found = tinier.share(model, (x[:2],), bits=bits)
            losses.append(float((found.model(x) - model(x)).norm()))
            sizes.append(tinier.pack(found, tmp_path / f"{bits}.tinier").total.packed)
            again = tinier.unpack(tmp_path / f"{bits}.tinier", into=model)
            assert torch.equal(again(x), found.model(x))  # type: ignore[operator]
    assert losses == sorted(losses, reverse=True) and losses[0] > 5 * losses[2]
    assert sizes == sorted(sizes)
    # Labels of two bits for the convolutions' and the last layer's weights, by what more the eight-bit ones take.
    assert math.isclose(sizes[2] - sizes[1], 2 * (72 + 1152 + 48) / 8, rel_tol=0.5)


def test_with_data_errors_count_as_the_loss_feels_them() -> None:
    model, (x, y) = trained(TinyCNN), images(64, 3)
    network = Network(model, {"x": x[:2]})
    found = tinier.share(network, data=(x, y), bits=2)
    squares = observe(network, [({"x": x}, y)], {"squares"}).squares
    plain = tinier.share(network, bits=2)

    def felt(smaller: tinier.Smaller) -> float:
        other = weights(smaller.model)
        return sum(
            float((squares[name] * (other[name] - value).double().square()).sum())
            for name, value in weights(model).items()
        )

    assert felt(found) < 0.8 * felt(plain)


def test_after_pruning_zeros_stay_and_it_loads_again(tmp_path: Path) -> None:
    model, (x, _) = trained(TinyCNN), images(8, 3)
    pruned = tinier.prune(model, (x[:2],), pattern="unstructured", keep=0.5)
    found = tinier.share(pruned, bits=4)
    assert found.original is pruned.original
    with torch.no_grad():
        zeros, after = (
            torch.cat([v.flatten() for v in weights(n.network._plain()).values()]) == 0
            for n in (pruned, found)
        )
        assert bool(after[zeros].all())
        tinier.save(found, tmp_path / "out")
        again = tinier.load(tmp_path / "out", into=model, example=(x[:2],))
        assert torch.equal(again.model(x), found.model(x))
        assert again.plan == found.plan


def test_what_cannot_be() -> None:
    model, (x, _) = trained(TinyCNN), images(8, 3)
    with pytest.raises(InputError, match="bits=0: 1 to 8"):
        tinier.share(model, (x[:2],), bits=0)
    with pytest.raises(InputError, match="rule='mean'"):
        tinier.share(model, (x[:2],), rule="mean")
    with pytest.raises(InputError, match="takes all errors alike"):
        tinier.share(model, (x[:2],), x, rule="median")
    quantized = tinier.quantize(model, (x[:2],), activations=None)
    with pytest.raises(RefusedError, match="quantized already"):
        tinier.share(quantized)
    some = tinier.share(model, (x[:2],), bits=1, exclude="conv1")
    shared = {edit.tensor for edit in some.plan.edits if isinstance(edit, Share)}
    assert shared == {"conv2.weight", "fc.weight"}


def test_the_command_line_says_how_many_bytes(tmp_path: Path) -> None:
    model, (x, y) = trained(TinyCNN), images(16, 3)
    tinier.save(tinier.prune(model, (x[:2],), keep=0.999), tmp_path / "model.pt2")
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    arguments = ["share", str(tmp_path / "model.pt2"), "-o", str(tmp_path / "out"), "--bits", "2"]
    done = CliRunner().invoke(app, [*arguments, "--data", str(tmp_path / "data.npz"), "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    file = tmp_path / "out" / "model.tinier"
    total = facts["packed"]["rows"][-1]
    assert total["kind"] == "all" and total["packed"] == file.stat().st_size
    again = tinier.unpack(file)
    assert isinstance(again, dict) and len(again["conv2.weight"].unique()) <= 4
    shown = CliRunner().invoke(app, [*arguments, "--rule", "median"])
    assert shown.exit_code == 0 and "× smaller" in shown.stdout
    wrong = CliRunner().invoke(app, [*arguments, "--rule", "mean"])
    assert wrong.exit_code == 2 and "kmeans" in wrong.output
