"""Corrections around quantization: the float function stays, ranges become equal, errors fall on examples that nothing was fitted to."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tinier
from tinier.edits.assign import Assign, Fold
from tinier.edits.base import Plan, Values
from tinier.edits.quantize import QuantizeWeight
from tinier.errors import InputError
from tinier.graph.fold import fold, read
from tinier.graph.rescale import sites
from tinier.graph.walk import Walk, outputs_of
from tinier.methods.bias_correction import BiasCorrection, correct_biases
from tinier.methods.cross_layer_equalization import CrossLayerEqualization
from tinier.methods.norm_statistics import reestimate_norms
from tinier.methods.quantization import Quantization
from tinier.methods.sampled import spread
from tinier.methods.smooth_quant import SmoothQuant
from tinier.network import Network
from tinier.statistics import Statistics, collect, observe


class Chain(nn.Module):
    """Convolution, depthwise convolution, convolution, then pooling, flatten and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.c = nn.Conv2d(8, 6, 1)
        self.d = nn.Linear(6 * 4, 10)
        self.e = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.b(F.relu(self.a(x))), 0.1)
        x = F.max_pool2d(F.relu(self.c(x)), 4)
        return self.e(F.relu(self.d(x.flatten(1))))


class Clamped(nn.Module):
    """ReLU6 between layers: what the second depthwise layer gives cannot reach 6 in half of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3)
        self.b = nn.Conv2d(6, 6, 3, groups=6)
        self.c = nn.Conv2d(6, 4, 1)
        with torch.no_grad():
            self.b.weight.mul_(0.02)
            self.b.weight[3:].mul_(200)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu6(self.b(F.relu6(self.a(x)))))


class Attention(nn.Module):
    """A pre-norm block of attention with grouped heads, and a gated FFN behind an RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.o = nn.Linear(16, 16)
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        batch, length = x.shape[:2]
        q, k, v = (
            one(y).view(batch, length, -1, 4).transpose(1, 2) for one in (self.q, self.k, self.v)
        )
        k, v = (
            one[:, :, None].expand(batch, 2, 2, length, 4).reshape(batch, 4, length, 4)
            for one in (k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, 16)
        x = x + self.o(y)
        y = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Late(nn.Module):
    """A batch norm that cannot be folded: the sum before it has two makers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.c = nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.norm(self.a(x) + self.b(x))))


def network(module: nn.Module, *shape: int) -> Network:
    name = "input" if isinstance(module, nn.Linear | nn.Sequential) else "x"
    return Network(module.eval(), {name: torch.randn(2, *shape)})


def made(kind: type[nn.Module], *shape: int, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return network(kind(), *shape)


def uneven(net: Network, seed: int = 3) -> Network:
    """With weights whose rows differ by up to a factor of about 50."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.module.parameters():
            if parameter.ndim > 1:
                factors = torch.randn(len(parameter), generator=generator).exp()
                parameter.mul_(factors.reshape(-1, *[1] * (parameter.ndim - 1)))
    return net


def folded(net: Network) -> Network:
    return Plan((Fold(),)).apply(net)


def data(*shape: int, count: int = 4, size: int = 16, seed: int = 7) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(size, *shape, generator=generator)} for _ in range(count)]


def samples(batches: list[dict[str, Tensor]]) -> Statistics:
    return Statistics({}, sum(len(b["x"]) for b in batches), samples=tuple(batches))


def same(one: Network, two: Network, batches: list[dict[str, Tensor]]) -> None:
    for batch in batches:
        for a, b in zip(one(batch), two(batch), strict=True):
            assert (a - b).norm() <= 1e-5 * a.norm()


def error(one: Network, two: Network, batches: list[dict[str, Tensor]]) -> float:
    pairs = [(one(batch)[0], two(batch)[0]) for batch in batches]
    wrong = sum(float((a - b).square().sum()) for a, b in pairs)
    return (wrong / sum(float(a.square().sum()) for a, _ in pairs)) ** 0.5


# Where scales can move


