"""Ranges of weights by importance: from moments of columns, in flat memory, as from whole Gram matrices."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import tinier
from networks import build, inputs
from tinier.edits.quantize import QuantizeWeight
from tinier.errors import DataError, InputError
from tinier.methods.quantization import Quantization
from tinier.network import Network
from tinier.statistics import Statistics, collect, observe
from tinier.tensors.grid import choose


def edits(method: Quantization, network: Network, statistics: Statistics) -> list[QuantizeWeight]:
    plan = method.plan(network, statistics)
    return [edit for edit in plan.edits if isinstance(edit, QuantizeWeight)]


@pytest.mark.parametrize("name", ["residual_cnn", "grouped_cnn", "encoder"])
def test_columns_and_gram_matrices_give_the_same_grid(name: str) -> None:
    network, data = build(name), inputs(name, 12)
    columns = collect(network, [data], needs=["columns"])
    grams = replace(observe(network, [data], ["gram"]), activations=columns.activations)
    assert not columns.grams and not grams.columns
    alone = Quantization(bits=3, weight_ranges="importance")
    first, second = edits(alone, network, columns), edits(alone, network, grams)
    # Error feedback chooses other integers on the same grid, as its activations are integers, too.
    both = replace(grams, columns=columns.columns)
    fed = edits(replace(alone, rounding="error_feedback"), network, both)
    plain = edits(replace(alone, weight_ranges="mse"), network, columns)
    assert len(first) == len(second) == len(fed) > 2
    different, compared = 0, 0
    for a, b, c, d in zip(first, second, fed, plain, strict=True):
        torch.testing.assert_close(a.scale.tensor, c.scale.tensor)
        assert torch.equal(a.zero_point.tensor, b.zero_point.tensor)
        if all(reader in grams.grams for reader in a.readers):
            torch.testing.assert_close(a.scale.tensor, b.scale.tensor)
            compared += 1
        different += not torch.allclose(a.scale.tensor, d.scale.tensor)
    assert compared >= 2
    assert different > len(first) / 2, "importance matters"


def test_the_verb_collects_no_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 8), torch.randn(20, 6)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 3)).eval()
    x[:, 2] *= 20
    (first, _) = (
        edit
        for edit in tinier.quantize(
            model, x[:2], x, activations=None, bits=3, symmetric=True, weight_ranges="importance"
        ).plan.edits
        if isinstance(edit, QuantizeWeight)
    )
    weight = layer.weight.detach()
    importance = x.double().square().mean(0).float().expand_as(weight)
    expected = choose(weight, first.grid.integers, rule="mse", importance=importance)
    torch.testing.assert_close(first.scale.tensor, expected.scale)

    def none(*_: object, **__: object) -> None:
        raise AssertionError("a Gram matrix was asked for")

    monkeypatch.setattr("tinier.verbs.quantization.observe", none)
    tinier.quantize(model, x[:2], x, weight_ranges="importance")
    with pytest.raises(AssertionError, match="Gram"):
        tinier.quantize(model, x[:2], x, weight_ranges="importance", rounding="error_feedback")
    with pytest.raises(InputError, match="needs data"):
        tinier.quantize(model, x[:2], activations=None, weight_ranges="importance")


@pytest.mark.parametrize("need", ["columns", "gram"])
def test_the_kernel_of_a_transposed_convolution_is_not_turned_round(need: str) -> None:
    """Width 2, kernel 3, padding 1: y0 = x0 w1 + x1 w0 and y1 = x0 w2 + x1 w1. With x0 = 0 nothing is multiplied with w2."""
    first = nn.Conv1d(1, 2, 1, bias=False)  # Gram matrices are of what channel groups carry
    layer = nn.ConvTranspose1d(2, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[[1.0]], [[0.0]]]))
        layer.weight.copy_(torch.tensor([[[0.3, 0.1, 5.0]], [[0.0, 0.0, 0.0]]]))
    x = torch.tensor([[[0.0, 1.0]], [[0.0, 2.0]]])
    network = Network(nn.Sequential(first, layer), {"input": x})
    data = [{"input": x}]
    statistics = (
        observe(network, data, ["gram"])
        if need == "gram"
        else collect(network, data, (), needs=["columns"])
    )
    method = Quantization(bits=3, activations=None, weight_ranges="importance", exclude=("0",))
    quantized = method.plan(network, statistics).apply(network)
    assert torch.allclose(quantized(data[0])[0], network(data[0])[0], atol=0.05)


def test_statistics_that_say_nothing_or_are_not_finite() -> None:
    network, data = build("mlp"), inputs("mlp", 4)
    method = Quantization(weight_ranges="importance")
    found = collect(network, [data], needs=["columns"])
    with pytest.raises(InputError, match='needs=\\("columns",\\)'):
        method.plan(network, collect(network, [data]))
    moments = next(iter(found.columns.values()))
    moments.squares[0] = float("nan")
    with pytest.raises(DataError, match="NaN or infinity in what it is multiplied with"):
        method.plan(network, found)


class Both(nn.Module):
    """Two recurrent layers, each from both sides, with states of their own before the first step."""

    def __init__(self, kind: str, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = getattr(nn, kind)(5, 4, layers, batch_first=True, bidirectional=True)
        self.start = nn.Parameter(torch.randn(2 * layers, 1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = self.start.expand(-1, x.shape[0], -1).contiguous()
        state = (start, start) if isinstance(self.rnn, nn.LSTM) else start
        found: torch.Tensor = self.rnn(x, state)[0]
        return found


@pytest.mark.parametrize(("kind", "layers"), [("LSTM", 1), ("GRU", 1), ("RNN", 2)])
def test_moments_of_recurrent_layers_are_those_of_their_steps(kind: str, layers: int) -> None:
    model, x = Both(kind, layers).eval(), torch.randn(6, 7, 5)
    network = Network(model, {"x": x[:2]})
    found = collect(network, [{"x": x}], (), {"columns"}).columns
    squares = {key.partition(":")[2]: m.squares / m.count for key, m in found.items()}
    read: dict[str, list[torch.Tensor]] = {}
    values = x
    for layer in range(layers):  # by cells, a step after the other
        outputs = []
        for way, end in enumerate(("", "_reverse")):
            cell = getattr(nn, f"{kind}Cell")(values.shape[-1], 4)
            ends = {one: f"rnn.{one}_l{layer}{end}" for one in cell.state_dict()}
            own = model.state_dict()
            cell.load_state_dict({one: own[name] for one, name in ends.items()})
            hidden = model.start[2 * layer + way].expand(6, -1)
            state = (hidden, hidden) if kind == "LSTM" else hidden
            steps = range(7) if not way else range(6, -1, -1)
            seen: dict[int, torch.Tensor] = {}
            for t in steps:
                before = state[0] if isinstance(state, tuple) else state
                read.setdefault(ends["weight_hh"], []).append(before)
                read.setdefault(ends["weight_ih"], []).append(values[:, t])
                state = cell(values[:, t], state)
                seen[t] = state[0] if isinstance(state, tuple) else state
            outputs.append(torch.stack([seen[t] for t in range(7)], 1))
        values = torch.cat(outputs, 2).detach()
    first, last = ("l0", f"l{layers - 1}")
    wanted = [f"rnn.weight_ih_{first}{end}" for end in ("", "_reverse")]
    wanted += [f"rnn.weight_hh_{last}{end}" for end in ("", "_reverse")]
    assert set(squares) == set(wanted)
    for name in wanted:
        expected = torch.cat(read[name]).double().square().mean(0).detach()
        torch.testing.assert_close(squares[name], expected, rtol=1e-5, atol=1e-9)
