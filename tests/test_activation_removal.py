"""Activation functions leave: lines in their place, layers that become neighbours merged."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tinier
from networks import build
from tinier.edits import merge
from tinier.edits.base import Plan
from tinier.edits.linearize import Linearize
from tinier.edits.merge import Merge
from tinier.errors import DataError, InputError, RefusedError
from tinier.graph.activations import activations
from tinier.graph.macs import macs
from tinier.graph.neighbours import neighbours
from tinier.methods.activation_removal import ActivationRemoval, output_change
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.statistics.lines import fit_lines


def seen(network: Network, x: Tensor) -> Statistics:
    batches = [{"input": x}]
    return Statistics({}, len(x), samples=tuple(batches), lines=fit_lines(network, batches))


def mlp() -> Network:
    """The first ReLU sees positive values only, the second both signs."""
    torch.manual_seed(0)
    first, second = nn.Linear(4, 16), nn.Linear(16, 16)
    module = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        first.bias.add_(100)
        second.bias.sub_(second(torch.relu(first(torch.zeros(4)))))
    return Network(module, {"input": torch.randn(4, 4)})


def test_lines_equal_numpy_polyfit() -> None:
    network = build("mlp")
    name = network.traced.inputs[0]
    batches = [{name: torch.randn(20, 12)}, {name: torch.randn(7, 12)}]
    fits = fit_lines(network, batches)
    x = torch.cat([batch[name] for batch in batches])
    module: Any = network.module
    with torch.no_grad():
        before = module.fc1(x).double().numpy()
    after = np.maximum(before, 0)
    line = next(iter(fits.values())).line
    for channel in range(24):
        slope, intercept = np.polyfit(before[:, channel], after[:, channel], 1)
        assert float(line.slope[channel]) == pytest.approx(slope, rel=1e-6, abs=1e-9)
        assert float(line.intercept[channel]) == pytest.approx(intercept, rel=1e-6, abs=1e-9)


def test_lines_do_not_depend_on_batches() -> None:
    network, x = mlp(), torch.randn(30, 4)
    whole, parts = (
        fit_lines(network, [{"input": x}]),
        fit_lines(network, [{"input": p} for p in x.split(7)]),
    )
    for name, fit in whole.items():
        # A product of matrices in float32 rounds differently in batches of other sizes.
        torch.testing.assert_close(fit.line.slope, parts[name].line.slope, rtol=1e-5, atol=1e-5)
        assert fit.error == pytest.approx(parts[name].error, abs=1e-6)
    with pytest.raises(DataError, match="no examples"):
        fit_lines(network, [])


@pytest.mark.parametrize("score", ["output", "fit"])
def test_a_function_that_is_straight_on_the_data_leaves_first_and_costs_nothing(score: str) -> None:
    network, x = mlp(), torch.randn(64, 4)
    statistics = seen(network, x)
    plan = ActivationRemoval(count=1, score=score, merge=False).plan(network, statistics)
    assert [edit.row()[0] for edit in plan.edits] == ["1"]
    straight = plan.apply(network)
    torch.testing.assert_close(
        straight({"input": x})[0], network({"input": x})[0], rtol=1e-3, atol=1e-3
    )
    assert isinstance(straight.module, nn.Sequential)
    assert Plan.from_json(plan.to_json()) == plan


def test_neighbours_become_one_layer() -> None:
    network, x = mlp(), torch.randn(64, 4)
    plan = ActivationRemoval(count=2).plan(network, seen(network, x))
    assert [edit.kind for edit in plan.edits] == ["linearize", "linearize", "merge", "merge"]
    small = plan.apply(network)
    assert sum(macs(small.traced).values()) == 4 * 3
    lines = Plan(tuple(e for e in plan.edits if isinstance(e, Linearize))).apply(network)
    torch.testing.assert_close(small({"input": x})[0], lines({"input": x})[0], rtol=1e-4, atol=1e-3)
    small.module.train()
    small.module(x).sum().backward()


def test_layers_are_merged_only_where_that_is_cheaper() -> None:
    torch.manual_seed(0)
    narrow = nn.Sequential(nn.Linear(16, 2), nn.ReLU(), nn.Linear(2, 16))
    network = Network(narrow, {"input": torch.randn(4, 16)})
    plan = ActivationRemoval(count=1).plan(network, seen(network, torch.randn(32, 16)))
    assert [edit.kind for edit in plan.edits] == ["linearize"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.Conv2d(8, 4, 3, stride=1)),
        lambda: nn.Sequential(nn.Conv2d(3, 8, (1, 3), stride=(1, 2)), nn.Conv2d(8, 4, 2, stride=2)),
        lambda: nn.Sequential(nn.Conv1d(3, 8, 5, padding=2), nn.Dropout(), nn.Conv1d(8, 4, 1, stride=3)),
        lambda: nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 4, bias=False)),
    ],
)  # fmt: skip
def test_merging_is_exact(make: Any) -> None:
    torch.manual_seed(0)
    module = make().eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean = torch.randn(8)
            part.running_var = torch.rand(8) + 0.5
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    kind = module[0]
    x = (
        torch.randn(2, 3)
        if isinstance(kind, nn.Linear)
        else torch.randn(2, 3, *[13] * (kind.weight.ndim - 2))
    )
    network = Network(module, {"input": x})
    (pair,) = neighbours(network.traced)
    merged = Plan((Merge(pair.first.weight, pair.second.weight),)).apply(network)
    torch.testing.assert_close(
        merged({"input": x})[0], network({"input": x})[0], rtol=1e-4, atol=1e-5
    )
    assert isinstance(merged.module, nn.Sequential) and type(merged.module[0]) is type(kind)
    assert not list(neighbours(merged.traced))


def test_what_cannot_be_merged_is_no_pair() -> None:
    padded = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, padding=1)
    )  # zeros are not what goes on there
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 4, 1))
    for module, channels in ((padded, 3), (grouped, 4)):
        network = Network(module, {"input": torch.randn(2, channels, 9, 9)})
        assert not list(neighbours(network.traced))
        with pytest.raises(RefusedError, match="no neighbours"):
            Plan((Merge("0.weight", "1.weight"),)).apply(network)


@pytest.mark.parametrize(
    "name", ["residual_cnn", "grouped_cnn", "vit", "encoder", "causal_lm", "vae"]
)
def test_on_the_conformance_networks(name: str) -> None:
    network = build(name)
    found = activations(network.traced)
    assert found
    lines = fit_lines(network, [network.example])
    statistics = Statistics({}, 2, samples=(network.example,), lines=lines)
    plan = ActivationRemoval(count=1, score="fit").plan(network, statistics)
    straight = plan.apply(network)  # proved inside
    assert straight.traced.batched == network.traced.batched
    assert len(activations(straight.traced)) == len(found) - 1


def test_what_is_refused() -> None:
    network = mlp()
    with pytest.raises(InputError, match="needs data"):
        ActivationRemoval().plan(network)
    with pytest.raises(RefusedError, match="5 activation functions were to leave, there are 2"):
        ActivationRemoval(count=5).plan(network, seen(network, torch.randn(8, 4)))
    with pytest.raises(RefusedError, match="there are 1, 3"):
        Plan((Linearize("7", (1.0,), (0.0,)),)).apply(network)
    for wrong in ({"keep": 2.0}, {"count": -1}, {"score": "best"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            ActivationRemoval(**wrong)  # type: ignore[arg-type]


class FeedForward(nn.Module):
    """The block of a transformer; with ``inside``, its activation is a function."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.act, self.inside = nn.ReLU(), inside

    def forward(self, input: Tensor) -> Tensor:
        x = self.up(self.norm(input))
        return input + self.down(torch.relu(x) if self.inside else self.act(x))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
