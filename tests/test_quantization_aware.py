"""Quantization-aware training: quantizers against closed forms, plans to networks and back, and what training gains."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

import tinier
from networks import build, inputs
from test_quantization import Inverted, Joined, own
from tinier.edits.assign import Fold
from tinier.edits.base import Plan
from tinier.edits.fake_quantize import plan_of, repair_saturation, trainable
from tinier.edits.mask import Mask
from tinier.edits.quantize import Quantize, QuantizeWeight
from tinier.errors import InputError, RefusedError
from tinier.methods.quantization import Quantization
from tinier.modules.fake_quantize import (
    ActivationQuantizer,
    BiasQuantizer,
    LearnSteps,
    Step,
    WeightQuantizer,
)
from tinier.network import Network
from tinier.recovery.loop import recover
from tinier.recovery.soft_targets import SoftTargets
from tinier.statistics import collect
from tinier.targets.onnx_file import write_onnx
from tinier.tensors.affine import Integers, fake_quantize
from tinier.tensors.grid import Grid, choose
from tinier.tensors.saturation import PAIR_LIMIT, pair_sums
from tinier.verbs.smaller import examples_of
from toy import TinyCNN, images, trained

Data = list[dict[str, Tensor]]


def planned(network: Network, data: Data, **options: object) -> Plan:
    """Fold and quantize, as the verb does."""
    fold = Plan((Fold(),))
    folded = fold.apply(network)
    method = Quantization(**options)  # type: ignore[arg-type]
    statistics = collect(folded, data) if method.activations is not None else None
    return fold + method.plan(folded, statistics)


def of(name: str) -> tuple[Network, Data]:
    if name == "inverted":
        return own(Inverted, 3, 12, 12)
    if name == "joined":
        return own(Joined, 3, 8, 8)
    return build(name), [inputs(name, 8, seed) for seed in (10, 11)]


def moved(network: Network, by: float = 0.05) -> Network:
    """A copy with every parameter moved at random, as training does."""
    result = network.copy()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in result.module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            size = parameter.std() if parameter.numel() > 1 else torch.tensor(1.0)
            parameter.add_(noise * by * size.clamp_min(0.1))
    return result


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference in parts of the range."""
    return float((a - b).abs().max() / (b.max() - b.min()))


def noise(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 1, 8, 8, generator=generator)


def far(network: Network, original: Network, x: Tensor) -> float:
    """What training minimizes."""
    return float(SoftTargets()(network({"x": x}), original({"x": x}), None))


# Quantizers


