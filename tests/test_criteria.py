"""Criteria and the statistics that they need: oracles, and every criterion on every network of the conformance set."""

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tinier.criteria
import tinier.statistics.streaming as streaming
from networks import NETWORKS, build, inputs
from tinier.criteria.activation import Activation
from tinier.criteria.activation_entropy import ActivationEntropy
from tinier.criteria.base import Criterion
from tinier.criteria.batch_norm_scale import BatchNormScale
from tinier.criteria.choose import as_criterion
from tinier.criteria.fisher import Fisher
from tinier.criteria.function import Function
from tinier.criteria.geometric_median import GeometricMedian
from tinier.criteria.gradient import Gradient
from tinier.criteria.lamp import LAMP
from tinier.criteria.magnitude import Magnitude
from tinier.criteria.obd import OBD
from tinier.criteria.obs import OBS
from tinier.criteria.obs_greedy import OBSGreedy
from tinier.criteria.random import Random
from tinier.criteria.second_moment import SecondMoment
from tinier.criteria.taylor import Taylor
from tinier.criteria.taylor_activation import TaylorActivation
from tinier.criteria.wanda import Wanda
from tinier.criteria.weight_entropy import WeightEntropy
from tinier.criteria.zeros import Zeros
from tinier.errors import DataError, InputError, RefusedError
from tinier.graph.groups import Group, channel_groups
from tinier.network import Network
from tinier.registry import implementations
from tinier.statistics import Statistics, observe
from tinier.statistics.base import NEEDS
from tinier.statistics.histograms import Histograms

KINDS = implementations(tinier.criteria, Criterion)  # type: ignore[type-abstract]


def make(name: str) -> Criterion:
    """A criterion with its defaults; of the user's function, one that counts parameters."""
    if name == "function":
        return Function(lambda network, group: torch.arange(group.size) + 1)
    return KINDS[name]()


@cache
def prepared(name: str) -> tuple[Network, tuple[Group, ...]]:
    """A network of the conformance set and its groups; channel 1 of each is a copy of channel 0."""
    network = build(name)
    tensors = dict(network.module.named_parameters()) | dict(network.module.named_buffers())
    with torch.no_grad():
        for group in channel_groups(network.traced).groups:
            for slot in group.slots if group.kind != "head_dim" else ():
                index, values = slot.index(), tensors[slot.parameter].movedim(slot.dim, 0)
                values[index == 1] = values[index == 0]
    network = Network(network.module, network.example, name)
    return network, channel_groups(network.traced).groups


@cache
def statistics_of(name: str, sizes: tuple[int, ...], squares: bool) -> Statistics:
    """Of five examples in batches of these sizes; no labels."""
    network, _ = prepared(name)
    parts = {key: value.split(sizes) for key, value in inputs(name, 5).items()}
    batches = [{key: part[i] for key, part in parts.items()} for i in range(len(sizes))]
    needs = {"squares"} if squares else NEEDS.keys() - {"squares"}
    return observe(network, batches, needs)


def scores(kind: str, name: str, sizes: tuple[int, ...] = (5,)) -> dict[str, Tensor]:
    """Scores of a network; {} where the criterion refuses it."""
    network, groups = prepared(name)
    criterion = make(kind)
    statistics = None
    if criterion.needs:
        statistics = statistics_of(name, sizes, criterion.needs == {"squares"})
    try:
        return criterion.scores(network, groups, statistics)
    except RefusedError as error:
        assert "can score no channel group" in str(error)
        return {}


