"""Compensation against closed forms: numpy's least squares, exact recovery, one batch against many, and laws that hold everywhere."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import NETWORKS, build, inputs
from tinier.criteria.random import Random
from tinier.criteria.reconstruction import Reconstruction
from tinier.edits.base import Plan
from tinier.edits.slice import Slice
from tinier.errors import DataError, InputError, RefusedError
from tinier.graph.groups import channel_groups, named_tensors
from tinier.graph.layers import linear_layer
from tinier.graph.trace import call
from tinier.methods.channel_pruning import ChannelPruning
from tinier.network import Network
from tinier.recovery.compensation import _kept, compensate
from tinier.recovery.refit import Refit
from tinier.statistics import observe
from tinier.statistics.sensitivity import Sensitivities, output_gradients
from tinier.tensors.least_squares import Sums


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sums(x: Tensor, y: Tensor, w: Tensor | None = None, pieces: int = 1) -> Sums:
    made = Sums(len(x), x.shape[2], y.shape[2])
    weights = [None] * pieces if w is None else w.chunk(pieces)
    for a, b, c in zip(x.chunk(pieces, 1), y.chunk(pieces, 1), weights, strict=True):
        made.add(a, b, c)
    return made


def example(rows: int = 60, n: int = 7, m: int = 3, fits: int = 1) -> tuple[Tensor, ...]:
    g = seeded(3)
    x = torch.randn(fits, rows, n, generator=g, dtype=torch.float64) + 1
    y = torch.randn(fits, rows, m, generator=g, dtype=torch.float64) - 2
    weight = torch.randn(fits, m, n, generator=g, dtype=torch.float64)
    return x, y, weight, torch.zeros(fits, m, dtype=torch.float64)


# The maths


def test_fit_is_numpys_least_squares() -> None:
    x, y, weight, bias = example()
    fitted, shift = sums(x, y).fit(weight, bias, ridge=0)
    design = np.hstack([x[0].numpy(), np.ones((60, 1))])
    wanted = np.linalg.lstsq(design, y[0].numpy(), rcond=None)[0]
    np.testing.assert_allclose(fitted[0].numpy(), wanted[:-1].T, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(shift[0].numpy(), wanted[-1], rtol=1e-9)


def test_ridge_is_least_squares_of_augmented_data() -> None:
    x, y, weight, bias = example()
    fitted, _ = sums(x, y).fit(weight, bias, ridge=0.3)
    a = (x - x.mean(1, keepdim=True))[0].numpy()
    b = (y - y.mean(1, keepdim=True))[0].numpy()
    root = np.sqrt(0.3 * np.trace(a.T @ a) / 7)
    a, b = np.vstack([a, root * np.eye(7)]), np.vstack([b, root * weight[0].numpy().T])
    np.testing.assert_allclose(fitted[0].numpy().T, np.linalg.lstsq(a, b, rcond=None)[0], rtol=1e-9)


def test_weights_are_repetitions() -> None:
    x, y, weight, bias = example(fits=2)
    times = torch.arange(60) % 4
    again = times.repeat_interleave(times.clamp(min=0))
    index = torch.arange(60).repeat_interleave(times)
    one = sums(x, y, times.double()).fit(weight, bias, 0.1)
    two = sums(x[:, index], y[:, index]).fit(weight, bias, 0.1)
    assert len(again) == len(index)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_streaming_is_one_batch() -> None:
    x, y, weight, bias = example(fits=2)
    one, many = (sums(x, y, None, pieces).fit(weight, bias, 1e-2) for pieces in (1, 9))
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_without_intercept_the_bias_stays() -> None:
    x, y, weight, bias = example()
    bias = bias + 0.7
    fitted, shift = sums(x, y).fit(weight, bias, 0, intercept=False)
    wanted = np.linalg.lstsq(x[0].numpy(), y[0].numpy() - 0.7, rcond=None)[0]
    np.testing.assert_allclose(fitted[0].numpy(), wanted.T, rtol=1e-9)
    assert torch.equal(shift, bias)


def test_more_unknowns_than_rows() -> None:
    x, y, weight, bias = example(rows=5, n=9)
    fitted, shift = sums(x, y).fit(weight, bias, ridge=0)
    torch.testing.assert_close(x @ fitted.mT + shift[:, None], y, rtol=1e-7, atol=1e-7)
    # Nearest to the old weights: the difference lies in the span of the centred inputs.
    span = (x - x.mean(1, keepdim=True))[0]
    moved = (fitted - weight)[0]
    outside = moved - moved @ torch.linalg.pinv(span) @ span
    assert float(outside.abs().max()) < 1e-7


def test_error_is_the_mean_square_and_never_grows() -> None:
    x, y, weight, bias = example()
    made = sums(x, y)
    residual = (y - x @ weight.mT - bias[:, None]).square().mean(1)
    torch.testing.assert_close(made.error(weight, bias), residual, rtol=1e-10, atol=1e-10)
    for ridge in (0.0, 1e-2, 10.0, 1e6):
        fitted = made.fit(weight, bias, ridge)
        assert bool((made.error(*fitted) <= made.error(weight, bias)).all())


def test_huge_ridge_keeps_the_weights() -> None:
    x, y, weight, bias = example()
    fitted, _ = sums(x, y).fit(weight, bias, ridge=1e12)
    torch.testing.assert_close(fitted, weight, rtol=1e-6, atol=1e-6)


# Layers as matrices

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "linear_without_bias": (lambda: nn.Linear(6, 4, bias=False), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, 2), (3, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0)), (3, 4, 7, 6)),
    "conv2d_same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=2), (3, 4, 9, 8)),
    "conv2d_grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (3, 4, 6, 6)),
    "conv2d_depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (3, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, 2), (3, 2, 4, 5, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 3, 4, 3, 1, 2), (3, 4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2), (3, 4, 4, 5)),
    "transposed2d_dilated": (lambda: nn.ConvTranspose2d(4, 2, 2, 1, 2, dilation=3), (3, 4, 6, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_a_matrix_product(name: str) -> None:
    make, shape = LAYERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: Any = make()
    x = torch.randn(shape, generator=seeded(1))
    traced = Network(module, {"input": x}).traced
    layer = next(
        found for node in traced.module.graph.nodes if (found := linear_layer(node)) is not None
    )
    weight: Tensor = module.weight.detach()
    y = module(x).detach()
    bias = torch.zeros(()) if module.bias is None else module.bias.detach()
    matrix = layer.matrix(weight)
    assert torch.equal(layer.parameter(matrix, weight.shape), weight)
    made = layer.inputs(x, weight) @ matrix.mT
    if module.bias is not None:
        made = made + bias.view(layer.groups, 1, -1)  # type: ignore[union-attr]
    wanted = layer.outputs(y)
    assert layer.rows(y) == wanted.shape[1]
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    some = torch.tensor([0, 3, 5]) % wanted.shape[1]
    assert torch.equal(layer.inputs(x, weight, some), layer.inputs(x, weight)[:, some])
    assert torch.equal(layer.outputs(y, some), wanted[:, some])


# Sensitivity


class Pooled(nn.Module):
    """Only the first token is returned, and a mask hides others from attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)))[:, 0]


