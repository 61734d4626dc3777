"""Low rank: matrices and kernels as products, ranks, and networks of smaller layers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tinier
from networks import NETWORKS, build, inputs
from test_cli import refused
from test_cli import tinier as command
from tinier.edits.base import Plan, Values
from tinier.edits.factorize import Factorize
from tinier.errors import InputError, RefusedError
from tinier.methods.factorization import Factorization
from tinier.network import Network
from tinier.statistics import observe
from tinier.tensors.low_rank import decomposed, factors, rank_of_energy, tucker2, whitener
from tinier.verbs.smaller import costs
from toy import TinyCNN, images, trained


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_error_where_inputs_lie_is_the_least() -> None:
    """Against a whitening written in numpy, and random factors near the optimum."""
    weight, x = draw(9, 12), draw(40, 12, seed=1) * torch.linspace(0.1, 3, 12)
    moments = (x.T @ x).double()
    root = whitener(moments, 12)
    for rank in (1, 4, 8):
        a, b = factors(decomposed(weight, root), root, rank)
        error = float(((weight.double() - a @ b) @ x.double().T).norm() ** 2)
        values, vectors = np.linalg.eigh(moments.numpy())
        singular = np.linalg.svd(weight.double().numpy() @ (vectors * np.sqrt(values)))[1]
        assert error == pytest.approx((singular[rank:] ** 2).sum(), rel=1e-4)
        plain = factors(decomposed(weight, whitener(None, 12)), whitener(None, 12), rank)
        assert error <= float(((weight.double() - plain[0] @ plain[1]) @ x.double().T).norm() ** 2)
        for seed in range(5):
            near = a + 1e-3 * draw(*a.shape, seed=seed).double()
            assert error <= float(((weight.double() - near @ b) @ x.double().T).norm() ** 2)


def test_full_rank_is_the_matrix_itself() -> None:
    weight = draw(6, 10)
    root = whitener(draw(10, 10, seed=1).double() @ draw(10, 10, seed=1).double().T, 10)
    a, b = factors(decomposed(weight, root), root, 6)
    torch.testing.assert_close(a @ b, weight.double(), rtol=1e-8, atol=1e-8)


def test_moments_without_inputs_in_a_direction() -> None:
    x = draw(3, 8)
    root = whitener((x.T @ x).double(), 8)
    a, b = factors(decomposed(draw(5, 8, seed=1), root), root, 3)
    assert a.isfinite().all() and b.isfinite().all()
    torch.testing.assert_close(
        a @ b @ x.double().T, draw(5, 8, seed=1).double() @ x.double().T, rtol=1e-4, atol=1e-4
    )


def test_ranks_by_energy() -> None:
    singular = torch.tensor([2.0, 1.0, 1.0, 0.0])  # squares 4, 1, 1, 0
    for energy, rank in ((0.5, 1), (4 / 6, 1), (0.7, 2), (5 / 6, 2), (0.9, 3), (1.0, 3)):
        assert rank_of_energy(singular, energy) == rank
    assert rank_of_energy(torch.zeros(4), 0.9) == 1


def test_a_kernel_of_low_multilinear_rank_is_found() -> None:
    core, left, right = draw(3, 2, 3, 3), draw(8, 3, seed=1), draw(6, 2, seed=2)
    kernel = torch.einsum("srhw,ms,nr->mnhw", core, left, right)
    u, found, v = tucker2(kernel, 3, 2)
    again = torch.einsum("srhw,ms,nr->mnhw", found, u, v)
    torch.testing.assert_close(again, kernel.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(u.T @ u, torch.eye(3, dtype=u.dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", ["svd", "tucker"])
def test_products_of_convolutions(form: str, stride: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 24, 3, stride=stride, padding=2, dilation=2)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), layer).eval()
    x = torch.randn(2, 3, 9, 9)
    found = tinier.factorize(model, x, keep=0.5, form=form, exclude="0")
    (edit,) = [e for e in found.plan.edits if isinstance(e, Factorize) and e.tensor == "2.weight"]
    assert len(edit.factors) == (2 if form == "svd" else 3)
    wanted = nn.functional.conv2d(model[1](model[0](x)), edit.product, layer.bias, stride, 2, 2)
    torch.testing.assert_close(found.model(x), wanted, rtol=1e-4, atol=1e-5)
    assert isinstance(found.model.get_submodule("2"), nn.Sequential)


def test_the_cost_is_what_was_asked_for() -> None:
    model = trained(TinyCNN)
    x, _ = images(64, 0)
    for of, index in (("macs", 0), ("parameters", 1)):
        for keep in (0.8, 0.5):
            found = tinier.factorize(model, x[:2], x, keep=keep, of=of)
            before, after = costs(found.original)[index], costs(found.network)[index]
            assert 0.6 * keep < after / before <= keep + 1e-9


def test_where_inputs_lie_less_is_lost() -> None:
    model = trained(TinyCNN)
    (x, _), (more, labels) = images(256, 0), images(700, 2)

    def loss(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network(more) - model(more)).square().mean())

    with_data = tinier.factorize(model, x[:2], x, keep=0.5).model
    without = tinier.factorize(model, x[:2], keep=0.5).model
    assert loss(with_data) < loss(without)
    assert float((with_data(more).argmax(1) == labels).float().mean()) > 0.8


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_is_factorized_or_refused(name: str) -> None:
    network = build(name)
    method = Factorization(keep=0.8)
    try:
        plan = method.plan(network)
    except RefusedError as error:
        assert "left" in str(error) or "could be factorized" in str(error)
        return
    made = plan.apply(network)
    assert Plan.from_json(plan.to_json()) == plan
    assert costs(made)[0] <= 0.8 * costs(network)[0] + 1
    graph = plan.apply(Network(network.traced.module, dict(network.example)))
    values = inputs(name, 3)
    for one, two in zip(made(values), graph(values), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "residual_cnn", "encoder"])
def test_all_of_the_energy_changes_nothing(name: str) -> None:
    network = build(name)
    method = Factorization(energy=1.0)
    found, _ = method._layers(network, None)
    edits = []
    for layer in found:
        made = layer.factors(min(layer.parts[1].shape[0], len(layer.weight)), "svd")
        edits.append(Factorize(layer.name, tuple(Values(f) for f in made)))
    made_ = Plan(tuple(edits)).apply(network)
    values = inputs(name, 3)
    for one, two in zip(made_(values), network(values), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_tied_and_grouped_weights_stay() -> None:
    network = build("grouped_cnn")
    names = {layer.name for layer in Factorization(keep=0.9)._layers(network, None)[0]}
    grouped = {
        f"{name}.weight"
        for name, part in network.module.named_modules()
        if isinstance(part, nn.Conv2d) and part.groups > 1
    }
    assert grouped and not grouped & names
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    model[2].weight = model[0].weight
    with pytest.raises(RefusedError, match="could be factorized"):
        tinier.factorize(model, torch.randn(2, 32))


def test_what_follows_and_what_is_kept(tmp_path: Path) -> None:
    model = trained(TinyCNN)
    x, _ = images(300, 3)
    found = tinier.factorize(model, x[:2], x, keep=0.4)
    better = tinier.recover(found, x, epochs=4, batch=32)
    assert better.plan == found.plan and any("recovered" in note for note in better.notes)
    tinier.save(better, tmp_path / "saved")
    assert (tmp_path / "saved" / "plan.json").exists()
    tinier.export(better, tmp_path / "onnx", target="onnxruntime")
    quantized = tinier.quantize(better, x[:2], x)
    assert (quantized.model(x).argmax(1) == better.model(x).argmax(1)).float().mean() > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0.5, "energy": 0.9}, "one of them"),
        ({"energy": 0.0}, r"\(0, 1\]"),
        ({"keep": 1.0}, "between 0 and 1"),
        ({"of": "bytes"}, "macs or parameters"),
        ({"form": "qr"}, "svd, tucker"),
        ({"exclude": "nothing"}, "nothing is called nothing"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32)).eval()
    with pytest.raises(InputError, match=message):
        tinier.factorize(model, torch.randn(2, 32), **arguments)


def test_what_cannot_be_reached() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    with pytest.raises(RefusedError, match="with all ranks 1"):
        tinier.factorize(model, torch.randn(2, 8), keep=0.01)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan  # type: ignore[operator]
    with pytest.raises(RefusedError, match="not finite"):
        tinier.factorize(model, torch.randn(2, 8))
    with pytest.raises(RefusedError, match="no such weight"):
        Plan((Factorize("none.weight", (Values(draw(1, 8)), Values(draw(8, 1)))),)).apply(
            Network(nn.Sequential(nn.Linear(8, 8)), {"input": torch.randn(2, 8)})
        )


def test_statistics_are_of_the_layers() -> None:
    network = build("residual_cnn")
    x = inputs("residual_cnn", 8)
    statistics = observe(network, [(x, None)], {"gram"})
    plan = Factorization(keep=0.7).plan(network, statistics)
    assert plan.edits and plan != Factorization(keep=0.7).plan(network)


def test_the_command_line(files: Path, tmp_path: Path) -> None:
    words = ["factorize", files / "model.onnx", "--data", files / "train.npz"]
    outcome = command(*words, "--keep", 0.6, "--out", tmp_path / "out", "--json")
    assert outcome.exit_code == 0, outcome.output
    report = json.loads(outcome.stdout)
    assert report["macs"]["after"] <= 0.6 * report["macs"]["before"]
    assert (tmp_path / "out" / "model.onnx").exists()
    refused(command(*words, "--keep", 2, "--out", tmp_path / "none"), "between 0 and 1")
    assert not (tmp_path / "none").exists()