def test_the_gradient_of_a_step_is_that_of_its_logarithm() -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 2
    s, z, integers = 0.3, 5, Integers(0, 15)
    quantizer = ActivationQuantizer(Step(torch.tensor(s)), z, integers)
    assert torch.equal(quantizer(x), fake_quantize(x, torch.tensor(s), torch.tensor(z), integers))
    quantizer(x).sum().backward()
    v = x / torch.tensor(s)
    slope = torch.where(v + z <= 0, 0 - z, torch.where(v + z >= 15, 15 - z, v.round() - v))
    expected = s * slope.sum() / (200 * 15) ** 0.5
    assert quantizer.step.theta.grad is not None
    torch.testing.assert_close(quantizer.step.theta.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_limited_step_stops_there_and_comes_back() -> None:
    step = Step(torch.tensor(1.0), most=1.5)
    with torch.no_grad():
        step.theta.fill_(3.0)
    assert step().item() == 1.5
    step().backward()
    assert step.theta.grad is not None and step.theta.grad > 0
    with torch.no_grad():
        step.theta.fill_(0.0)
    assert step().item() == 1.0
    step.learning = False
    assert not step().requires_grad


@pytest.mark.parametrize(("axis", "groups"), [(0, 1), (1, 1), (0, 3), (1, 4)])
def test_weights_are_the_nearest_of_their_grid(axis: int, groups: int) -> None:
    weight = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    grid = choose(weight.movedim(axis, 0), Integers(0, 7), groups=groups, symmetric=False)
    quantizer = WeightQuantizer(Step(grid.scale), grid.zero_point, grid.integers, axis, weight)
    expected = grid.dequantize(grid.quantize(weight.movedim(axis, 0))).movedim(0, axis)
    assert torch.equal(quantizer(weight / quantizer.unit), expected)
    assert set(quantizer.unit.log2().flatten().tolist()) <= {-1.0, 0.0, 1.0}


def test_biases_are_integers_of_both_steps() -> None:
    grid = Grid(
        torch.tensor([[0.5], [0.25]]), torch.zeros(2, 1, dtype=torch.int64), Integers(-7, 7)
    )
    weight = WeightQuantizer(Step(grid.scale), grid.zero_point, grid.integers, 0, torch.ones(2, 3))
    source = ActivationQuantizer(Step(torch.tensor(0.5)), 0, Integers(0, 15))
    bias = torch.tensor([0.3, 0.3], requires_grad=True)
    rounded = BiasQuantizer(source, weight)(bias)
    assert rounded.tolist() == [0.25, 0.25]
    (rounded * torch.tensor([1.0, 2.0])).sum().backward()
    assert bias.grad is not None and bias.grad.tolist() == [1.0, 2.0]


# Plans to networks and back


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("inverted", {}),
        ("joined", {"bits": 4, "activations": 4}),
        ("residual_cnn", {"bits": 4, "activations": 8}),
        ("encoder", {}),
        ("lstm", {"bits": 4, "activations": None, "symmetric": False}),
        ("mlp", {"bits": 3, "activations": None, "group": 2}),
        ("mlp", {"bits": 4, "activations": None, "rounding": "hqq", "symmetric": False}),
    ],
)
def test_plan_to_network_and_back(name: str, options: dict[str, object]) -> None:
    """Untrained it is the plan's simulation; with other weights and steps, the simulation of the plan that comes back."""
    network, data = of(name)
    plan = planned(network, data, **options)
    student = trainable(network, plan)
    again = plan_of(student, plan).apply(network)
    simulation = plan.apply(network)
    # A value in the middle of two integers may go up in one and down in the other.
    most = 1.5 / 255
    assert difference(student(data[0])[0], simulation(data[0])[0]) <= most
    assert torch.equal(again(data[0])[0], simulation(data[0])[0])
    other = moved(student)
    plan_back = plan_of(other, plan)
    assert Plan.from_json(plan_back.to_json()) == plan_back
    result = plan_back.apply(network)
    # The output's own range in steps: 255, or fewer where it is rounded to fewer.
    bits = options.get("activations", 8)
    steps = 255 if bits is None else 2 ** int(str(bits)) - 1
    assert difference(other(data[0])[0], student(data[0])[0]) > 2 / 255
    assert difference(result(data[0])[0], other(data[0])[0]) <= 1.5 / steps
    agree = (result(data[0])[0] - other(data[0])[0]).abs() < 1e-5 * result(data[0])[0].abs().max()
    assert agree.float().mean() > 0.9


def test_values_that_share_a_scale_share_a_step_and_clamps_stay_in_bounds() -> None:
    network, data = of("joined")
    plan = planned(network, data)
    edits = [edit for edit in plan.edits if isinstance(edit, Quantize)]
    student = trainable(network, plan)
    quantizers = [m for m in student.module.modules() if isinstance(m, ActivationQuantizer)]
    thetas = {id(quantizer.step.theta) for quantizer in quantizers}
    assert len(thetas) == len({(e.scale, e.zero_point) for e in edits}) < len(edits)
    with torch.no_grad():
        for name, parameter in student.module.named_parameters():
            if name.endswith("theta"):
                parameter.fill_(2.0)
    found = {e.tensor: e for e in plan_of(student, plan).edits if isinstance(e, Quantize)}
    before = {e.tensor: e for e in edits}
    groups: dict[tuple[float, int], set[float]] = {}
    for tensor, edit in found.items():
        groups.setdefault((before[tensor].scale, edit.zero_point), set()).add(edit.scale)
    assert all(len(scales) == 1 for scales in groups.values())
    network, data = of("inverted")
    plan = planned(network, data)
    student = trainable(network, plan)
    with torch.no_grad():
        for name, parameter in student.module.named_parameters():
            if name.endswith("theta"):
                parameter.fill_(20.0)
    for one in plan_of(student, plan).edits:
        if isinstance(one, Quantize) and one.tensor.startswith("hardtanh"):
            assert one.scale * (one.high - one.zero_point) <= 6


def test_what_cannot_be_trained() -> None:
    network, data = of("mlp")
    plan = planned(network, data)
    with pytest.raises(InputError, match="quantizes nothing"):
        trainable(network, Plan((Fold(),)))
    mask = Mask("fc1.weight", (), "")
    with pytest.raises(InputError, match="mask after quantization"):
        trainable(network, plan + Plan((mask,)))
    with pytest.raises(RefusedError, match="no value nowhere"):
        trainable(network, Plan((Quantize("nowhere", 1.0, 0, 0, 255),)))
    with pytest.raises(InputError, match="of another plan"):
        plan_of(network, plan)
    with pytest.raises(RefusedError, match="quantized already"):
        trainable(plan.apply(network), plan)
    with pytest.raises(InputError, match="0 ≤ first ≤ last ≤ 1"):
        LearnSteps(0.5, 0.2)