def test_rows_that_no_output_depends_on_have_no_weight() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Pooled()
    x = torch.randn(5, 6, 4, generator=seeded())
    traced = Network(module, {"x": x}).traced
    gradients = list(output_gradients(traced, {"x": x}, seeded()).values())
    assert [g.shape[-1] for g in gradients] == [8, 3]
    for gradient in gradients:
        assert float(gradient[:, 1:].abs().max()) == 0
        assert bool((gradient[:, 0].abs().amax(1) > 0).all())


def test_squared_projection_is_the_jacobian_in_the_mean() -> None:
    module = nn.Linear(3, 4, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.randn(4, 3, generator=seeded(), dtype=torch.float64))
    x = torch.randn(2000, 3, generator=seeded(1), dtype=torch.float64)
    network = Network(module, {"input": x})
    (gradient,) = output_gradients(network.traced, {"input": x}, seeded(2)).values()
    # The output is the layer's own result, centred: the Jacobian is the centring matrix over σ.
    wanted = (torch.eye(4) - 0.25).square().sum() / float(module(x).detach().float().var())
    assert abs(float(gradient.square().sum(1).mean()) / float(wanted) - 1) < 0.05


def test_sensitivities_are_weighted_moments() -> None:
    module = nn.Linear(3, 2)
    x = torch.randn(40, 3, generator=seeded(1))
    traced = Network(module, {"input": x}).traced
    found = Sensitivities(traced)
    found.add({"input": x}, seeded(5))
    (gradient,) = output_gradients(traced, {"input": x}, seeded(5)).values()
    (own,) = found.sums.values()
    w = gradient.double().square().sum(1)
    mean = (w[:, None] * x.double()).sum(0) / w.sum()
    wanted = ((x - mean) * w[:, None]).mT @ (x - mean) / 40
    torch.testing.assert_close(own.covariance[0], wanted, rtol=1e-9, atol=1e-12)
    assert abs(float(own.shares.sum()) - 1) < 1e-12