def test_sites_are_found_through_pooling_attention_and_products() -> None:
    chain = fold(made(Chain, 3, 8, 8).traced.module)
    assert [site.name for site in sites(chain)] == ["a.weight", "b.weight", "c.weight", "d.weight"]
    # Each of the 6 channels of c is 4 neighbouring inputs of d.
    assert sites(chain)[2].readers[0].channels.tolist() == [i // 4 for i in range(24)]
    attention = {s.name: s for s in sites(fold(made(Attention, 5, 16).traced.module))}
    readers = {n: [r.layer.weight for r in s.readers] for n, s in attention.items()}
    assert readers == {
        "norm.weight": ["q.weight", "k.weight", "v.weight"],
        "v.weight": ["o.weight"],
        "weight": ["gate.weight", "up.weight"],
        "up.weight": ["down.weight"],
    }
    # Two query heads read each of the two value heads.
    channels = attention["v.weight"].readers[0].channels.tolist()
    assert channels == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]


@pytest.mark.parametrize("what", ["tied", "output", "sum", "gelu"])
def test_scales_do_not_move_where_something_else_sees_them(what: str) -> None:
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            if what == "tied":
                self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.a(x)
            z = F.gelu(y) if what == "gelu" else F.relu(y)
            z = z + x if what == "sum" else z
            return (self.b(z), z) if what == "output" else (self.b(z),)

    assert sites(fold(made(Seen, 6).traced.module)) == []


@pytest.mark.parametrize(
    "kind, shape", [(Chain, (3, 8, 8)), (Attention, (5, 16)), (Clamped, (3, 8, 8))]
)
def test_any_factors_leave_the_function_as_it_is(
    kind: type[nn.Module], shape: tuple[int, ...]
) -> None:
    net = folded(made(kind, *shape))
    module = fold(net.traced.module)
    tensors = {name: value.detach().double() for name, value in module.named_parameters()}
    for site in sites(module):
        factors = torch.rand(site.size, dtype=torch.float64).mul(3).exp()
        site.rescale(tensors, site.allowed(tensors, factors))
    edits = [Assign(name, Values(value.float())) for name, value in tensors.items()]
    same(net, Plan(tuple(edits)).apply(net), data(*shape))


# Cross-layer equalization


def test_equalization_makes_ranges_equal_and_keeps_the_function() -> None:
    net = folded(uneven(made(Chain, 3, 8, 8)))
    plan = CrossLayerEqualization().plan(net)
    result = plan.apply(net)
    same(net, result, data(3, 8, 8))
    state = dict(result.module.named_parameters())
    a, b, c = (state[f"{n}.weight"].abs().flatten(1) for n in "abc")
    assert torch.allclose(a.amax(1), b.amax(1), rtol=1e-2)
    assert torch.allclose(b.amax(1), c.amax(0), rtol=1e-2)
    inputs = state["d.weight"].abs().amax(0).reshape(6, 4).amax(1)
    assert torch.allclose(c.amax(1), inputs, rtol=1e-2)
    # It is done: a second time moves nothing by more than the tolerance.
    again = CrossLayerEqualization().plan(result).apply(result)
    for name, value in again.module.named_parameters():
        assert torch.allclose(value, state[name], rtol=1e-2)
    # By hand, for one pair: r = √(r¹ r²) in both layers.
    pair = folded(
        network(nn.Sequential(nn.Linear(2, 1, False), nn.ReLU(), nn.Linear(1, 1, False)), 2)
    )
    with torch.no_grad():
        first, last = pair.module.get_parameter("0.weight"), pair.module.get_parameter("2.weight")
        first.copy_(torch.tensor([[8.0, -2.0]]))
        last.copy_(torch.tensor([[0.5]]))
    edits = {e.tensor: e.values.tensor for e in CrossLayerEqualization().plan(pair).edits}  # type: ignore[attr-defined]
    assert torch.allclose(edits["0.weight"], torch.tensor([[2.0, -0.5]]))
    assert torch.allclose(edits["2.weight"], torch.tensor([[2.0]]))


