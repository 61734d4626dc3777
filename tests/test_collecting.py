"""What quantization collects of activations, against direct computation, whatever the batches."""

import gc
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from networks import build, inputs
from tinier.errors import InputError
from tinier.graph.fold import fold
from tinier.network import Network
from tinier.statistics import Statistics, collect, floating_activations, observe
from tinier.tensors.affine import Integers
from tinier.tensors.ranges import RULES, activation_range

aten = torch.ops.aten
NAMES = ["residual_cnn", "grouped_cnn", "vit", "encoder", "lstm"]


def split(
    data: dict[str, Tensor], size: int, order: Tensor | None = None
) -> list[dict[str, Tensor]]:
    count = len(next(iter(data.values())))
    order = torch.arange(count) if order is None else order
    return [
        {name: value[order[i : i + size]] for name, value in data.items()}
        for i in range(0, count, size)
    ]


def values(network: Network, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every value of the folded graph, of all examples in one run."""
    found = {}

    class Keep(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            result = super().run_node(node)
            if isinstance(result, Tensor):
                found[node.name] = result.detach()
            return result

    with torch.no_grad():
        Keep(fold(network.traced.module)).run(*(data[name] for name in network.traced.inputs))
    return found


def assert_same(one: Statistics, other: Statistics, exactly: bool) -> None:
    assert one.examples == other.examples
    assert list(one.activations) == list(other.activations)
    for name, a in one.activations.items():
        b = other.activations[name]
        assert (a.parts, a.count, a.exponent) == (b.parts, b.count, b.exponent)
        if exactly:
            assert torch.equal(a.counts, b.counts)
            assert (a.low, a.high, a.zeros) == (b.low, b.high, b.zeros)
        # A value on the edge of a bin may be rounded to the next one where another kernel ran.
        moved = int((a.counts.cumsum(0) - b.counts.cumsum(0)).abs().max())
        assert moved <= max(2, a.count // 1000)
        assert a.mean_ends == pytest.approx(b.mean_ends, rel=1e-5, abs=1e-6)
        assert (a.low, a.high) == pytest.approx((b.low, b.high), rel=1e-5, abs=1e-6)
        for rule in set(RULES) - {"entropy", "importance"}:
            ranges = [activation_range(h, Integers.unsigned(8), rule) for h in (a, b)]
            width = 2.0**a.exponent
            assert ranges[0] == pytest.approx(ranges[1], abs=3 * width), (name, rule)
    for name, columns in one.columns.items():
        assert torch.allclose(columns.squares, other.columns[name].squares, rtol=1e-5)
    for name, axes in one.channels.items():
        for axis, ends in axes.items():
            assert torch.allclose(ends.low, other.channels[name][axis].low, atol=1e-5)
            assert torch.allclose(ends.high, other.channels[name][axis].high, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_depend_on_neither_batches_nor_order(name: str) -> None:
    network = build(name)
    data = inputs(name, 70, seed=3)
    needs = ("channels", "columns")
    whole = collect(network, split(data, 64), needs=needs)
    for size in (1, 7):
        assert_same(collect(network, split(data, size), needs=needs), whole, exactly=True)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    assert_same(collect(network, split(data, 7, order), needs=needs), whole, exactly=False)


def test_gram_matrices_of_some_examples_are_those_of_these_examples_alone() -> None:
    network, data = build("residual_cnn"), inputs("residual_cnn", 40, seed=3)
    module = fold(network.traced.module)
    positions = {
        node.name: math.prod(node.meta["val"].shape[2:])
        for node in module.graph.nodes
        if node.target is aten.conv2d.default
    }
    rows = min(positions.values())
    found = observe(network, split(data, 40), {"gram"}, rows=rows).grams
    positions = {name: count for name, count in positions.items() if name in found}
    assert len({positions[name] // rows for name in positions}) > 1
    for name, count in positions.items():
        every = min(count // rows, 8)
        alone = observe(network, split({k: v[::every] for k, v in data.items()}, 40), {"gram"})
        assert found[name].rows == alone.grams[name].rows == count * len(range(0, 40, every))
        scale = float(alone.grams[name].products.abs().max())
        for size in (40, 1, 7):
            other = observe(network, split(data, size), {"gram"}, rows=rows).grams[name]
            assert torch.allclose(other.products, alone.grams[name].products, atol=1e-5 * scale)


def test_a_sample_depends_on_no_batches_and_has_the_ends_of_all_values() -> None:
    network, data = build("residual_cnn"), inputs("residual_cnn", 70, seed=3)
    whole = collect(network, split(data, 64))
    found = collect(network, split(data, 64), most=50)
    for size in (1, 7):
        assert_same(collect(network, split(data, size), most=50), found, exactly=True)
    for name, histogram in found.activations.items():
        other = whole.activations[name]
        assert (histogram.low, histogram.high) == (other.low, other.high)
        assert histogram.mean_ends == pytest.approx(other.mean_ends)
        size = other.count // 70
        # Every n-th value, where n has no factor in common with their number; each counts n times.
        every = next(n for n in range(-(-size // 50), 1000) if math.gcd(n, size) == 1)
        assert abs(histogram.count - other.count) < every
        assert not bool((histogram.counts % every).any())


@pytest.mark.parametrize("name", NAMES)
def test_every_activation_channel_and_column_is_that_of_one_run(name: str) -> None:
    network = build(name)
    data = inputs(name, 5, seed=4)
    nodes = floating_activations(network)
    found = collect(network, split(data, 2), nodes, ("channels", "columns"))
    direct = values(network, data)
    assert list(found.activations) == nodes
    module = fold(network.traced.module)
    for node in nodes:
        histogram, x = found.activations[node], direct[node].float()
        assert histogram.count == x.numel()
        assert histogram.low == pytest.approx(float(x.min()), abs=1e-5)
        assert histogram.high == pytest.approx(float(x.max()), abs=1e-5)
        for axis, ends in found.channels[node].items():
            flat = x.movedim(axis, 0).flatten(1)
            assert torch.allclose(ends.low, flat.amin(1), atol=1e-5)
            assert torch.allclose(ends.high, flat.amax(1), atol=1e-5)
    fed = {node.name: multiplied(node, direct) for node in module.graph.nodes}
    expected = {name: rows.double() for name, rows in fed.items() if rows is not None}
    # Those of recurrent layers, of each weight apart, have a test of their own beside the ranges that need them.
    assert {key for key in found.columns if ":" not in key} == expected.keys()
    for name, x in expected.items():
        columns = found.columns[name]
        assert columns.count == len(x)
        assert torch.allclose(columns.squares / columns.count, x.square().mean(0), rtol=1e-4)
        assert torch.allclose(columns.total / columns.count, x.mean(0), rtol=1e-4, atol=1e-5)


def multiplied(node: fx.Node, direct: dict[str, Tensor]) -> Tensor | None:
    """Rows that a layer multiplies its weights with, (rows, columns); None for other operators."""
    args: list[Any] = [
        direct.get(arg.name) if isinstance(arg, fx.Node) else arg for arg in node.args
    ]
    if node.target is aten.linear.default:
        return args[0].flatten(0, -2)
    if node.target is aten.conv2d.default:
        defaults: list[Any] = [None, None, None, [1, 1], [0, 0], [1, 1]]
        x, weight, _, stride, padding, dilation = [*args, *defaults[len(args) :]][:6]
        windows = F.unfold(x, weight.shape[2:], dilation, padding, stride)
        return windows.movedim(1, -1).flatten(0, 1)
    return None


def test_columns_are_the_diagonal_of_the_gram_matrix() -> None:
    network = build("mlp")
    data = inputs("mlp", 9)
    columns = collect(network, [data], needs=["columns"]).columns
    grams = observe(network, [data], ["gram"]).grams
    assert set(columns) >= set(grams) != set()
    for name, gram in grams.items():
        diagonal = gram.products.diagonal(dim1=1, dim2=2).flatten()
        assert torch.allclose(columns[name].squares, diagonal, rtol=1e-5)


def test_examples_are_found_where_the_batch_is_no_first_dimension() -> None:
    """Sequence first inside: the mean over examples is over the second dimension there."""

    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.transpose(0, 1) * 2).transpose(0, 1)

    network = Network(Turned(), {"x": torch.randn(2, 4, 3)})
    x = torch.randn(50, 4, 3, generator=torch.Generator().manual_seed(0))
    nodes = floating_activations(network)
    found = collect(network, [{"x": x}], nodes)
    lows, highs = x.amin((1, 2)).double().mean(), x.amax((1, 2)).double().mean()
    for node in nodes:
        factor = 1 if node in ("x", "transpose") else 2
        ends = (factor * float(lows), factor * float(highs))
        assert found.activations[node].mean_ends == pytest.approx(ends, rel=1e-6)
        assert found.activations[node].parts == 50


def test_memory_does_not_grow_with_examples() -> None:
    network = build("residual_cnn")
    nodes = floating_activations(network)
    alive = []

    def examples() -> Iterator[dict[str, Tensor]]:
        for batch in range(40):
            yield inputs("residual_cnn", 32)
            if batch in (2, 39):
                alive.append(bytes_of_tensors())

    collect(network, examples(), nodes, ("channels", "columns"))
    assert alive[0] == alive[1]


def bytes_of_tensors() -> int:
    """Of all tensors that anything in this process still holds."""
    gc.collect()
    return sum(x.numel() * x.element_size() for x in gc.get_objects() if type(x) is Tensor)


def test_what_is_not_finite_is_refused_unless_it_is_only_looked_at() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x > 0, float("-inf")).softmax(-1)

    network = Network(Masked(), {"x": torch.randn(2, 6)})
    nodes = floating_activations(network)
    found = collect(network, [{"x": torch.randn(9, 6)}], nodes).activations
    finite = [histogram.finite for histogram in found.values()]
    assert finite[0] and not all(finite)


def test_unknown_nodes_and_needs_are_refused() -> None:
    network, data = build("mlp"), [inputs("mlp", 3)]
    with pytest.raises(InputError, match="nodes: nowhere is no floating-point activation of"):
        collect(network, data, ["nowhere"])
    with pytest.raises(InputError, match="needs: rows: unknown; there are channels, columns"):
        collect(network, data, needs=["rows"])