# Networks


def two_layers(kept: list[int]) -> tuple[Network, Plan]:
    """Six hidden channels of rank three, linear: any three that span the same recover the rest."""
    g = seeded(7)
    first, second = nn.Linear(5, 6), nn.Linear(6, 4)
    with torch.no_grad():
        first.weight[:3] = torch.randn(3, 5, generator=g)
        first.weight[3:] = torch.randn(3, 3, generator=g) @ first.weight[:3]
        first.bias.copy_(torch.randn(6, generator=g))
        second.weight.copy_(torch.randn(4, 6, generator=g))
    network = Network(nn.Sequential(first, second), {"input": torch.randn(2, 5, generator=g)})
    group = channel_groups(network.traced).groups[0]
    return network, Plan((Slice.of(group, kept),))


def test_linear_combinations_of_what_is_kept_are_recovered_exactly() -> None:
    network, plan = two_layers([0, 2, 4])
    data = [{"input": torch.randn(50, 5, generator=seeded(1))}]
    pruned = plan.apply(network)
    fitted = compensate(pruned, network, plan, data, ridge=0)
    new = torch.randn(20, 5, generator=seeded(2))
    wanted = network({"input": new})[0]
    assert float((pruned({"input": new})[0] - wanted).abs().max()) > 0.1
    torch.testing.assert_close(fitted({"input": new})[0], wanted, rtol=1e-4, atol=1e-5)


def batches(name: str) -> list[dict[str, Tensor]]:
    return [inputs(name, batch=24, seed=seed) for seed in (11, 12)]


def half(network: Network, keep: float = 0.6) -> Plan:
    return ChannelPruning(keep=keep, criterion=Random(seed=2), round_to=1).plan(network)


def output_error(found: Network, wanted: Network, data: list[dict[str, Tensor]]) -> float:
    total = 0.0
    for batch in data:
        for a, b in zip(found(batch), wanted(batch), strict=True):
            total += float((a - b).double().square().sum()) / float(b.double().var())
    return total


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network(name: str) -> None:
    network = build(name)
    try:
        plan = half(network)
    except RefusedError as refusal:
        pytest.skip(str(refusal))
    pruned = plan.apply(network)
    before = [copy.deepcopy(n.module.state_dict()) for n in (network, pruned)]
    data = batches(name)
    fitted = compensate(pruned, network, plan, data)
    # Closer to the original, of the same class and shapes, still trainable; the user's networks as they were.
    assert output_error(fitted, network, data) < 0.95 * output_error(pruned, network, data)
    graphs = [isinstance(n.module, torch.fx.GraphModule) for n in (fitted, pruned)]
    assert all(graphs) or type(fitted.module) is type(pruned.module)
    shapes = [{k: v.shape for k, v in n.module.state_dict().items()} for n in (fitted, pruned)]
    assert shapes[0] == shapes[1]
    for state, module in zip(before, (network.module, pruned.module), strict=True):
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    call(fitted.module, data[0])[0].float().sum().backward()
    # The same bits again, and whatever the batches.
    again = compensate(pruned, network, plan, [_joined(data)])
    for key, value in again.module.state_dict().items():
        assert torch.equal(value, fitted.module.state_dict()[key]), key