def test_repaired_weights_do_not_saturate() -> None:
    network, data = of("inverted")
    plan = planned(network, data, saturation_free=True)
    student = moved(trainable(network, plan), 0.3)

    def sums(of: Plan) -> list[int]:
        edits = [edit for edit in of.edits if isinstance(edit, QuantizeWeight) and edit.integers]
        return [int(pair_sums(edit.integers.tensor).max()) for edit in edits if edit.integers]

    assert max(sums(plan_of(student, plan))) > PAIR_LIMIT
    assert repair_saturation(student, plan)
    repaired = plan_of(student, plan)
    stored = repaired.apply(network).module.state_dict().values()
    assert max(int(pair_sums(t).max()) for t in stored if t.dtype == torch.int8) <= PAIR_LIMIT
    assert difference(repaired.apply(network)(data[0])[0], student(data[0])[0]) <= 1.5 / 255
    assert repair_saturation(student, plan) == ()


# Training


def test_steps_learn_in_their_part_of_the_training_only() -> None:
    network = Network(trained(TinyCNN), {"x": images(2, 5)[0]})
    x = images(128, 2)[0]
    plan = planned(network, [{"x": x}], bits=3, activations=3)
    student = trainable(network, plan)
    for part, learned in ((LearnSteps(0, 0), False), (LearnSteps(0, 0.5), True)):
        done = recover(student, network, examples_of(x, network), epochs=2, lr=1e-3, each_step=part)
        thetas = [p for n, p in done.network.module.named_parameters() if n.endswith("theta")]
        assert any(bool(theta.any()) for theta in thetas) is learned
        assert all(p.learning for p in done.network.module.modules() if isinstance(p, Step))


def test_training_gives_quality_back_and_the_runtime_runs_it(tmp_path: Path) -> None:
    model = trained(TinyCNN)
    x, test_x = (images(n, n)[0] + noise(n) for n in (512, 400))  # hard enough to be wrong
    network = Network(model, {"x": x[:2]})
    quantized = tinier.quantize(model, (x[:2],), x[:256], bits=2, activations=2, layers={"fc": 8})

    result = tinier.recover(quantized, x, epochs=20)
    assert far(result.network, network, test_x) < 0.7 * far(quantized.network, network, test_x)
    assert result.trainable is not None and type(result.trainable.module) is TinyCNN
    assert any("trained quantized for 20 epochs" in note for note in result.notes)
    assert torch.equal(
        result.plan.apply(result.original)({"x": test_x})[0], result.network({"x": test_x})[0]
    )
    write_onnx(result.network, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {"x": test_x.numpy()})[0]
    expected = result.network({"x": test_x})[0].numpy()
    same = np.abs(found - expected).max(1) < 1e-4 * np.ptp(expected)
    assert same.mean() > 0.98
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.99


def test_from_any_start_and_again() -> None:
    """Pruned before, integers chosen by error feedback, trained twice: the plan stays one from the original."""
    model, (x, _) = trained(TinyCNN), images(256, 2)
    pruned = tinier.prune(model, (x[:2],), keep=0.5)
    quantized = tinier.quantize(pruned, data=x, bits=3, activations=4, rounding="error_feedback")
    once = tinier.recover(quantized, x, epochs=20)
    twice = tinier.recover(once, x, epochs=20)
    kinds = [edit.kind for edit in twice.plan.edits]
    assert kinds.count("fold") == 1 and len(twice.plan.edits) == len(once.plan.edits)
    network = Network(model, {"x": x[:2]})
    batch = {"x": x}
    losses = [far(n, network, x) for n in (quantized.network, once.network, twice.network)]
    assert losses[1] < losses[0] / 2
    assert losses[2] < losses[1]
    assert torch.equal(twice.plan.apply(twice.original)(batch)[0], twice.network(batch)[0])


def test_weights_alone_train_too() -> None:
    model, (x, _) = trained(TinyCNN), images(256, 2)
    quantized = tinier.quantize(model, (x[:2],), bits=2, activations=None)
    result = tinier.recover(quantized, x, epochs=20)
    network = Network(model, {"x": x[:2]})
    assert far(result.network, network, x) < far(quantized.network, network, x) / 2
