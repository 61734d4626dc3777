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

    def none(*_: object) -> None:
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
