"""Bits of each layer: the integer programme against all choices, sensitivities against whole runs, times of layers on real runtimes."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import fx, nn

import tinier
from tinier.edits.assign import Fold
from tinier.edits.base import Plan
from tinier.edits.quantize import QuantizeWeight
from tinier.errors import DataError, InputError, RefusedError
from tinier.graph.stored import Store
from tinier.measure.layer_times import assigned, labels, layer_times
from tinier.methods.quantization import Quantization
from tinier.methods.weight_integers import Known, integers_of
from tinier.network import Network
from tinier.search.bit_allocation import allocate, packed_bytes, sensitivities
from tinier.statistics import collect, observe
from tinier.targets.base import Kernel, targets_for
from tinier.targets.onnx_file import write_onnx
from tinier.verbs.mixture import Mixture


def test_the_programme_finds_the_best_of_all_choices() -> None:
    rng = np.random.default_rng(0)
    choices = (2, 4, 8)
    for limit in (9.0, 12.0, 20.0, 40.0):
        loss = {f"l{i}": {b: float(rng.random() / b) for b in choices} for i in range(5)}
        cost = {f"l{i}": {b: float(b * rng.uniform(0.5, 1)) for b in choices} for i in range(5)}
        best = min(
            (
                sum(loss[name][b] for name, b in zip(loss, pick, strict=True))
                for pick in itertools.product(choices, repeat=5)
                if sum(cost[name][b] for name, b in zip(loss, pick, strict=True)) <= limit
            ),
            default=None,
        )
        if best is None:
            with pytest.raises(RefusedError, match="the cheapest choice"):
                allocate(loss, cost, limit)
            continue
        found = allocate(loss, cost, limit)
        assert sum(loss[name][b] for name, b in found.items()) == pytest.approx(best)
        assert sum(cost[name][b] for name, b in found.items()) <= limit + 1e-9


def small() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    return model.eval(), torch.randn(24, 2, 8, 8)


def test_sensitivities_are_those_of_whole_runs() -> None:
    model, x = small()
    network = Network(model[4:], {"input": torch.randn(2, 8, 1, 1)})
    method = Quantization(activations=None, ranges="minmax")
    data = torch.randn(40, 8, 1, 1)
    kl = sensitivities(network, method, [{"input": data}], (0, 3, 8))
    output = sensitivities(network, method, [{"input": data}], (0, 3, 8), kind="output")
    assert list(kl) == ["5.weight", "7.weight"]
    with torch.no_grad():
        before = network.module(data)
        weight = dict(model.named_parameters())["7.weight"]
        scale = weight.abs().amax(1, keepdim=True) / 4  # −4 … 3: the larger reach
        scale = torch.maximum(weight.clamp_min(0).amax(1, keepdim=True) / 3, scale)
        q = tinier.quantize(network, activations=None, bits=3, ranges="minmax", symmetric=True,
                            exclude=["5"])  # fmt: skip
        after = q.model(data)
    wanted = float((after - before).double().square().mean() / before.double().var())
    assert output["7.weight"][3] == pytest.approx(wanted, rel=1e-4)
    p, r = before.double().log_softmax(1), after.double().log_softmax(1)
    assert kl["7.weight"][3] == pytest.approx(float((p.exp() * (p - r)).sum(1).mean()), rel=1e-4)
    for row in (*kl.values(), *output.values()):
        assert row[0] == 0 and row[8] < row[3] / 50
    squares = observe(network, [{"input": data}], {"squares"})
    fisher = sensitivities(network, method, [], (0, 3, 8), squares, kind="fisher")
    assert fisher["5.weight"][8] < fisher["5.weight"][3] / 50
    with pytest.raises(InputError, match="kl, output, fisher"):
        sensitivities(network, method, [], (8,), kind="hessian")
    assert x.shape[0] == 24 and scale.shape == (5, 1)


@pytest.mark.parametrize("activations", [4, "dynamic"])
@pytest.mark.parametrize("kind", ["kl", "output"])
def test_a_layer_is_its_weight_and_what_it_multiplies(kind: str, activations: int | str) -> None:
    """Against the whole network with one layer quantized, as the edits do it."""
    network, data, method = rounded(activations)
    statistics = collect(network, [{"input": data}]) if method.activations else None
    found = sensitivities(network, method, [{"input": data}], (0, 3, 8), statistics, kind)
    alone = sensitivities(
        network,
        Quantization(activations=None, ranges="minmax"),
        [{"input": data}],
        (3, 8),
        kind=kind,
    )
    inputs = {"0.weight": "input_1", "2.weight": "relu", "4.weight": "relu_1"}
    assert list(found) == list(inputs)
    wanted = network.module(data).detach()
    for name, source in inputs.items():
        for bits in (3, 8):
            plan = replace(method, bits=bits).plan(network, statistics)
            edits = [edit for edit in plan.edits if getattr(edit, "tensor", "") in (name, source)]
            assert len(edits) == 2
            after = Plan(tuple(edits)).apply(network).module(data).detach()
            assert found[name][bits] == pytest.approx(change(wanted, after, kind), rel=1e-3)
        assert found[name][0] == 0
    assert found["2.weight"][8] > 2 * alone["2.weight"][8], "activations lose more than the weight"


def test_fisher_of_what_a_layer_multiplies() -> None:
    """Against squared gradients of one example after the other, of the layers written out by hand."""
    network, data, method = rounded(4)
    statistics = collect(network, [{"input": data}])
    squares = observe(network, [{"input": data}], {"squares"}).squares
    both = replace(statistics, squares=squares)
    found = sensitivities(network, method, [{"input": data}], (0, 8), both, "fisher")
    weights = sensitivities(
        network, Quantization(activations=None, ranges="minmax"), [], (8,), both, "fisher"
    )
    edits = {edit.tensor: edit for edit in method.roundings(network, statistics)}
    layers = [network.module.get_submodule(str(n)) for n in (0, 2, 4)]
    with torch.no_grad():
        logits = network.module(data)
    # The answers that are drawn are those of the same seed.
    chances = logits.softmax(1)
    answers = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    total = dict.fromkeys(found, 0.0)
    for x, answer in zip(data, answers, strict=True):
        reads = [x]
        for number, layer in enumerate(layers):
            reads[-1] = reads[-1].detach().requires_grad_() if not number else reads[-1]
            reads[-1].retain_grad()
            y = layer(reads[-1])
            reads.append(torch.relu(y) if number < 2 else y)
        torch.nn.functional.cross_entropy(reads[-1], answer).backward()
        for (name, source), read in zip(
            (("0.weight", "input_1"), ("2.weight", "relu"), ("4.weight", "relu_1")),
            reads[:3],
            strict=True,
        ):
            assert read.grad is not None
            moved = edits[source].rounded(read.detach()) - read.detach()
            total[name] += float((read.grad * moved).double().square().sum()) / len(data)
    for name, part in total.items():
        assert found[name][8] - weights[name][8] == pytest.approx(part, rel=1e-3)
        assert found[name][0] == 0 < part
    with pytest.raises(DataError, match="no examples"):
        sensitivities(network, method, [], (8,), both, "fisher")


def rounded(activations: int | str) -> tuple[Network, torch.Tensor, Quantization]:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    network = Network(nn.Sequential(*layers).eval(), {"input": torch.randn(2, 6)})
    dynamic = activations == "dynamic"
    bits = None if isinstance(activations, str) else activations
    method = Quantization(activations=bits, dynamic=dynamic, ranges="minmax")
    return network, torch.randn(24, 6), method


def change(before: torch.Tensor, after: torch.Tensor, kind: str) -> float:
    if kind == "output":
        return float((after - before).double().square().mean() / before.double().var())
    p, r = before.double().log_softmax(1), after.double().log_softmax(1)
    return float((p.exp() * (p - r)).sum(1).mean())


def test_bits_within_a_size() -> None:
    model, x = small()
    method = Quantization(activations=None, symmetric=False)
    whole = packed_bytes(Network(model, {"input": x[:2]}), method, (8,))
    assert whole["5.weight"][8] == 8 * 16 + 16 * 5
    found = tinier.quantize(model, x[:2], x, activations=None, max_size=420)
    assert "packed" in found.notes[-1]
    assert sum(isinstance(edit, QuantizeWeight) for edit in found.plan.edits) == 3
    with pytest.raises(RefusedError, match="cheapest choice of bits takes"):
        tinier.quantize(model, x[:2], x, activations=None, max_size=10)
    # More room is never worse.
    with torch.no_grad():
        errors = [
            float(
                (
                    tinier.quantize(model, x[:2], x, activations=None, max_size=n).model(x)
                    - model(x)
                ).norm()
            )
            for n in (330, 420, 600)
        ]
    assert errors[0] > errors[2]


def test_what_does_not_go_together() -> None:
    model, x = small()
    for arguments, message in (
        ({"max_size": "1MB", "max_latency": 3, "target": "onnxruntime"}, "one limit"),
        ({"choices": (4,)}, "max_size"),
        ({"max_size": "1MB", "choices": (1,)}, "2 to 8"),
        ({"max_latency": 3}, "target"),
        ({"threads": 2}, "target"),
        ({"target": "onnxruntime", "activations": None}, "nothing to measure"),
        ({"max_size": "big"}, "max_size is 'big'"),
        ({"max_size": "1KB", "layers": {"*": 4}}, "none are left to choose"),
    ):
        with pytest.raises(InputError, match=message):
            tinier.quantize(model, x[:2], x, **arguments)  # type: ignore[arg-type]
    assert Mixture.of(None, None, None, "kl", Quantization()).needs == frozenset()


def test_kernels_belong_to_the_layer_with_the_longest_label() -> None:
    names = {"a": ["node_conv", "relu"], "b": ["node_conv_1", "relu_1"]}
    kernels = [
        Kernel("relu_1_nchwc", "Conv", 2.0),
        Kernel("node_conv_token_3", "QLinearConv", 1.0),
        Kernel("ReorderOutput", "ReorderOutput", 0.5),
    ]
    assert assigned(names, kernels) == {"a": 1.0, "b": 2.0, "": 0.5}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_every_layer_has_a_time(runtime: str, tmp_path: Path) -> None:
    model, x = small()
    (target,) = targets_for(runtime)
    found = tinier.quantize(model, x[:2], x)
    for name, network in (("float", Network(model, {"input": x[:2]})), ("int8", found.network)):
        file = tmp_path / f"{name}.onnx"
        write_onnx(network, file)
        assert len(labels(onnx.load(file))) == 3
        times = layer_times(target, file, {"input": x[:1].numpy()}, 1)
        assert len(times) == 4
        assert all(ms > 0 for layer, ms in times.items() if layer), times


def test_what_is_known_of_weights_changes_no_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small()
    network = Plan((Fold(),)).apply(Network(model, {"input": x[:2]}))
    batches = [{"input": x}]
    statistics = replace(
        observe(network, batches, {"gram"}), activations=collect(network, batches).activations
    )
    method = Quantization(rounding="error_feedback", saturation_free=True)
    made = []

    def counted(module: fx.GraphModule, store: Store, *rest: Any) -> Any:
        made.append(store.name)
        return integers_of(module, store, *rest)

    monkeypatch.setattr("tinier.methods.weight_integers.integers_of", counted)
    known: Known = {}
    others = [replace(method, exclude=(name,)) for name in ("0", "5", "7")]
    for one in (method, *others, replace(method, bits=4)):
        again = one.decide(network, statistics, known)
        first = len(made)
        assert again == one.decide(network, statistics)
        del made[first:]
    # Of five decisions about three weights: all once at 8 bits and at 4, and those of which another layer's exclusion moves the inputs.
    assert len(made) < 5 * 3 - 3
    assert sorted(made[:3]) == ["0.weight", "5.weight", "7.weight"]


def test_layers_are_restored_until_the_loss_is_small_enough() -> None:
    model, x = small()
    whole = tinier.quantize(model, x[:2], x, bits=3, corrections=())
    half = tinier.quantize(model, x[:2], x, bits=3, restore=0.5, corrections=())
    kept = {e.tensor for e in whole.plan.edits if isinstance(e, QuantizeWeight)}
    left = {e.tensor for e in half.plan.edits if isinstance(e, QuantizeWeight)}
    assert left < kept and left
    assert any("gives back most" in note for note in half.notes)
    with torch.no_grad():
        before, after = (float((q.model(x) - model(x)).square().mean()) for q in (whole, half))
    assert after <= 0.5001 * before
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(InputError, match="share of the loss"):
            tinier.quantize(model, x[:2], x, restore=share)