def test_equalization_helps_where_one_scale_is_for_all_channels() -> None:
    net, batches = folded(uneven(made(Chain, 3, 8, 8))), data(3, 8, 8)
    equal = CrossLayerEqualization().plan(net).apply(net)
    method = Quantization(per_tensor=True, ranges="minmax")
    plain = method.plan(net, collect(net, batches)).apply(net)
    better = method.plan(equal, collect(equal, batches)).apply(equal)
    unseen = data(3, 8, 8, seed=8)
    assert error(net, better, unseen) < 0.7 * error(net, plain, unseen)


def test_a_clamp_lets_only_channels_pass_that_never_reach_it() -> None:
    net = folded(made(Clamped, 3, 8, 8))
    plan = CrossLayerEqualization().plan(net)
    result = plan.apply(net)
    before, after = (dict(n.module.named_parameters()) for n in (net, result))
    assert torch.equal(before["a.weight"], after["a.weight"])  # its input has no bounds
    moved = (before["b.weight"] != after["b.weight"]).flatten(1).any(1)
    assert moved.tolist() == [True] * 3 + [False] * 3
    large = [{"x": 100 * batch["x"]} for batch in data(3, 8, 8)]  # reaches the bounds
    same(net, result, large)


def test_absorbed_biases_change_nothing_where_values_stay_above_them() -> None:
    layers = (nn.Linear(4, 4), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, False))
    net = folded(network(nn.Sequential(*layers), 4))
    with torch.no_grad():
        net.module.get_parameter("1.bias").fill_(20.0)
    batches = [{"input": 0.3 * batch["x"]} for batch in data(4)]
    method = CrossLayerEqualization(absorb=True)
    with pytest.raises(InputError, match="gram"):
        method.plan(net)
    plan = method.plan(net, observe(net, batches, method.needs))
    result = plan.apply(net)
    # 3 standard deviations are left; inputs nearer to 0 than the examples never come below.
    near = [{name: 0.3 * value for name, value in b.items()} for b in batches]
    same(net, result, near)
    values = {e.tensor: e.values.tensor for e in plan.edits if isinstance(e, Assign)}
    equal = {e.tensor: e for e in CrossLayerEqualization().plan(net).edits if isinstance(e, Assign)}
    assert float(values["1.bias"].max()) < 0.2 * float(equal["1.bias"].values.tensor.max())
    assert Plan.from_json(plan.to_json()) == plan


# SmoothQuant


