"""The loss of a quantized network by layer and cause, where the answer is known."""

import pytest
import torch
from torch import nn

import tinier
from tinier.edits.base import Plan, Values
from tinier.edits.quantize import Quantize, QuantizeDynamically, QuantizeWeight
from tinier.errors import InputError
from tinier.graph.fold import fold
from tinier.graph.rerun import Rerun
from tinier.measure.attribution import Attribution, attribute, outputs_loss, restored_losses
from tinier.network import Network


def network(weight: list[list[float]]) -> Network:
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
    return Network(nn.Sequential(layer, nn.ReLU()), {"input": torch.randn(4, 2)})


def weight_edit(scale: float, high: int) -> QuantizeWeight:
    zero = Values(torch.zeros(1, 1, dtype=torch.int64))
    return QuantizeWeight("0.weight", Values(torch.full((1, 1), scale)), zero, -high, high)


def losses(found: Attribution) -> list[float]:
    (row,) = found.layers
    return [*row.causes.values()]


DATA = [{"input": torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.5, 4.0], [2.0, 2.0]])}]


def test_weights_on_the_grid_lose_nothing_and_clipped_ones_only_by_clipping() -> None:
    net = network([[1.0, 2.0], [3.0, 0.5]])
    exact = attribute(net, Plan((weight_edit(0.5, 127),)), DATA)
    assert exact.total == 0 and losses(exact) == [0, 0, 0, 0]
    clipped = attribute(net, Plan((weight_edit(0.5, 4),)), DATA)  # 3 becomes 2
    # By hand: the second output is 2 x0 + 0.5 x1 in place of 3 x0 + 0.5 x1.
    x = DATA[0]["input"]
    wanted = x @ torch.tensor([[1.0, 3.0], [2.0, 0.5]])
    expected = x[:, 0].square().sum() / 8 / wanted.double().var()
    assert losses(clipped) == pytest.approx([0, float(expected), 0, 0])
    (row,) = clipped.layers
    assert row.alone == row.restored == pytest.approx(clipped.total)
    assert row.layer == "0" and row.operator == "linear"


def test_rounding_and_clipping_of_activations() -> None:
    net = network([[1.0, 0.0], [0.0, 1.0]])
    name = next(n.name for n in fold(net.traced.module).graph.nodes if n.op == "placeholder")
    whole = attribute(net, Plan((Quantize(name, 1.0, 0, 0, 15),)), DATA)  # 0.5 becomes 0
    variance = float(DATA[0]["input"].double().var())
    assert losses(whole) == pytest.approx([0, 0, 0.25 / 8 / variance, 0])
    short = attribute(net, Plan((Quantize(name, 0.5, 0, 0, 6),)), DATA)  # 4 becomes 3
    assert losses(short) == pytest.approx([0, 0, 0, 1 / 8 / variance])


def test_rounding_in_the_range_of_each_run() -> None:
    """Of 0 … 510 one step is 2, so that odd numbers lose 1, half up and half down; nothing is clipped."""
    net = network([[1.0, 0.0], [0.0, 1.0]])
    name = next(n.name for n in fold(net.traced.module).graph.nodes if n.op == "placeholder")
    data = [{"input": torch.tensor([[0.0, 510.0], [3.0, 4.0], [20.0, 41.0], [6.0, 100.0]])}]
    found = attribute(net, Plan((QuantizeDynamically(name), weight_edit(1.0, 127))), data)
    variance = float(data[0]["input"].double().var())
    assert losses(found) == pytest.approx([0, 0, 2 / 8 / variance, 0])
    (row,) = found.layers
    assert row.alone == pytest.approx(row.restored) == pytest.approx(found.total)