def test_merged_in_half_precision_and_frozen(
    frozen: bool, kind: torch.dtype, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = FeedForward(inside).to(kind).requires_grad_(not frozen)
    x = torch.randn(64, 8).to(kind)
    network = Network(module, {"input": x[:4]})
    plan = ActivationRemoval(count=1).plan(network, seen(network, x))
    assert [edit.kind for edit in plan.edits] == ["linearize", "merge"]
    smaller = plan.apply(network)
    parameters = list(smaller.module.parameters())
    assert {p.dtype for p in parameters} == {kind}
    assert {p.requires_grad for p in parameters} == {not frozen}
    # As near as one rounding of the weights is.
    straight = Plan(plan.edits[:1]).apply(network)
    (found,), (wanted,) = smaller(network.example), straight(network.example)
    digits = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[kind]
    torch.testing.assert_close(found.float(), wanted.float(), rtol=digits, atol=digits * 4)
    # A wrong product is found, in half precision as well.
    exact = merge.merged_tensors
    monkeypatch.setattr(merge, "merged_tensors", lambda *given: _changed(*exact(*given)))
    with pytest.raises(RefusedError, match="differs by more than 1e-05"):
        plan.apply(network)


def _changed(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return weight * (1 + 1e-4), bias


HAND_WRITTEN: dict[str, Any] = {
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "maximum of a number": lambda x: torch.maximum(x, torch.tensor(0.0)),
    "clamp": lambda x: x.clamp(min=0),
    "clamp both": lambda x: torch.clamp(x, 0, 6),
    "silu": lambda x: x * torch.sigmoid(x),
    "quick gelu": lambda x: torch.sigmoid(1.702 * x) * x,
    "mish": lambda x: x * torch.tanh(nn.functional.softplus(x)),
    "hard swish": lambda x: x * (nn.functional.relu6(x + 3) / 6),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "tanh gelu": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.045 * torch.pow(x, 3)))),
    "leaky relu": lambda x: torch.where(x > 0, x, 0.1 * x),
}