def outliers(size: float) -> tuple[Network, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """A norm with two channels ``size`` times as large as the others, before two linear layers."""

    class Outliers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(32)
            self.a, self.b = nn.Linear(32, 16), nn.Linear(32, 16)
            with torch.no_grad():
                self.norm.weight[[3, 17]] *= size
                self.a.weight[:, [3, 17]] /= size
                self.b.weight[:, [3, 17]] /= size

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.a(x) * self.b(x)

    return folded(made(Outliers, 6, 32)), data(6, 32), data(6, 32, seed=8)


def test_an_outlier_channel_is_smoothed_and_the_function_stays() -> None:
    net, batches, unseen = outliers(60.0)
    plan = SmoothQuant(ranges="minmax").plan(net, samples(batches))
    assert {e.tensor for e in plan.edits if isinstance(e, Assign)} == {
        "norm.weight",
        "norm.bias",
        "a.weight",
        "b.weight",
    }
    result = plan.apply(net)
    same(net, result, unseen)
    scales = result.module.get_parameter("norm.weight").detach().abs()
    rest = torch.ones(32, dtype=torch.bool)
    rest[[3, 17]] = False
    assert float(scales[~rest].max() / scales[rest].median()) < 20  # of 60
    method = Quantization(ranges="minmax")
    plain = method.plan(net, collect(net, batches)).apply(net)
    smooth = method.plan(result, collect(result, batches)).apply(result)
    assert error(net, smooth, unseen) < 0.5 * error(net, plain, unseen)
    assert Plan.from_json(plan.to_json()) == plan


def test_without_outliers_nothing_is_smoothed() -> None:
    net, batches, _ = outliers(1.0)
    assert SmoothQuant().plan(net, samples(batches)).edits == ()


def test_what_nothing_can_take_up_is_listed() -> None:
    net = folded(made(Attention, 5, 16))
    plan, notes = SmoothQuant().decide(net, samples(data(5, 16)))
    same(net, plan.apply(net), data(5, 16, seed=9))
    assert notes == ()
    chain = folded(made(Chain, 3, 8, 8))
    _, notes = SmoothQuant().decide(chain, samples(data(3, 8, 8)))
    assert notes == ("nothing takes up a scale before a.weight: not smoothed",)
    with pytest.raises(InputError, match="samples"):
        SmoothQuant().plan(chain)
    with pytest.raises(InputError, match="between 0 and 1"):
        SmoothQuant(alphas=(1.0,))


# Bias correction


def shifted(net: Network, name: str, by: float) -> Plan:
    """A plan that stores a weight as integers that are all ``by`` steps too large."""
    weight = read(fold(net.traced.module), name)
    assert weight is not None
    scale = weight.detach().abs().amax(1, keepdim=True) / 100
    integers = ((weight.detach() / scale).round() + by).to(torch.int8)
    zero = torch.zeros(len(weight), 1, dtype=torch.int64)
    return Plan(
        (QuantizeWeight(name, Values(scale), Values(zero), -127, 127, integers=Values(integers)),)
    )


@pytest.mark.parametrize("bias", [True, False])
def test_a_known_shift_is_taken_off_in_closed_form(bias: bool) -> None:
    net = folded(network(nn.Linear(8, 4, bias), 8))
    name = next(iter(net.example))
    weight = net.module.get_parameter("weight").detach()
    torch.manual_seed(1)
    x = torch.randn(64, 8) * 0.1 + 1
    plan = shifted(net, "weight", 3)
    result = correct_biases(net, plan, [{name: x}])
    assert [edit.kind for edit in result.edits] == ["assign", "quantize_weight"]
    first = result.edits[0]
    assert isinstance(first, Assign)
    scale = weight.abs().amax(1, keepdim=True) / 100
    moved = ((weight / scale).round() + 3) * scale - weight
    old = net.module.get_parameter("bias").detach() if bias else torch.zeros(4)
    assert torch.allclose(first.values.tensor, old - moved @ x.mean(0), atol=1e-5)
    assert first.reader == ("" if bias else "weight")
    # The same from the original network, behind the fold, and from a file.
    original = Network(net.module, net.example)
    whole = Plan.from_json((Plan((Fold(),)) + result).to_json())
    y = whole.apply(original)({name: x})[0]
    assert torch.allclose(y.mean(0), net({name: x})[0].mean(0), atol=1e-5)


def test_behind_a_relu_it_is_the_error_of_what_the_relu_lets_through() -> None:
    net = folded(network(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)), 8))
    name = next(iter(net.example))
    torch.manual_seed(1)
    x = torch.randn(256, 8)
    plan = shifted(net, "0.weight", 2)
    result = correct_biases(net, plan, [{name: x}], most=256)
    bias = {e.tensor: e.values.tensor for e in result.edits if isinstance(e, Assign)}["0.bias"]
    weight = plan.edits[0].grid.dequantize(plan.edits[0].integers.tensor)  # type: ignore[attr-defined]
    want = F.relu(
        F.linear(x, *(net.module.get_parameter(f"0.{n}").detach() for n in ("weight", "bias")))
    )
    z = x @ weight.T

    def wrong(b: Tensor) -> Tensor:
        return (want - F.relu(z + b)).square().sum(0)

    for step in (-0.01, 0.01):
        assert bool((wrong(bias) <= wrong(bias + step) * (1 + 1e-3)).all())