def _joined(data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([batch[key] for batch in data]) for key in data[0]}


@pytest.mark.parametrize("name", ["residual_cnn", "grouped_cnn", "vit", "encoder", "generator"])
def test_no_layer_is_further_from_its_target(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = build(name)
    plan = half(network)
    channels = channel_groups(network.traced)
    refit = Refit(network.traced, channels, _kept(plan, channels), batches(name), 1e-2, 0)
    errors = []
    real = Sums.fit

    def fit(
        self: Sums, weight: Tensor, bias: Tensor, ridge: float, intercept: bool
    ) -> tuple[Tensor, Tensor]:
        fitted = real(self, weight, bias, ridge, intercept)
        errors.append((float(self.error(weight, bias).sum()), float(self.error(*fitted).sum())))
        return fitted

    monkeypatch.setattr(Sums, "fit", fit)
    refit.run()
    assert len(errors) > 2
    assert all(after <= before for before, after in errors)
    assert sum(after for _, after in errors) < 0.9 * sum(before for before, _ in errors)


class Normed(nn.Module):
    """A convolution without a bias, a batch norm, a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 1)
        self.second = nn.Conv2d(6, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.second(self.first(x))))


def test_batch_norm_statistics_are_those_of_the_data() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network(Normed().eval(), {"x": torch.randn(2, 2, 5, 5)})
    group = next(g for g in channel_groups(network.traced).groups if g.name == "first")
    plan = Plan((Slice.of(group, [0, 3, 5]),))
    data = [{"x": torch.randn(64, 2, 5, 5, generator=seeded(1)) + 1}]
    fitted: Any = compensate(plan.apply(network), network, plan, data).module
    hidden = fitted.second(fitted.first(data[0]["x"])).detach()
    torch.testing.assert_close(
        fitted.norm.running_mean, hidden.mean((0, 2, 3)), rtol=1e-4, atol=1e-5
    )
    variance = hidden.var((0, 2, 3), correction=0)
    torch.testing.assert_close(fitted.norm.running_var, variance, rtol=1e-4, atol=1e-6)
    # Training starts from the function that evaluation has, and two inputs span the three channels: nothing is lost.
    evaluated = fitted(data[0]["x"])
    torch.testing.assert_close(fitted.train()(data[0]["x"]), evaluated, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(evaluated, network(data[0])[0], rtol=1e-2, atol=1e-2)


class Shared(nn.Module):
    """One layer used twice, and one whose weight is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(4, 8), nn.Linear(8, 8)
        self.again, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.again.weight = self.middle.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(F.relu(self.middle(F.relu(self.first(x)))))
        return self.last(F.relu(self.again(y)))


def test_shared_weights_are_left_alone() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = Network(Shared().eval(), {"x": torch.randn(2, 4)})
    plan = half(network)
    pruned = plan.apply(network)
    fitted = compensate(pruned, network, plan, [{"x": torch.randn(64, 4, generator=seeded())}])
    assert fitted.module.again.weight is fitted.module.middle.weight  # type: ignore[union-attr]
    assert torch.equal(fitted.module.middle.weight, pruned.module.middle.weight)  # type: ignore[arg-type, union-attr]
    assert not torch.equal(fitted.module.last.weight, pruned.module.last.weight)  # type: ignore[arg-type, union-attr]


def test_nothing_cut_changes_nothing() -> None:
    network = build("residual_cnn")
    fitted = compensate(network.copy(), network, Plan(), batches("residual_cnn"))
    for key, value in network.module.state_dict().items():
        assert torch.equal(value, fitted.module.state_dict()[key])


def test_the_graph_in_place_of_the_class() -> None:
    network = build("residual_cnn")
    plan = half(network)
    pruned = plan.apply(network)
    fitted = compensate(pruned, network, plan, batches("residual_cnn"))
    graph = Network(network.traced.module, network.example)
    as_graph = plan.apply(graph)
    assert isinstance(as_graph.module, torch.fx.GraphModule)
    other = compensate(as_graph, graph, plan, batches("residual_cnn"))
    assert isinstance(other.module, torch.fx.GraphModule)
    own, theirs = named_tensors(other.module), named_tensors(fitted.module)
    assert all(torch.equal(own[name], theirs[name]) for name in own if name in theirs)


def test_examples_that_do_not_fit_are_left_out_and_said() -> None:
    network = build("mlp")
    plan = half(network)
    pruned = plan.apply(network)
    data = [inputs("mlp", batch=200)]
    fitted = compensate(pruned, network, plan, data, memory=1)
    assert any("first 64 examples" in note for note in fitted.notes)
    few = compensate(pruned, network, plan, [{"x": data[0]["x"][:64]}])
    assert few.notes == (*pruned.notes, "compensated on 64 examples")
    for key, value in few.module.state_dict().items():
        assert torch.equal(value, fitted.module.state_dict()[key])


def test_bad_input() -> None:
    network = build("mlp")
    plan = half(network)
    pruned = plan.apply(network)
    data = batches("mlp")
    with pytest.raises(DataError, match="no examples"):
        compensate(pruned, network, plan, [])
    with pytest.raises(DataError, match="x"):
        compensate(pruned, network, plan, [{"y": torch.randn(4, 12)}])
    with pytest.raises(DataError, match="not finite"):
        compensate(pruned, network, plan, [{"x": torch.full((4, 12), torch.nan)}])
    with pytest.raises(InputError, match="ridge"):
        compensate(pruned, network, plan, data, ridge=-1)
    with pytest.raises(InputError, match="not what the plan makes"):
        compensate(network, network, plan, data)
    other = build("residual_cnn")
    with pytest.raises(InputError, match="the plan slices"):
        compensate(pruned, other, plan, batches("residual_cnn"))


# The criterion that goes with it


def reconstruction(network: Network, data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    criterion = Reconstruction(ridge=1e-9)
    statistics = observe(network, data, criterion.needs)
    return criterion.scores(network, channel_groups(network.traced).groups, statistics)


def test_channels_that_others_stand_in_for_score_nothing() -> None:
    network, _ = two_layers([0, 1, 2])
    data = [{"input": torch.randn(200, 5, generator=seeded(1))}]
    (scores,) = reconstruction(network, data).values()
    ordered = scores.sort().values
    assert float(ordered[2]) < 1e-6 * float(ordered[3])  # three of six, of rank three


def test_the_last_score_is_the_change_of_the_outputs() -> None:
    """One hidden channel alone: taking it out leaves the bias, so that the error is the variance that it made."""
    first, second = nn.Linear(3, 2), nn.Linear(2, 4)
    module = nn.Sequential(first, second)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        second.weight.copy_(torch.randn(4, 2, generator=seeded()))
    x = torch.randn(4000, 3, generator=seeded(1))
    network = Network(module, {"input": x[:2]})
    (scores,) = reconstruction(network, [{"input": x}]).values()
    # Independent inputs: each channel's own effect on the centred outputs, in units of their variance.
    weight = second.weight.detach()
    effect = (weight - weight.mean(0)).square() * x[:, :2].var(0)
    wanted = effect.mean(0) * 4
    outputs = module(x).detach().var()
    # The output factor is diagonal and centring takes a quarter of each output: exact up to that, in order and size.
    found = scores * float(outputs)
    assert found.argsort().tolist() == wanted.argsort().tolist()
    assert bool((found / wanted > 0.5).all()) and bool((found / wanted < 2.0).all())


def test_reconstruction_needs_data() -> None:
    network = build("mlp")
    with pytest.raises(InputError, match="needs data"):
        Reconstruction().scores(network, channel_groups(network.traced).groups)
    with pytest.raises(InputError, match="ridge"):
        Reconstruction(ridge=0)
