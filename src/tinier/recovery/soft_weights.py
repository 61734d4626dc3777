"""A weight between two integers, and the runs of a graph that it is learned in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tinier.edits.pairs import as_matrix, from_matrix
from tinier.graph.fold import read
from tinier.modules.fake_quantize import WeightQuantizer
from tinier.recovery.segments import Runner
from tinier.tensors.grid import Grid
from tinier.tensors.rounding import hard_rounded, soft_rounded, start_rounding
from tinier.tensors.saturation import PAIR_LIMIT, lowered, pair_sums


@dataclass
class SoftWeight:
    """A weight whose rounding is learned.

    Attributes:
        name: of the parameter.
        call: where its quantizer is called.
        own: the quantizer.
        parameter: w / u.
        start: its value before.
        grid: of the weight.
        matrix: (m, n) w.
        v: (m, n) V.
        saturation_free: no pair of its integers may saturate a 16-bit sum.
    """

    name: str
    call: fx.Node
    own: WeightQuantizer
    parameter: Tensor
    start: Tensor
    grid: Grid
    matrix: Tensor
    v: Tensor
    saturation_free: bool

    @classmethod
    def of(
        cls, module: nn.Module, call: fx.Node, own: nn.Module, saturation_free: bool
    ) -> "SoftWeight":
        """The weight that a quantizer is called on, rounded to nearest."""
        assert isinstance(own, WeightQuantizer)
        (source,) = call.all_input_nodes
        parameter = read(module, str(source.target))
        assert parameter is not None
        grid = Grid(own.step().detach(), own.zero_point, own.integers)
        matrix = as_matrix(parameter.detach() * own.unit, own.axis).contiguous()
        v = start_rounding(matrix, grid).requires_grad_()
        start = parameter.detach().clone()
        # Depthwise convolutions, whose kernels do not saturate, are not bounded to begin with.
        rows = grid.quantize(matrix).reshape(start.movedim(own.axis, 0).shape)
        bounded = saturation_free and rows.dtype == torch.int8
        bounded = bounded and int(pair_sums(rows).max()) <= PAIR_LIMIT
        return cls(str(source.target), call, own, parameter, start, grid, matrix, v, bounded)

    def soft(self, _: Tensor) -> Tensor:
        """ŵ(V)."""
        return from_matrix(soft_rounded(self.matrix, self.v, self.grid), self.start, self.own.axis)

    def integers(self) -> Tensor:
        """(m, n) what V rounds to."""
        found = hard_rounded(self.matrix, self.v.detach(), self.grid)
        if not self.saturation_free:
            return found
        rows = found.reshape(self.start.movedim(self.own.axis, 0).shape)
        return lowered(rows).flatten(1)

    def take(self) -> None:
        """The network computes with these integers."""
        value = from_matrix(self.grid.dequantize(self.integers()), self.start, self.own.axis)
        with torch.no_grad():
            self.parameter.copy_(value / self.own.unit)

    def give_back(self) -> None:
        """The network computes with the weight as it was."""
        with torch.no_grad():
            self.parameter.copy_(self.start)


class SoftRunner(Runner):
    """Runs the graph with other functions in place of some quantizers."""

    def __init__(
        self, module: fx.GraphModule, instead: Mapping[fx.Node, Callable[[Tensor], Tensor]]
    ) -> None:
        super().__init__(module)
        self.instead = instead

    def run_node(self, node: fx.Node) -> Any:
        """The value of an operator whose inputs are known."""
        if node in self.instead:
            return self.instead[node](self.env[node.all_input_nodes[0]])
        return super().run_node(node)
