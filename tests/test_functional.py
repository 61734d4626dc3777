"""Writes in place become ordinary operators where nobody could tell, and stay where somebody could."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tinier.graph.trace import trace


class Masked(torch.autograd.Function):
    """A softmax that writes into its own output, with a gradient of its own, as DeBERTa's."""

    @staticmethod
    def forward(context, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        result = torch.softmax(x, -1)
        result.masked_fill_(x < 0, 0)
        context.save_for_backward(result)
        return result

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        (result,) = context.saved_tensors
        return torch._softmax_backward_data(gradient, result, -1, result.dtype)


class Net(nn.Module):
    """A layer, and something that is done with what comes out."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.after = nn.Linear(4, 6), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(x))


def chain(y: Tensor) -> Tensor:
    y.relu_().add_(1.0)
    return y * 2


def read_before_and_after(y: Tensor) -> Tensor:
    before = y + 1
    y.mul_(3.0)
    return before + y


def through_a_view(y: Tensor) -> Tensor:
    y[:, :2].add_(5.0)
    return y.sigmoid()


def with_a_view(y: Tensor) -> Tensor:
    view = y[:, 1:]
    y.mul_(2.0)
    return view + y[:, :5]


def through_dropout(y: Tensor) -> Tensor:
    same = nn.functional.dropout(y, 0.5, False)
    same.mul_(2.0)
    return y + same


def integers(y: Tensor) -> Tensor:
    counts = (y > 0).long()
    counts.mul_(3)
    return y * counts


def through_einsum(y: Tensor) -> Tensor:
    view = torch.einsum("bt->tb", y)  # a view, of which no schema tells
    view.relu_()
    return y * 2


def power(y: Tensor) -> Tensor:
    return y.pow_(2) + 1


WAYS = {
    "through_einsum": through_einsum,
    "power": power,
    "softmax": Masked.apply,
    "chain": chain,
    "read_before_and_after": read_before_and_after,
    "through_a_view": through_a_view,
    "with_a_view": with_a_view,
    "through_dropout": through_dropout,
    "integers": integers,
}
STAY = {"power", "through_einsum", "through_a_view", "with_a_view", "through_dropout", "integers"}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_computed_stays(way: str) -> None:
    module = Net(WAYS[way]).eval()
    traced = trace(module, {"x": torch.randn(2, 4)}).module
    x = torch.randn(5, 4)
    assert torch.equal(traced(x=x)[0], module(x))
    writes = [
        node
        for node in traced.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ]
    assert bool(writes) == (way in STAY)


def test_a_graph_that_wrote_into_a_softmax_can_be_trained() -> None:
    module = Net(Masked.apply).eval()
    traced = trace(module, {"x": torch.randn(2, 4)}).module
    traced(x=torch.randn(3, 4))[0].square().sum().backward()
    gradient = traced.get_parameter("layer.weight").grad
    assert gradient is not None and bool(gradient.abs().sum() > 0)
