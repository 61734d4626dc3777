"""Learned rounding: against every rounding of a small layer, what it promises, and where the graph is cut."""

from itertools import product

import pytest
import torch
from torch import Tensor, fx, nn

import tinier
from networks import build, inputs
from test_quantization import Inverted, own
from tinier.edits.assign import Fold
from tinier.edits.base import Plan
from tinier.edits.fake_quantize import trainable
from tinier.edits.quantize import Quantize, QuantizeWeight
from tinier.errors import DataError, InputError
from tinier.methods.quantization import Quantization
from tinier.modules.fake_quantize import WeightQuantizer
from tinier.network import Network
from tinier.recovery.rounding import learn_rounding
from tinier.recovery.segments import Cuts, Runner
from tinier.statistics import collect
from tinier.tensors.saturation import PAIR_LIMIT, pair_sums
from toy import TinyCNN, images, trained

Data = list[dict[str, Tensor]]


def folded(network: Network) -> Network:
    return Plan((Fold(),)).apply(network)


def planned(network: Network, data: Data, **options: object) -> Plan:
    method = Quantization(**options)  # type: ignore[arg-type]
    return method.plan(network, collect(network, data) if method.activations else None)


def toy() -> tuple[Network, Data]:
    x = images(128, 2)[0]
    return folded(Network(trained(TinyCNN), {"x": x[:2]})), [{"x": part} for part in x.split(64)]


def far(network: Network, original: Network, data: Data) -> float:
    whole = {"x": torch.cat([batch["x"] for batch in data])}
    wanted = original(whole)[0]
    return float((network(whole)[0] - wanted).square().sum() / wanted.square().sum())


def weights_of(plan: Plan) -> list[QuantizeWeight]:
    return [edit for edit in plan.edits if isinstance(edit, QuantizeWeight)]


# Cuts


@pytest.mark.parametrize("name", ["residual_cnn", "inverted", "encoder", "unet", "lstm", "experts"])
def test_stretch_by_stretch_is_the_whole(name: str) -> None:
    """Both the segments and all outputs of the graph: values that are kept at the cuts are enough."""
    network, data = (
        own(Inverted, 3, 12, 12)
        if name == "inverted"
        else (build(name), [inputs(name, 8, seed) for seed in (10, 11)])
    )
    network = folded(network)
    student = trainable(network, planned(network, data))
    module = student.module
    assert isinstance(module, fx.GraphModule)
    calls = module.graph.find_nodes(op="call_module")
    weights = [n for n in calls if isinstance(module.get_submodule(str(n.target)), WeightQuantizer)]
    cuts = Cuts(module, weights)
    segments = cuts.segments(1)
    assert [w for s in segments for w in s.weights] or name == "lstm"
    placeholders = module.graph.find_nodes(op="placeholder")
    values = {node: data[0][str(node.target)] for node in placeholders}
    runner = Runner(module)
    with torch.no_grad():
        for segment in segments:
            values = runner.run_stretch(segment.nodes, values)
            end = cuts.order[segment.nodes[-1]]
            values = {n: v for n, v in values.items() if cuts.last.get(n, -1) > end}
    expected = student(data[0])
    found = [values[node] for node in cuts.output.all_input_nodes]
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_residual_blocks_are_found() -> None:
    network, data = own(Inverted, 3, 12, 12)
    network = folded(network)
    module = trainable(network, planned(network, data)).module
    assert isinstance(module, fx.GraphModule)
    calls = module.graph.find_nodes(op="call_module")
    weights = [n for n in calls if isinstance(module.get_submodule(str(n.target)), WeightQuantizer)]
    cuts = Cuts(module, weights)
    # The stem, the inverted residual, the head; within the residual nothing can be cut.
    found = [[str(w.args[0]) for w in s.weights] for s in cuts.segments(1)]
    assert [len(names) for names in found if names] == [1, 3, 1]
    assert max(len(segment.weights) for segment in cuts.segments(4)) == 4
    (block,) = [s for s in cuts.segments(1) if len(s.weights) == 3]
    assert [len(layer.weights) for layer in cuts.layers(block)] == [1, 1, 1]


# The rounding