def test_corrected_networks_are_nearer_on_unseen_examples() -> None:
    net, batches = folded(uneven(made(Chain, 3, 8, 8))), data(3, 8, 8)
    plan = Quantization(bits=4).plan(net, collect(net, batches))
    result = correct_biases(net, plan, batches)
    unseen = data(3, 8, 8, seed=8)
    assert len(result.edits) > len(plan.edits)
    assert error(net, result.apply(net), unseen) < error(net, plan.apply(net), unseen)
    # The method is the same; corrections before it stay in front.
    method = BiasCorrection(quantized=plan)
    assert method.plan(net, samples(batches)) == result
    equal = CrossLayerEqualization().plan(net)
    other = equal.apply(net)
    behind = correct_biases(
        net, equal + Quantization(bits=4).plan(other, collect(other, batches)), batches
    )
    assert behind.edits[: len(equal.edits)] == equal.edits
    assert error(net, behind.apply(net), unseen) < error(net, plan.apply(net), unseen)


def test_layers_behind_large_values_see_more_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(128, 4))
    net, batches = folded(network(nn.Sequential(*parts), 3, 18, 18)), data(3, 18, 18, count=6)
    batches = [{next(iter(net.example)): batch["x"]} for batch in batches]
    plan = Quantization(bits=3, activations=None).plan(net)
    grown = []
    add = Walk.add

    def noted(walk: Walk, more: Sequence[Sequence[Tensor]]) -> None:
        grown.append(sum(len(batch[0]) for batch in more))
        add(walk, more)

    monkeypatch.setattr(Walk, "add", noted)
    whole = correct_biases(net, plan, batches)
    assert not grown
    # Of 8 · 16 · 16 values an example, 24 have room in both graphs, of 128 values all.
    monkeypatch.setattr("tinier.methods.bias_correction.MEMORY", 2 * 24 * 8 * 16 * 16 * 4)
    result = correct_biases(net, plan, batches)
    assert grown and sum(grown) == 2 * (96 - 16)  # batches of 16, in two graphs
    x = torch.cat([next(iter(batch.values())) for batch in batches])
    inputs_of = {next(iter(net.example)): x}
    wanted = net(inputs_of)[0].mean(0)
    left = (result.apply(net)(inputs_of)[0].mean(0) - wanted).abs()
    was = (plan.apply(net)(inputs_of)[0].mean(0) - wanted).abs()
    last = {e.tensor: e.values.tensor for e in result.edits if isinstance(e, Assign)}["4.bias"]
    old = read(fold(net.traced.module), "4.bias")
    assert old is not None
    moved = last.ne(old)
    # The last layer's bias makes the mean of all 96 right, whatever the first one's is.
    assert bool(moved.any())
    assert bool((left[moved] < 1e-5).all()) and bool((was[moved] > 1e-3).all())
    assert error(net, result.apply(net), batches) < 1.1 * error(net, whole.apply(net), batches)


def test_nothing_is_corrected_that_is_not_wrong_or_cannot_be_checked() -> None:
    net, batches = folded(made(Chain, 3, 8, 8)), data(3, 8, 8)
    assert correct_biases(net, Plan(), batches) == Plan()
    plan = Quantization(bits=4).plan(net, collect(net, batches))
    assert correct_biases(net, plan, data(3, 8, 8, count=1, size=1)) == plan


def test_a_norm_that_cannot_be_folded_gets_statistics_of_its_quantized_input() -> None:
    net, batches = made(Late, 3, 8, 8), data(3, 8, 8)
    net.module.train()
    for batch in batches:
        net.module(batch["x"])
    net = folded(Network(net.module.eval(), net.example))
    plan = Quantization(bits=3, activations=None).plan(net)  # biases stay float
    result = correct_biases(net, plan, batches)
    found = {e.tensor: e.values.tensor for e in result.edits if isinstance(e, Assign)}
    assert {"norm.running_mean", "norm.running_var"} <= found.keys()
    # What the norm gives has the mean and deviation of the float network's.
    module = fold(net.traced.module)
    quantized = result.apply(net).module
    inputs = [[batch["x"]] for batch in batches]
    wanted, got = (
        torch.cat([values[0] for values in outputs_of(_until(one, "batch_norm"), inputs)])
        for one in (module, quantized)
    )
    assert torch.allclose(wanted.mean((0, 2, 3)), got.mean((0, 2, 3)), atol=2e-3)
    assert torch.allclose(wanted.std((0, 2, 3)), got.std((0, 2, 3)), rtol=2e-3)
    without = correct_biases(net, plan, batches, norms=False)
    assert not any(e.tensor.startswith("norm.") for e in without.edits if isinstance(e, Assign))