def test_parts_of_dynamic_quantization_are_those_of_whole_networks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    net = Network(model, {"input": torch.randn(4, 8)})
    x = torch.randn(16, 8)
    plan = tinier.quantize(net, activations="dynamic", bits=3).plan
    found = {row.layer: row for row in attribute(net, plan, [{"input": x}]).layers}
    for layer, other in (("0", "2"), ("2", "0")):
        alone = Plan(
            tuple(
                edit
                for edit in plan.edits
                if getattr(edit, "tensor", "") == f"{layer}.weight"
                or (isinstance(edit, QuantizeDynamically) and edit.tensor == TURNS[layer])
            )
        )
        assert len(alone.edits) == 2
        assert found[layer].alone == pytest.approx(
            output_loss(net, alone.apply(net), [{"input": x}])
        )
        rest = Plan(tuple(edit for edit in plan.edits if edit not in alone.edits))
        whole = output_loss(net, plan.apply(net), [{"input": x}])
        left = output_loss(net, rest.apply(net), [{"input": x}])
        assert found[layer].restored == pytest.approx(whole - left, rel=1e-4)
        assert found[layer].activation_rounding > 0 == found[layer].activation_clipping
        assert found[other].weight_rounding > 0


def output_loss(net: Network, other: Network, batches: list[dict[str, torch.Tensor]]) -> float:
    return outputs_loss([other(batch) for batch in batches], [net(batch) for batch in batches])


TURNS = {"0": "input_1", "2": "relu"}  # what a layer reads


def test_restoring_the_layer_that_is_ruined_gives_all_back() -> None:
    torch.manual_seed(0)
    net = Network(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), {"input": torch.randn(4, 8)}
    )
    zero = Values(torch.zeros(1, 1, dtype=torch.int64))
    fine = QuantizeWeight("0.weight", Values(torch.full((1, 1), 1e-4)), zero, -32767, 32767)
    coarse = QuantizeWeight("2.weight", Values(torch.full((1, 1), 0.2)), zero, -1, 1)
    found = attribute(net, Plan((fine, coarse)), [{"input": torch.randn(16, 8)}])
    first, second = found.layers
    assert first.layer == "2" and first.restored == pytest.approx(found.total, rel=1e-3)
    assert second.layer == "0" and abs(second.restored) < 1e-3 * found.total
    # However the examples come, the result is the same.
    torch.manual_seed(1)
    data = torch.randn(12, 8)
    whole = attribute(net, Plan((fine, coarse)), [{"input": data}])
    assert whole.examples == 12
    alone = restored_losses(net, Plan((fine, coarse)), [{"input": data[:5]}, {"input": data[5:]}])
    assert list(alone) == ["2", "0"]
    parts = [attribute(net, Plan((fine, coarse)), [{"input": x}]) for x in (data[:5], data[5:])]
    for layer, loss in alone.items():
        own = [next(r.restored for r in part.layers if r.layer == layer) for part in parts]
        assert loss == pytest.approx((5 * own[0] + 7 * own[1]) / 12, rel=1e-4, abs=1e-9)
    for of in (attribute, restored_losses):
        with pytest.raises(InputError, match="quantizes nothing"):
            of(net, Plan(), [{"input": data}])


def test_a_rerun_is_a_run() -> None:
    torch.manual_seed(0)
    net = Network(
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), {"input": torch.randn(2, 4)}
    )
    module = fold(net.traced.module)
    x = torch.randn(5, 4)
    rerun = Rerun(module, [x])
    assert torch.equal(rerun.outputs[0], net.module(x))
    nodes = {node.name: node for node in module.graph.nodes}
    tanh = nodes["tanh"]
    (changed,) = rerun.with_arguments(tanh, {tanh.args[0]: torch.zeros(5, 4)})
    assert torch.equal(changed, net.module[2](torch.zeros(5, 4)))  # type: ignore[index]
    (same,) = rerun.with_value(tanh, rerun.values[tanh])
    assert torch.equal(same, rerun.outputs[0])


def test_the_loss_of_outputs_is_their_squared_error_over_their_variance() -> None:
    random = torch.Generator().manual_seed(0)
    batches = [(torch.randn(n, 3, generator=random),) for n in (4, 6)]
    moved = [(batch[0] + 0.5,) for batch in batches]
    wanted = sum(n * 0.25 / float(b[0].var()) for n, b in zip((4, 6), batches, strict=True)) / 10
    assert outputs_loss(moved, batches) == pytest.approx(wanted, rel=1e-5)
    assert outputs_loss(batches, batches) == 0
