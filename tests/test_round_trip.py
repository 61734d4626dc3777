"""Quantize/dequantize pairs in one go, against torch's two operators."""

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx

from tinier.graph.rerun import Rerun
from tinier.graph.walk import Walk, outputs_of

pairs = torch.ops.quantized_decomposed


def graph(scale: float, zero: int, low: int, high: int, kind: torch.dtype) -> fx.GraphModule:
    made = fx.Graph()
    x = made.placeholder("x")
    numbers = (scale, zero, low, high, kind)
    q = made.call_function(pairs.quantize_per_tensor.default, (x, *numbers))
    y = made.call_function(pairs.dequantize_per_tensor.default, (q, *numbers))
    z = made.call_function(torch.ops.aten.mul.Tensor, (y, y))
    # This one is read as integers, too, and stays as it is.
    integers = made.call_function(pairs.quantize_per_tensor.default, (z, *numbers))
    back = made.call_function(pairs.dequantize_per_tensor.default, (integers, *numbers))
    made.output((z, back, integers))
    return fx.GraphModule({}, made)


@pytest.mark.parametrize(
    "numbers",
    [
        (0.037, 11, 0, 255, torch.uint8),
        (0.5, -3, -128, 127, torch.int8),
        (1e-4, 0, -32768, 32767, torch.int16),
    ],
)
def test_pairs_are_those_of_torch_to_the_bit(
    numbers: tuple[float, int, int, int, torch.dtype],
) -> None:
    module = graph(*numbers)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 170, 90, generator=random) * 3
    x[0, 0] = (torch.arange(170 * 90).view(170, 90) % 60 - 30) * 0.25  # halves of steps of 0.5
    x = x.transpose(2, 3)
    wanted: tuple[Tensor, ...] = module(x)
    for found in (outputs_of(module, [[x]])[0], Rerun(module, [x]).outputs):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert found[2].dtype == numbers[4]


def test_batches_that_come_later_get_what_the_others_have() -> None:
    module = graph(0.1, 4, 0, 255, torch.uint8)
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    walk = Walk(module, [[x[:2]]])
    for _ in range(3):
        node = walk.step()
    walk.change(node, lambda value: value + 1)
    walk.step()
    walk.add([[x[2:]]])
    assert [len(values) for values in walk.values] == [1, 1]  # what nothing reads any more is gone
    while walk.next() is not None:
        walk.step()
    first = module(x)[0].sqrt().mul(torch.sign(x))  # ± what the first pair gives
    wanted = (first + 1).square()
    found = torch.cat([outputs[0] for outputs in walk.outputs])
    assert torch.allclose(found, wanted, atol=1e-5)