def _until(module: nn.Module, name: str) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    known: dict[torch.fx.Node, torch.fx.Node] = {}
    assert isinstance(module, torch.fx.GraphModule)
    for node in module.graph.nodes:
        known[node] = graph.node_copy(node, known.__getitem__)
        if node.name == name:
            graph.output((known[node],))
            return torch.fx.GraphModule(module, graph)
    raise AssertionError(name)


def test_norms_are_estimated_again_each_behind_those_before_it() -> None:
    torch.manual_seed(0)
    first, second = nn.BatchNorm2d(4), nn.BatchNorm2d(5)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), first, nn.ReLU(), nn.Conv2d(4, 5, 3), second)
    net = network(module, 3, 8, 8)
    batches = [{"input": batch["x"]} for batch in data(3, 8, 8)]
    found = reestimate_norms(net, batches).module
    assert torch.equal(first.get_buffer("running_mean"), torch.zeros(4))  # left as it is
    x = torch.cat([batch["input"] for batch in batches])
    with torch.no_grad():
        for index in (1, 4):
            y = found[:index](x)  # type: ignore[index, operator]
            mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3))
            assert torch.allclose(found.get_buffer(f"{index}.running_mean"), mean, atol=1e-5)
            assert torch.allclose(found.get_buffer(f"{index}.running_var"), variance, rtol=1e-5)


# The verb


def test_quantize_corrects_by_default_and_its_plan_reproduces_it() -> None:
    net = made(Chain, 3, 8, 8)
    batches = data(3, 8, 8)
    x = torch.cat([batch["x"] for batch in batches])
    plain = tinier.quantize(net, data={"x": x}, bits=4, corrections=())
    assert not any(isinstance(edit, Assign) for edit in plain.plan.edits)
    better = tinier.quantize(net, data={"x": x}, bits=4)
    assert any(isinstance(edit, Assign) for edit in better.plan.edits)
    unseen = data(3, 8, 8, seed=8)
    assert error(net, better.network, unseen) < error(net, plain.network, unseen)
    asked = ("bias_correction", "cross_layer_equalization")
    other = tinier.quantize(net, data={"x": x}, bits=4, corrections=asked)
    assert error(net, other.network, unseen) < error(net, plain.network, unseen)
    for found in (better, other):
        again = Plan.from_json(found.plan.to_json()).apply(net)
        for batch in unseen:
            assert torch.equal(again(batch)[0], found.network(batch)[0])
    alone = tinier.quantize(net, bits=4, activations=None)
    assert not any(isinstance(edit, Assign) for edit in alone.plan.edits)


def test_corrections_that_cannot_be_made_are_refused() -> None:
    net, x = made(Chain, 3, 8, 8), data(3, 8, 8)[0]["x"]
    with pytest.raises(InputError, match="'equal' is unknown; there are cross_layer_equalization"):
        tinier.quantize(net, data={"x": x}, corrections=("equal",))
    with pytest.raises(InputError, match="stay float"):
        tinier.quantize(net, data={"x": x}, activations=None, corrections="smooth_quant")
    with pytest.raises(InputError, match="needs data"):
        tinier.quantize(net, activations=None, corrections=["bias_correction"])
    same_scales = tinier.quantize(net, activations=None, corrections=["cross_layer_equalization"])
    assert any(isinstance(edit, Assign) for edit in same_scales.plan.edits)


def test_examples_are_spread_over_all_batches() -> None:
    batches = [{"x": torch.arange(10.0)}, {"x": torch.arange(10.0, 15.0)}]
    network = made(Chain, 3, 8, 8)
    found = torch.cat([b["x"] for b in spread(network, batches, 5)])
    assert found.tolist() == [0.0, 3.0, 6.0, 9.0, 12.0]