# What cannot be scored: no batch norm.
REFUSED = {
    ("batch_norm_scale", name)
    for name in [
        "mlp",
        "vit",
        "vit_stock_attention",
        "encoder",
        "causal_lm",
        "lstm",
        "gru",
        "vae",
        "experts",
    ]
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_conformance(kind: str, name: str) -> None:
    """Finite scores of the right sizes, the same again and however the examples are batched; the network stays as it is."""
    network, groups = prepared(name)
    before = {key: value.clone() for key, value in network.module.state_dict().items()}
    found = scores(kind, name)
    assert bool(found) == ((kind, name) not in REFUSED)
    sizes = {group.name: group.size for group in groups}
    for group, values in found.items():
        assert values.shape == (sizes[group],) and values.dtype == torch.float64
        assert values.isfinite().all() and (values >= 0).all()
    for again in (scores(kind, name), scores(kind, name, (2, 1, 2))):
        assert again.keys() == found.keys()
        assert all(torch.equal(again[group], found[group]) for group in found)
    for module in (network.module, network.traced.module):
        assert all(p.grad is None and p.requires_grad for p in module.parameters())
    for key, value in network.module.state_dict().items():
        assert torch.equal(value, before[key])


# In greedy ones the second of two equal channels counts more: the first could go because of it.
GREEDY = {"obs_greedy", "reconstruction"}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"random", "function"} - GREEDY))
def test_equal_channels_score_equally(kind: str, name: str) -> None:
    _, groups = prepared(name)
    found = scores(kind, name)
    for group in groups:
        if group.kind != "head_dim" and group.name in found:
            first, second = found[group.name][:2].tolist()
            scale = float(found[group.name].max())
            assert first == pytest.approx(second, rel=1e-4, abs=1e-7 * scale), group.name