class Written(nn.Module):
    """A feed-forward block whose activation is written by hand; what bounds a deviation, or gates one tensor by another, is none."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 32), nn.Linear(8, 8), nn.Linear(32, 8)
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        x = input / input.std(-1, keepdim=True).clamp(min=1e-6)
        x = self.down(self.function(self.up(x)))
        return x * x * self.gate(input)


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_functions_that_are_written_by_hand(name: str) -> None:
    torch.manual_seed(0)
    function = HAND_WRITTEN[name]
    module, x = Written(function), torch.randn(64, 8)
    network = Network(module, {"input": x[:4]})
    (one,) = activations(network.traced)
    assert (one.channels, one.dim) == (32, 1)
    # What is called its source and its value are those of the function.
    run = torch.fx.Interpreter(network.traced.module, garbage_collect_values=False)
    with torch.no_grad():
        run.run(x[:4])
        torch.testing.assert_close(run.env[one.node], function(run.env[one.source]))
    smaller = tinier.linearize(network, None, x, count=1)
    assert [edit.kind for edit in smaller.plan.edits] == ["linearize", "merge"]
    fit = fit_lines(network, [{"input": x}])[one.name]
    with torch.no_grad():
        deviation = x / x.std(-1, keepdim=True)
        wanted: Any = module.down(fit.line(module.up(deviation), 1).float())
        wanted = wanted * wanted * module.gate(x)
    torch.testing.assert_close(smaller.network({"input": x})[0], wanted, rtol=1e-3, atol=1e-4)


def test_a_gate_of_another_tensor_is_no_function() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, input: Tensor) -> Tensor:
            x = self.a(input)
            return x * torch.sigmoid(self.b(x)) + torch.sigmoid(x)

    found = activations(Network(Gated(), {"input": torch.randn(4, 8)}).traced)
    assert [str(one.node.target) for one in found] == ["aten.sigmoid.default"] * 2


def test_scores_are_shown_with_every_function() -> None:
    network, x = mlp(), torch.randn(64, 4)
    fits = fit_lines(network, [{"input": x}])
    smaller = tinier.linearize(network, None, x, count=1, score="fit")
    assert smaller.plan.edits[0].row() == ("1", f"16 lines, score {fits['1'].error:.2g}")
    text = str(smaller)
    assert f"1 {fits['1'].error:.2g}" in text and f"3 {fits['3'].error:.2g} (stays)" in text
    assert Plan.from_json(smaller.plan.to_json()) == smaller.plan
    again = tinier.linearize(network, None, x, count=2)
    first, second = (edit for edit in again.plan.edits if isinstance(edit, Linearize))
    changes = output_change(
        network, {one: fits[one.name].line for one in activations(network.traced)}, [{"input": x}]
    )
    assert second.score == pytest.approx(changes, rel=1e-6)  # with both lines in place
    assert first.score is not None and first.score < changes


def test_nothing_leaves_for_nothing() -> None:
    """Two convolutions of 3 × 3 are cheaper than one of 5 × 5: a line between them gains nothing, unless it is asked for."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    x = torch.randn(16, 4, 9, 9)
    kept = tinier.linearize(module, x[:2], x)
    assert kept.plan == Plan() and "nothing leaves" in str(kept)
    with torch.no_grad():
        assert torch.equal(kept.network({"input": x})[0], module(x))
    asked = tinier.linearize(module, x[:2], x, keep=0)
    assert [edit.kind for edit in asked.plan.edits] == ["linearize"]
    assert "lines alone save no MACs" in str(asked)
    # Of a block with both kinds, the one that merges leaves, though the other's line fits better.
    wide = nn.Sequential(nn.Conv2d(4, 32, 1), nn.GELU(), nn.Conv2d(32, 4, 1))
    with torch.no_grad():
        module.get_parameter("0.bias").add_(100)
    both = nn.Sequential(module, nn.MaxPool2d(1), wide).eval()
    smaller = tinier.linearize(both, x[:2], x)
    assert [edit.row()[0] for edit in smaller.plan.edits] == ["2.1", "2.0.weight · 2.2.weight"]
    assert "1 of 2 activation functions left, 1 pair of layers became one" in str(smaller)


def test_linear_layers_of_gpt2_become_one_in_their_class() -> None:
    """Their weights are transposed, their rows flattened, and their GELU is written by hand."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2)
    module = transformers.GPT2Model(config).eval()
    ids = torch.randint(0, 50, (16, 6))
    smaller = tinier.linearize(module, {"input_ids": ids[:2]}, {"input_ids": ids})
    lines, merged = smaller.plan.edits
    assert isinstance(lines, Linearize) and isinstance(merged, Merge)
    made: Any = smaller.model
    assert type(made) is type(module)
    layer = made.get_submodule(lines.activation.rpartition(".")[0])
    assert layer.c_fc.weight.shape == (16, 16) and isinstance(layer.c_proj, nn.Identity)
    straight = Plan((lines,)).apply(smaller.original)
    for found, wanted in zip(
        smaller.network({"input_ids": ids}), straight({"input_ids": ids}), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