@pytest.mark.parametrize("seed", [2, 3, 9])
def test_as_good_as_the_best_of_all_roundings(seed: int) -> None:
    """Inputs that are nearly one, and eight weights: nearly the best of 256 roundings, far below nearest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 1, generator=generator) + 0.3 * torch.randn(256, 8, generator=generator)
    layer = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(1, 8, generator=generator))
    network, data = folded(Network(layer, {"input": x[:2]})), [{"input": x}]
    plan = planned(network, data, bits=4, activations=None)
    learned = learn_rounding(network, plan, data, steps=300, batch=64).plan
    weight, gram = layer.weight.detach().double(), (x.T @ x).double()

    def error(edit: QuantizeWeight, q: Tensor) -> float:
        e = edit.grid.dequantize(q).double() - weight
        return float(e @ gram @ e.T)

    (before,), (after,) = weights_of(plan), weights_of(learned)
    floor = (weight / before.scale.tensor).floor()
    every = [
        (floor + torch.tensor(up)).clamp(before.low, before.high)
        for up in product((0, 1), repeat=8)
    ]
    best = min(error(before, q) for q in every)
    nearest = error(before, before.matrix(layer.weight))
    assert after.integers is not None
    found = error(after, after.integers.tensor)
    assert bool(
        ((after.integers.tensor - floor) >= 0).all()
        and ((after.integers.tensor - floor) <= 1).all()
    )
    assert best < 0.7 * nearest
    assert best <= found <= best + 0.1 * (nearest - best)


@pytest.mark.parametrize("blocks", [False, True])
def test_no_stretch_is_worse_and_the_network_is_better(blocks: bool) -> None:
    network, data = toy()
    plan = planned(network, data, bits=2, activations=8, layers=(("fc", 8),))
    learned = learn_rounding(network, plan, data, blocks=blocks, steps=100)
    assert len(learned.errors) == (1 if blocks else 3)
    assert all(after <= before for before, after in learned.errors.values())
    ratio = far(learned.plan.apply(network), network, data) / far(
        plan.apply(network), network, data
    )
    assert ratio < 2 / 3
    again = learn_rounding(network, plan, data, blocks=blocks, steps=100)
    assert again.plan == learned.plan == Plan.from_json(learned.plan.to_json())
    for before, after in zip(weights_of(plan), weights_of(learned.plan), strict=True):
        assert (before.scale, before.zero_point) == (after.scale, after.zero_point)
    # What was measured is what the plan's simulation does.
    if blocks:
        ((_, measured),) = learned.errors.values()
        assert far(learned.plan.apply(network), network, data) == pytest.approx(measured, rel=0.02)
    scales = {e.tensor: e.scale for e in plan.edits if isinstance(e, Quantize)}
    moved = [e.scale != scales[e.tensor] for e in learned.plan.edits if isinstance(e, Quantize)]
    assert any(moved)


def test_where_nothing_can_be_gained_the_integers_stay() -> None:
    """Independent inputs of equal size: nearest is the best."""
    layer = nn.Linear(8, 4, bias=False)
    network = folded(Network(layer, {"input": torch.eye(8)[:2]}))
    plan = planned(network, [], bits=4, activations=None)
    learned = learn_rounding(network, plan, [{"input": torch.eye(8)}], steps=20)
    (edit,), (before,) = weights_of(learned.plan), weights_of(plan)
    assert torch.equal(edit.matrix(layer.weight), before.matrix(layer.weight))
    ((first, last),) = learned.errors.values()
    assert last == first


def test_few_examples_fit_and_bad_arguments() -> None:
    network, data = toy()
    plan = planned(network, data, bits=4)
    learned = learn_rounding(network, plan, data, steps=1, memory=1)
    assert any("rounding was learned on 8 examples" in note for note in learned.notes)
    with pytest.raises(InputError, match="drop=2"):
        learn_rounding(network, plan, data, drop=2)
    with pytest.raises(DataError, match="no examples"):
        learn_rounding(network, plan, [])


def test_no_sum_saturates_afterwards() -> None:
    network, data = toy()
    plan = planned(network, data, bits=8, saturation_free=True)
    learned = learn_rounding(network, plan, data, steps=20, saturation_free=True).plan
    assert any(edit.integers is not None for edit in weights_of(learned))
    for value in learned.apply(network).module.state_dict().values():
        if value.dtype == torch.int8:
            assert int(pair_sums(value).max()) <= PAIR_LIMIT


@pytest.mark.parametrize("name", ["residual_cnn", "encoder", "lstm", "experts", "vae"])
def test_every_kind_of_network(name: str) -> None:
    network, data = folded(build(name)), [inputs(name, 8, seed) for seed in (10, 11)]
    for blocks in (False, True):
        plan = planned(network, data, bits=4)
        learned = learn_rounding(network, plan, data, blocks=blocks, steps=3)
        assert learned.errors
        learned.plan.apply(network)


def test_the_verb_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, _) = trained(TinyCNN), images(128, 2)
    nearest = tinier.quantize(model, (x[:2],), x, bits=2, activations=None)
    network = Network(model, {"x": x[:2]})
    before = far(nearest.network, network, [{"x": x}])
    for rounding in ("learned", "learned_blocks"):
        result = tinier.quantize(model, (x[:2],), x, bits=2, activations=None, rounding=rounding)
        assert far(result.network, network, [{"x": x}]) < before / 2
        assert "rounding chosen" in str(result.plan)
    with pytest.raises(InputError, match="learned_blocks are known"):
        tinier.quantize(model, (x[:2],), x, rounding="best")
    with pytest.raises(InputError, match="needs data"):
        tinier.quantize(model, (x[:2],), activations=None, bits=4, rounding="learned")