# A small network with known insides: the oracles below compute everything from them.


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 6)
        self.fc2 = nn.Linear(6, 3)

    def hidden(self, x: Tensor) -> Tensor:
        return F.relu(self.fc1(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.hidden(x))


@pytest.fixture
def small() -> tuple[Small, Network, Group, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = Small()
        x, y = torch.randn(40, 5), torch.randint(0, 3, (40,))
    network = Network(module, {"x": x[:2]}, "small")
    (group,) = channel_groups(network.traced).groups
    return module, network, group, x, y


def of(
    criterion: Criterion, network: Network, group: Group, x: Tensor, y: Tensor | None = None
) -> Tensor:
    """Scores of one group, with data if they are needed."""
    statistics = observe(network, [({"x": x}, y)], criterion.needs) if criterion.needs else None
    return criterion.scores(network, [group], statistics)[group.name]


def close(found: Tensor, wanted: Tensor, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted.double(), rtol=rtol, atol=1e-9)


def test_activations(small: Any) -> None:
    module, network, group, x, _ = small
    a = module.hidden(x).detach().double()
    close(of(Activation(), network, group, x), a.mean(0) / a.mean())
    close(of(SecondMoment(), network, group, x), a.square().mean(0) / a.square().mean())
    close(of(Zeros(), network, group, x), (a > 0).double().mean(0))


def test_activations_over_positions_and_places() -> None:
    """A convolution reads the first group at three places; a mean over the places, each divided by its mean."""
    network, groups = prepared("residual_cnn")
    module: Any = network.module
    x = inputs("residual_cnn", 9)["x"]
    with torch.no_grad():
        first = module.pool(F.relu(module.bn(module.conv(x))))
        second = module.blocks[0](first)
    shares = [a.double().abs().mean((0, 2, 3)) for a in (first, second)]
    wanted = sum(share / share.mean() for share in shares) / 2
    group = next(group for group in groups if group.name == "conv")
    close(of(Activation(), network, group, x), torch.as_tensor(wanted))


def test_entropy_of_activations_in_closed_form() -> None:
    """A neuron that takes 32 values equally often has log 32, two values log 2, a constant 0."""

    class Pass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(3, 3, bias=False), nn.Linear(3, 2)
            self.fc1.weight = nn.Parameter(torch.eye(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(F.relu(self.fc1(x)))

    count = torch.arange(64.0)
    x = torch.stack([count % 32, 5 * (count % 2), torch.full((64,), 7.0)], 1)
    network = Network(Pass(), {"x": x[:2]}, "pass")
    (group,) = channel_groups(network.traced).groups
    wanted = torch.tensor([math.log(32), math.log(2), 0])
    close(of(ActivationEntropy(), network, group, x), wanted)


def test_histograms_do_not_depend_on_batching() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator) * torch.tensor([1e-6, 1e-2, 1, 1e3, 0])
    whole, parts = Histograms(5), Histograms(5)
    whole.add(x)
    for part in x.split([1, 2, 7, 40, 250]):
        parts.add(part)
    assert torch.equal(whole.counts, parts.counts)
    assert torch.equal(whole.exponent, parts.exponent)
    assert whole.counts.sum(1).tolist() == [300] * 5
    assert torch.equal(whole.entropy(16), parts.entropy(16))


def test_entropy_of_weights_by_numpy(small: Any) -> None:
    module, network, group, x, _ = small
    wanted = torch.zeros(6, dtype=torch.float64)
    for matrix in (module.fc1.weight, module.fc2.weight.T):
        own = matrix.detach().double().numpy()
        for i in range(6):
            counts, _ = np.histogram(own[i], bins=8, range=(own.min(), own.max()))
            p = counts[counts > 0] / counts.sum()
            wanted[i] -= float((p * np.log(p)).sum()) / 2
    close(of(WeightEntropy(bins=8), network, group, x), wanted)


def gated(module: Small, x: Tensor, y: Tensor) -> Tensor:
    """∂L_n/∂m for a factor m on each hidden unit, one example at a time. (examples, 6) float64."""
    result = []
    for one, label in zip(x, y, strict=True):
        m = torch.ones(6, requires_grad=True)
        loss = F.cross_entropy(module.fc2(module.hidden(one[None]) * m), label[None])
        result.append(torch.autograd.grad(loss, m)[0].double())
    return torch.stack(result)


def gradients(module: Small, x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    """The gradient of each example's loss for every parameter."""
    result = []
    for one, label in zip(x, y, strict=True):
        loss = F.cross_entropy(module(one[None]), label[None])
        found = torch.autograd.grad(loss, list(module.parameters()))
        names = [name for name, _ in module.named_parameters()]
        result.append({n: g.double() for n, g in zip(names, found, strict=True)})
    return result


def by_hidden(values: dict[str, Tensor], bias: bool) -> Tensor:
    """Sums over what belongs to each hidden unit of ``Small``."""
    total = values["fc1.weight"].sum(1) + values["fc2.weight"].sum(0)
    return total + values["fc1.bias"] if bias else total


def test_gradients_by_brute_force(small: Any) -> None:
    module, network, group, x, y = small
    z, each = gated(module, x, y), gradients(module, x, y)
    weights = {name: p.detach().double() for name, p in module.named_parameters()}
    mean = {name: torch.stack([g[name] for g in each]).mean(0) for name in weights}
    squares = {name: torch.stack([g[name] ** 2 for g in each]).mean(0) for name in weights}
    close(of(TaylorActivation(), network, group, x, y), z.abs().mean(0))
    close(of(Fisher(), network, group, x, y), z.square().mean(0) / 2)
    gradient = by_hidden({name: g.abs() for name, g in mean.items()}, bias=False)
    close(of(Gradient(), network, group, x, y), gradient)
    change = by_hidden({name: weights[name] * mean[name] for name in weights}, bias=True)
    close(of(Taylor(), network, group, x, y), change**2)
    # Behind ReLU the weights before and those after a unit both scale it: each side sums to its factor's derivative.
    close(of(Taylor(), network, group, x, y), (2 * z.mean(0)) ** 2, rtol=1e-4)
    damage = {name: 0.5 * squares[name] * weights[name] ** 2 for name in weights}
    close(of(OBD(), network, group, x, y), by_hidden(damage, bias=True))


def halved_squares(outputs: tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
    assert labels is not None
    return 0.5 * (outputs[0] - labels).square().sum(1).mean()


def test_losses_that_fit_the_labels(small: Any) -> None:
    """Values get half the squared error; a loss of the user's own replaces it; both against autograd."""
    module, network, _, x, _ = small
    values = torch.sin(x[:, :3])
    mean = torch.autograd.grad(
        0.5 * (module(x) - values).square().sum() / len(x), module.fc2.weight
    )[0]
    given = observe(network, [({"x": x}, values)], ["gradients"])
    close(given.gradients["fc2.weight"], mean)
    own = observe(
        network,
        [({"x": x}, values)],
        ["gradients"],
        loss=halved_squares,
    )
    close(own.gradients["fc2.weight"], mean)
    assert given.labels == "given"


def test_without_labels_it_is_the_true_fisher_information(small: Any) -> None:
    """E z² over labels of the network's own softmax is aᵢ² (Σ p W² − (Σ p W)²)."""
    module, network, group, x, _ = small
    a, p = module.hidden(x).detach().double(), module(x).detach().double().softmax(1)
    w = module.fc2.weight.detach().double()  # (3, 6)
    wanted = (a**2 * (p @ w**2 - (p @ w) ** 2)).mean(0) / 2
    statistics = observe(network, [{"x": x.repeat(500, 1)}], ["gates"], seed=1)
    found = Fisher().scores(network, [group], statistics)[group.name]
    assert statistics.labels == "sampled"
    torch.testing.assert_close(found, wanted, rtol=0.03, atol=1e-6)


def refitted(w: Tensor, rows: Tensor, gone: list[int], strength: float) -> float:
    """The least error of W x + b with columns gone: lstsq on centred rows and λ ‖W' − W‖², as numpy has it."""
    centred = (rows - rows.mean(0)) / math.sqrt(len(rows))
    kept = [i for i in range(w.shape[1]) if i not in gone]
    ridge = math.sqrt(strength) * torch.eye(w.shape[1], dtype=torch.float64)
    system = torch.cat([centred, ridge])
    target = system @ w.T
    solved = np.linalg.lstsq(system[:, kept].numpy(), target.numpy(), rcond=None)[0]
    return float((target - system[:, kept] @ torch.from_numpy(solved)).square().sum())


def oracle(w: Tensor, rows: Tensor, sets: list[list[int]]) -> list[float]:
    """For each set of columns, the error of removing it as a share of the output's variance."""
    covariance = torch.cov(rows.T, correction=0)
    energy = float((w @ covariance @ w.T).trace())
    strength = 1e-2 * float(covariance.diagonal().mean())
    return [refitted(w, rows, gone, strength) / energy for gone in sets]


def test_obs_is_the_error_of_least_squares(small: Any) -> None:
    module, network, group, x, _ = small
    rows, w = module.hidden(x).detach().double(), module.fc2.weight.detach().double()
    wanted = torch.tensor(oracle(w, rows, [[i] for i in range(6)]))
    close(of(OBS(), network, group, x), wanted, rtol=1e-4)


def test_greedy_obs_is_the_error_of_least_squares(small: Any) -> None:
    """In the order in which channels leave, the scores add up to the error of all that left."""
    module, network, group, x, _ = small
    rows, w = module.hidden(x).detach().double(), module.fc2.weight.detach().double()
    found = of(OBSGreedy(), network, group, x)
    order, gone, last = found.argsort().tolist(), list[int](), 0.0
    most = 0.0
    for channel in order:
        left = [i for i in range(6) if i not in gone]
        errors = oracle(w, rows, [[*gone, i] for i in left])
        assert left[int(np.argmin(errors))] == channel
        most = max(most, min(errors) - last)
        assert float(found[channel]) == pytest.approx(most, rel=1e-4)
        last = min(errors)
        gone.append(channel)


@pytest.mark.parametrize("groups", [1, 2])
def test_obs_of_convolutions(groups: int) -> None:
    """Columns are channels × kernel positions; with groups, a channel stands for one in each of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1, groups=groups), nn.Flatten()
        )
        x = torch.randn(30, 2, 8, 8)
    network = Network(module, {"input": x[:2]}, "convolutions")
    group = next(g for g in channel_groups(network.traced).groups if g.name == "0")
    statistics = observe(network, [{"input": x}], OBS.needs)
    found = OBS().scores(network, [group], statistics)[group.name]
    a = F.unfold(module[:2](x).detach(), 3, padding=1, stride=2)  # (30, 36, positions)
    rows = a.mT.flatten(0, 1).double()
    weight: Any = module[2].weight
    w = torch.zeros(6, 36, dtype=torch.float64)  # block diagonal
    for part, own in enumerate(weight.detach().double().flatten(1).chunk(groups)):
        wide = 36 // groups
        w[part * 6 // groups : (part + 1) * 6 // groups, part * wide : (part + 1) * wide] = own
    covariance = torch.cov(rows.T, correction=0)
    energy = float((w @ covariance @ w.T).trace())
    wanted = torch.zeros(group.size, dtype=torch.float64)
    for part in range(groups):
        inside = slice(part * 36 // groups, (part + 1) * 36 // groups)
        outside = slice(part * 6 // groups, (part + 1) * 6 // groups)
        strength = 1e-2 * float(covariance.diagonal()[inside].mean())
        for i in range(group.size):
            gone = list(range(9 * i, 9 * i + 9))
            wanted[i] += refitted(w[outside, inside], rows[:, inside], gone, strength) / energy
    assert group.size == 4 // groups
    close(found, wanted, rtol=1e-3)


def test_wanda(small: Any) -> None:
    module, network, group, x, _ = small
    norms = module.hidden(x).detach().double().norm(dim=0)
    wanted = module.fc2.weight.detach().double().abs() * norms
    statistics = observe(network, [{"x": x}], Wanda.needs)
    found = Wanda().weights(network, ["fc2.weight", "fc1.weight"], statistics)
    close(found["fc2.weight"], wanted)
    close(found["fc1.weight"], module.fc1.weight.detach().double().abs() * x.double().norm(dim=0))
    close(
        Wanda().scores(network, [group], statistics)[group.name],
        wanted.sum(0) / wanted.sum(0).mean(),
    )
    with pytest.raises(RefusedError, match=r"fc1.bias: wanda needs the input"):
        Wanda().weights(network, ["fc1.bias"], statistics)


def test_geometric_median_by_brute_force(small: Any) -> None:
    module, network, group, x, _ = small
    parts = [module.fc1.weight.detach().double(), module.fc2.weight.detach().double().T]
    scaled = torch.cat([p / p.square().sum(1).mean().sqrt() for p in parts], 1)
    wanted = torch.stack([sum((a - b).norm() for b in scaled) for a in scaled])  # type: ignore[misc]
    close(of(GeometricMedian(), network, group, x), wanted)


def test_lamp_as_the_paper_sorts(small: Any) -> None:
    module, network, group, x, _ = small
    v = of(Magnitude(p=2), network, group, x) ** 2
    order = v.argsort()
    wanted = torch.zeros(6, dtype=torch.float64)
    for rank, channel in enumerate(order):
        wanted[channel] = v[channel] / v[order[rank:]].sum()
    found = of(LAMP(), network, group, x)
    close(found, wanted)
    assert float(found.max()) == 1
    weights = LAMP().weights(network, ["fc1.weight"])["fc1.weight"].flatten()
    squares = module.fc1.weight.detach().double().square().flatten()
    for i in range(len(squares)):
        wanted_one = squares[i] / squares[squares >= squares[i]].sum()
        assert float(weights[i]) == pytest.approx(float(wanted_one))


def test_batch_norm_scale() -> None:
    network, groups = prepared("residual_cnn")
    module: Any = network.module
    module.blocks[0].bn1.weight.data[3] *= -1  # the sign does not matter
    network = Network(module, network.example, "residual_cnn")
    found = BatchNormScale().scores(network, groups)
    close(found["blocks.0.conv1"], module.blocks[0].bn1.weight.detach().abs())
    pair = module.bn.weight.detach().abs() + module.blocks[0].bn2.weight.detach().abs()
    close(found["conv"], pair / 2)
    prepared.cache_clear()
    generator = BatchNormScale().scores(*prepared("unet"))
    assert (
        "up" not in generator and "down.0" in generator
    )  # no batch norm behind it: it stays whole


def test_weights_of_every_criterion_that_scores_them(small: Any) -> None:
    """Shapes, signs, and the sums over a channel's weights where the scores of channels are just these."""
    module, network, group, x, y = small
    names = ["fc1.weight", "fc2.weight"]
    known = dict(module.named_parameters())
    able = set()
    for kind in KINDS:
        criterion = make(kind)
        needs = criterion.weight_needs
        statistics = observe(network, [({"x": x}, y)], needs) if needs else None
        try:
            found = criterion.weights(network, names, statistics)
        except RefusedError as error:
            assert "scores whole channels, not single weights" in str(error)
            continue
        able.add(kind)
        assert list(found) == names
        for name, values in found.items():
            assert values.shape == known[name].shape and values.dtype == torch.float64
            assert values.isfinite().all() and (values >= 0).all()
        with pytest.raises(InputError, match=r"nothing.weight: the network has no such parameter"):
            criterion.weights(network, ["nothing.weight"], statistics)
        if needs:
            with pytest.raises(InputError, match="needs data: pass data="):
                criterion.weights(network, names)
    assert able == {"gradient", "lamp", "magnitude", "obd", "random", "taylor", "wanda"}
    statistics = observe(network, [({"x": x}, y)], ["squares", "gradients"])
    every = [name for name, _ in module.named_parameters()]
    single = OBD().weights(network, every, statistics)
    close(of(OBD(), network, group, x, y), by_hidden(single, bias=True))
    close(Magnitude().weights(network, names)["fc1.weight"], module.fc1.weight.detach().abs())
    gradient = statistics.gradients["fc1.weight"]
    close(Gradient().weights(network, names, statistics)["fc1.weight"], gradient.abs())
    change = (gradient * module.fc1.weight.detach().double()) ** 2
    close(Taylor().weights(network, names, statistics)["fc1.weight"], change)


@pytest.mark.parametrize("name", ["residual_cnn", "vit_stock_attention", "causal_lm", "lstm"])
def test_streaming_equals_one_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 6: running two examples at once, or one, gives what running all at once gives."""
    network, _ = prepared(name)
    data = inputs(name, 5)
    count = torch.Generator().manual_seed(0)
    outputs = network(data)[0]
    shape = outputs.shape[:-1]
    labels = torch.randint(0, outputs.shape[-1], shape, generator=count)
    rest = [need for need in NEEDS if need != "squares"]
    results = []
    for chunk in (32, 2):
        monkeypatch.setattr(streaming, "CHUNK", chunk)
        results.append(observe(network, [(data, labels)], rest))
    squares = observe(network, [(data, labels)], ["squares", "gradients", "gates"])
    whole = results[0]
    for other in [*results[1:], squares]:
        for part in ("gradients", "gates", "moments", "grams"):
            ours, theirs = getattr(whole, part), getattr(other, part)
            for key in theirs:
                one, two = vars_of(ours[key]), vars_of(theirs[key])
                for left, right in zip(one, two, strict=True):
                    scale = float(left.abs().max())
                    torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-5 * scale + 1e-9)
        for key in other.histograms:
            left, right = whole.histograms[key].entropy(16), other.histograms[key].entropy(16)
            torch.testing.assert_close(
                left, right, rtol=0.05, atol=0.05
            )  # rounding may cross a bin


def vars_of(value: Any) -> list[Tensor]:
    """The tensors of a part of the statistics."""
    if isinstance(value, Tensor):
        return [value]
    return [torch.as_tensor(item, dtype=torch.float64) for item in vars(value).values()]


def test_frozen_and_tied_parameters(small: Any) -> None:
    """Frozen parameters are scored as any other; tied ones have the gradient of all their uses."""
    module, network, group, x, y = small
    wanted = of(Taylor(), network, group, x, y)
    module.fc1.weight.requires_grad_(False)
    frozen = Network(module, network.example, "frozen")
    (same,) = channel_groups(frozen.traced).groups
    close(of(Taylor(), frozen, same, x, y), wanted)
    assert not module.fc1.weight.requires_grad

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    tied, values = Tied(), x[:, :4]
    shared = Network(tied, {"x": values[:2]}, "tied")
    statistics = observe(shared, [({"x": values}, y)], ["gradients"])
    gradient = torch.autograd.grad(F.cross_entropy(tied(values), y), tied.a.weight)[0]
    names = dict(shared.traced.module.named_parameters(remove_duplicate=False))
    assert names
    for name in names:
        close(statistics.gradients[name], gradient, rtol=1e-4)


def test_bad_data(small: Any) -> None:
    _, network, group, x, y = small
    with pytest.raises(InputError, match="fisher: needs data: pass data="):
        Fisher().scores(network, [group])
    other = observe(network, [{"x": x}], ["activations"])
    with pytest.raises(InputError, match="fisher: the statistics lack gates"):
        Fisher().scores(network, [group], other)
    with pytest.raises(InputError, match="statistics are of another network"):
        Activation().scores(network, [group], Statistics({}, 1, frozenset({"activations"})))
    with pytest.raises(InputError, match="needs: wishes: unknown"):
        observe(network, [{"x": x}], ["wishes"])
    for empty in ([], [{"x": x[:0]}]):
        with pytest.raises(DataError, match="small: no examples"):
            observe(network, empty, ["activations"])
    with pytest.raises(DataError, match="data: no input x; there are z"):
        observe(network, [{"z": x}], ["activations"])
    with pytest.raises(DataError, match="different numbers of examples: x 40, labels 3"):
        observe(network, [({"x": x}, y[:3])], ["gradients"])
    with pytest.raises(DataError, match="some batches have labels and some have none"):
        observe(network, [({"x": x}, y), ({"x": x}, None)], ["gradients"])
    with pytest.raises(DataError, match=r"labels of shape \(9, 7\).* fit no output"):
        observe(network, [({"x": x[:9]}, torch.zeros(9, 7))], ["gradients"])
    with pytest.raises(InputError, match=r"loss: \(9, 3\); a scalar or one value"):
        observe(network, [({"x": x[:9]}, y[:9])], ["gates"], loss=lambda outputs, _: outputs[0])
    with pytest.raises(InputError, match=r"fc2.weight: its Gram matrix of 1 × 6 × 6 takes 0.0 MB"):
        observe(network, [{"x": x}], ["gram"], most_gram=6 * 6 * 8 - 1)
    observe(network, [{"x": x}], ["gram"], most_gram=6 * 6 * 8)


@pytest.mark.parametrize("need", sorted(NEEDS))
def test_values_that_are_not_finite_are_named(need: str, small: Any) -> None:
    _, network, _, x, y = small
    broken = x.clone()
    broken[3, 1] = torch.nan
    with pytest.raises(DataError, match="x: NaN or infinity in the input"):
        observe(network, [({"x": broken}, y)], [need])

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = Small()

        def forward(self, x: Tensor) -> Tensor:
            return self.small.fc2(torch.sqrt(self.small.fc1(x)))

    with pytest.raises(DataError, match="sqrt: NaN or infinity in the output of sqrt"):
        observe(Network(Root(), {"x": x[:2]}, "root"), [({"x": x}, y)], [need])


def test_gradients_that_are_not_finite_are_named() -> None:
    """The square root of 0² is 0, its derivative is not a number."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(5, 4, bias=False), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(torch.sqrt(self.fc1(x).square()))

    x, y = torch.zeros(8, 5), torch.zeros(8, dtype=torch.long)
    with pytest.raises(DataError, match=r"the gradient of fc1.weight: NaN or infinity"):
        observe(Network(Root(), {"x": x[:2]}, "root"), [({"x": x}, y)], ["gradients"])


def test_a_fixed_batch_size() -> None:
    """Networks whose batch size is fixed take batches of that size; single examples cannot be told apart in every one."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(F.relu(self.fc1(x.reshape(2, 4))))

    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    network = Network(Fixed(), {"x": x[:2]}, "fixed")
    assert not network.traced.batched
    found = observe(network, [{"x": part} for part in x.split(2)], ["activations", "gates"])
    assert found.examples == 8
    with pytest.raises(DataError, match="batch size is fixed at 2, the data come in batches of 4"):
        observe(network, [{"x": x[:4]}], ["activations"])
    with pytest.raises(InputError, match="gradients of single examples are needed"):
        observe(network, [{"x": x[:2]}], ["squares"])


def test_sequences_of_several_lengths() -> None:
    """Batches of other lengths are not joined."""
    network, _ = prepared("lstm")
    generator = torch.Generator().manual_seed(0)
    long, short = (torch.randn(4, n, 6, generator=generator) for n in (7, 7))
    both = observe(network, [{"x": long}, {"x": short}], ["activations"])
    whole = observe(network, [{"x": torch.cat([long, short])}], ["activations"])
    assert both.examples == whole.examples == 8
    tokens = prepared("encoder")[0]
    batches = []
    for length in (7, 5):
        data = inputs("encoder", 3)
        batches.append({key: value[:, :length] for key, value in data.items()})
    found = observe(tokens, batches, ["activations", "gates"])
    assert found.examples == 6


def test_a_function_of_the_users(small: Any) -> None:
    _, network, group, x, _ = small
    called: list[tuple[str, int]] = []

    def last_first(own: Network, one: Group) -> list[float]:
        called.append((own.name, one.size))
        return [float(one.size - i) for i in range(one.size)]

    criterion = as_criterion(last_first)
    close(of(criterion, network, group, x), torch.arange(6.0, 0, -1))
    assert called == [("small", 6)]
    assert Function(lambda *_: None).scores(network, [group]) == {}
    bad: list[tuple[Any, str]] = [
        (torch.ones(5), r"fc1: the criterion .* gives scores of shape \(5,\), \(6,\) is needed"),
        (torch.ones(6, 1), r"shape \(6, 1\)"),
        ([1, 2, math.nan, 4, 5, 6], "fc1: .* gives nan for channel 2; finite numbers"),
        ([1, -2, 3, 4, 5, 6], "fc1: .* gives -2.0 for channel 1"),
        ("scores", "fc1: .* gives str, 6 numbers are needed"),
    ]
    for value, message in bad:
        with pytest.raises(InputError, match=message):
            Function(lambda *_, value=value: value).scores(network, [group])
    with pytest.raises(InputError, match="is not a function"):
        Function("magnitude")  # type: ignore[arg-type]


def test_names_of_criteria() -> None:
    assert as_criterion(None) == as_criterion("magnitude") == Magnitude()
    assert as_criterion("obs") == OBS()
    assert as_criterion(Random(seed=3)) == Random(seed=3)
    with pytest.raises(InputError, match="did you mean taylor"):
        as_criterion("tailor")
    with pytest.raises(InputError, match=r"criterion Taylor: a class; write Taylor\(\)"):
        as_criterion(Taylor)
    with pytest.raises(InputError, match="or a function"):
        as_criterion(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="bins=1"):
        WeightEntropy(bins=1)
    with pytest.raises(InputError, match="ridge=0"):
        OBS(ridge=0)
    for kind in KINDS.values():
        assert kind.needs <= NEEDS.keys() and kind.weight_needs <= NEEDS.keys()
