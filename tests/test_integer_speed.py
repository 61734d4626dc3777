"""Layers that stay float for speed: what is chosen from a table of times, so that no clock decides."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import tinier
from tinier.edits.quantize import QuantizeWeight
from tinier.errors import RefusedError
from tinier.measure.latency import Latency
from tinier.measure.layer_times import labels
from tinier.methods.quantization import Quantization
from tinier.network import Network
from tinier.search import integer_speed
from tinier.search.bit_allocation import sensitivities
from tinier.statistics import collect
from tinier.targets.base import Session, Target
from tinier.verbs.smaller import Smaller

LAYERS = ("0.weight", "4.weight", "6.weight")
X = torch.randn(24, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)).eval()


def table(monkeypatch: pytest.MonkeyPatch, float_ms: list[float], integer_ms: list[float]) -> None:
    """Each layer takes so long: the first file that is timed is the float one, the second has integers."""

    def times(target: Target, file: Path, inputs: object, threads: int) -> dict[str, float]:
        found = onnx.load(file)
        integers = any(node.op_type == "QuantizeLinear" for node in found.graph.node)
        names = list(labels(found))
        return dict(zip(names, integer_ms if integers else float_ms, strict=True)) | {"": 0.1}

    monkeypatch.setattr(integer_speed, "layer_times", times)


def timed(monkeypatch: pytest.MonkeyPatch, whole: float, mixed: float) -> None:
    """The whole artifact in integers, and that with float layers, take so long."""

    def latencies(
        sessions: Mapping[str, Session], inputs: Mapping[str, np.ndarray], *, seconds: float
    ) -> dict[str, Latency]:
        ms = {"whole": whole, "mixed": mixed}
        return {
            name: Latency(ms[name], ms[name], ms[name], ms[name], 50, 1, (ms[name],) * 9)
            for name in sessions
        }

    monkeypatch.setattr(integer_speed, "interleaved", latencies)


def in_float(found: Smaller) -> set[str]:
    edits = {edit.tensor for edit in found.plan.edits if isinstance(edit, QuantizeWeight)}
    return set(LAYERS) - edits


def test_the_best_layers_stay_float_within_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    in_ms = dict(zip(LAYERS, ((4.0, 1.0), (2.0, 0.5), (1.0, 0.25)), strict=True))
    table(monkeypatch, *map(list, zip(*in_ms.values(), strict=True)))
    method = Quantization(bits=3)
    network = Network(model(), {"input": X[:2]})
    loss = sensitivities(network, method, [{"input": X}], (0, 3), collect(network, [{"input": X}]))
    for limit in (2.6, 3.3, 5.5, 6.3):
        found = tinier.quantize(
            model(), X[:2], X, bits=3, corrections=(), max_latency=limit, target="onnxruntime"
        )
        # Of all sets of layers that may stay float, the one that loses least.
        best = min(
            sum(loss[name][3] for name in LAYERS if name not in left)
            for count in range(3)
            for left in itertools.combinations(LAYERS, count)
            if sum(in_ms[name][0 if name in left else 1] for name in LAYERS) <= limit
        )
        left = in_float(found)
        assert sum(in_ms[name][0 if name in left else 1] for name in LAYERS) <= limit
        assert sum(loss[n][3] for n in LAYERS if n not in left) == pytest.approx(best, rel=0.05)
        assert f"{len(left)} of 3 layers stay float within {limit:g} ms" in " ".join(found.notes)
    for limit, message in ((7.5, "nothing needs to be quantized"), (1.5, "max_latency in ms on")):
        with pytest.raises(RefusedError, match=message):
            tinier.quantize(model(), X[:2], X, bits=3, max_latency=limit, target="onnxruntime")


@pytest.mark.parametrize(
    ("integer_ms", "whole", "mixed", "left", "note"),
    [
        ([2.0, 0.5, 0.5], 2.0, 1.0, {"0.weight"}, "float, because slower in integers: 0.weight"),
        ([2.0, 0.5, 0.5], 1.0, 1.2, set(), "but not the whole without them"),
        ([0.5, 0.5, 0.5], 1.0, 1.0, set(), "no layer is slower in integers"),
        ([2.0, 2.0, 2.0], 1.0, 1.0, set(), "every layer is slower in integers"),
    ],
)
def test_layers_that_are_slower_in_integers_stay_float(
    integer_ms: list[float],
    whole: float,
    mixed: float,
    left: set[str],
    note: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table(monkeypatch, [1.0, 1.0, 1.0], integer_ms)
    timed(monkeypatch, whole, mixed)
    found = tinier.quantize(model(), X[:2], X, target="onnxruntime", threads=1)
    assert in_float(found) == left
    assert note in " ".join(found.notes)
