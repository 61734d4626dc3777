"""Store weights as integers, and round activations to them: quantize/dequantize pairs in the traced graph."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinier.edits.base import Edit, Values
from tinier.edits.pairs import (
    as_matrix,
    insert_pair,
    insert_rounding,
    name_outputs,
    store_biases,
    store_weight,
)
from tinier.errors import RefusedError
from tinier.graph.dynamic import round_dynamically, round_tokens
from tinier.graph.fold import fold, pruned, read
from tinier.network import Network
from tinier.tensors.affine import Integers, fake_quantize
from tinier.tensors.grid import Grid

STAGE = "quantize"


@dataclass(frozen=True)
class Quantize(Edit):
    """Round an activation: x̂ = s · (clamp(round(x / s) + z, low, high) − z).

    Attributes:
        tensor: a node of the traced graph, batch norms folded.
        scale: s, float32.
        zero_point: z.
        low, high: the integers.
        readers: nodes that read the rounded values; empty for all.
    """

    kind: ClassVar[str] = "quantize"
    stage: ClassVar[str] = STAGE
    of_artifact: ClassVar[bool] = True

    tensor: str
    scale: float
    zero_point: int
    low: int
    high: int
    readers: tuple[str, ...] = ()

    @property
    def integers(self) -> Integers:
        """The integers that the values become."""
        return Integers(self.low, self.high)

    def rounded(self, value: Tensor) -> Tensor:
        """What the readers read where the activation is ``value``, of the same shape."""
        scale, zero_point = torch.tensor(self.scale), torch.tensor(self.zero_point)
        return fake_quantize(value, scale, zero_point, self.integers)

    def row(self) -> tuple[str, str]:
        bits = self.integers.steps.bit_length()
        what = f"{bits} bits, {self.low} … {self.high}"
        return self.tensor, f"{what}, scale {self.scale:.3g}, zero point {self.zero_point}"

    @classmethod
    def apply_all(cls, edits: list[Edit], network: Network) -> Network:
        """See `quantized`."""
        return quantized(edits, network)


@dataclass(frozen=True)
class QuantizeDynamically(Edit):
    """Round an activation to 8 bits in the range that it has at each run: ONNX's DynamicQuantizeLinear, or one scale for each row.

    Attributes:
        tensor: a node of the traced graph, batch norms folded.
        readers: nodes that read the rounded values; empty for all.
        per_token: each row of the last axis has a scale of its own, and no zero point.
    """

    kind: ClassVar[str] = "quantize_dynamically"
    stage: ClassVar[str] = STAGE
    of_artifact: ClassVar[bool] = True

    tensor: str
    readers: tuple[str, ...] = ()
    per_token: bool = False

    def rounded(self, value: Tensor) -> Tensor:
        """What the readers read where the activation is ``value``, of the same shape."""
        found: Tensor = (round_tokens if self.per_token else round_dynamically)(value)
        return found

    def row(self) -> tuple[str, str]:
        if self.per_token:
            return self.tensor, "8 bits, −127 … 127, range of each row at each run"
        return self.tensor, "8 bits, 0 … 255, range of each run"

    @classmethod
    def apply_all(cls, edits: list[Edit], network: Network) -> Network:
        """See `quantized`."""
        return quantized(edits, network)


@dataclass(frozen=True)
class QuantizeWeight(Edit):
    """Store a weight as integers: ŵ = s · (q − z), one s and z for each channel or group of its inputs.

    Attributes:
        tensor: the parameter's name in the traced graph, batch norms folded.
        scale: (m or 1, groups) float32; a row for each slice along ``axis``, the other dimensions as columns in groups of neighbours.
        zero_point: like ``scale``, int64.
        low, high: the integers.
        axis: dimension of the channels.
        readers: nodes that read the integers; empty for all.
        integers: the chosen q, (m, n), of the type of the integers; None rounds to nearest.
    """

    kind: ClassVar[str] = "quantize_weight"
    stage: ClassVar[str] = STAGE
    of_artifact: ClassVar[bool] = True

    tensor: str
    scale: Values
    zero_point: Values
    low: int
    high: int
    axis: int = 0
    readers: tuple[str, ...] = ()
    integers: Values | None = None

    @property
    def grid(self) -> Grid:
        """The values that the weight can take."""
        return Grid(self.scale.tensor, self.zero_point.tensor, Integers(self.low, self.high))

    def matrix(self, weight: Tensor) -> Tensor:
        """(m, n) integers for a weight of the parameter's shape."""
        if self.integers is not None:
            return self.integers.tensor
        return self.grid.quantize(as_matrix(weight.detach(), self.axis))

    def row(self) -> tuple[str, str]:
        bits = (self.high - self.low).bit_length()
        scale = self.scale.tensor
        count = f"{scale.numel()} scales" if scale.numel() > 1 else "one scale"
        ends = f"{float(scale.min()):.3g} … {float(scale.max()):.3g}"
        chosen = "" if self.integers is None else ", rounding chosen"
        return self.tensor, f"{bits} bits, {self.low} … {self.high}, {count} {ends}{chosen}"

    @classmethod
    def apply_all(cls, edits: list[Edit], network: Network) -> Network:
        """See `quantized`."""
        return quantized(edits, network)


def quantized(edits: list[Edit], network: Network) -> Network:
    """The traced graph with batch norms folded, integer weights and a pair after each quantized activation.

    Raises:
        RefusedError: the network is quantized already, has no such node or parameter, or a weight has another shape.
    """
    traced = network.traced
    refuse_quantized(network)
    module = fold(traced.module)
    nodes = {node.name: node for node in module.graph.nodes}
    activations = [edit for edit in edits if isinstance(edit, Quantize)]
    weights = [edit for edit in edits if isinstance(edit, QuantizeWeight)]
    dynamic = [edit for edit in edits if isinstance(edit, QuantizeDynamically)]
    for name in [edit.tensor for edit in activations] + [edit.tensor for edit in dynamic]:
        if name not in nodes:
            raise RefusedError(f"{network.name} has no value {name} to quantize")
    matrices = [_matrix(edit, read(module, edit.tensor), network) for edit in weights]
    # The integer operators of runtimes multiply weights with one scale a channel and no zero point.
    plain = {
        edit.tensor: edit.scale.tensor.expand(len(matrix), 1)[:, 0]
        for edit, matrix in zip(weights, matrices, strict=True)
        if edit.scale.tensor.shape[1] == 1 and not bool(edit.zero_point.tensor.any())
    }
    store_biases(module, {edit.tensor: edit.scale for edit in activations}, plain)
    for edit in activations:
        numbers = (edit.scale, edit.zero_point, edit.integers)
        insert_pair(nodes[edit.tensor], *numbers, edit.readers)
    for each in dynamic:
        insert_rounding(nodes[each.tensor], each.readers, each.per_token)
    for one, matrix in zip(weights, matrices, strict=True):
        grid = one.grid
        numbers_of = (grid.scale, grid.zero_point, grid.integers)
        store_weight(module, one.tensor, matrix, *numbers_of, one.axis, one.readers)
    name_outputs(module, traced)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    return Network(pruned(module), network.example, network.name, network.folder)


def _matrix(edit: QuantizeWeight, weight: Tensor | None, network: Network) -> Tensor:
    if weight is None:
        raise RefusedError(f"{network.name} has no parameter {edit.tensor} to quantize")
    rows, columns = as_matrix(weight, edit.axis).shape
    scale = edit.scale.tensor
    if scale.shape[0] not in (1, rows) or columns % scale.shape[1]:
        raise RefusedError(
            f"{edit.tensor}: scales of shape {tuple(scale.shape)} do not fit {rows} channels of {columns} weights"
        )
    if scale.shape[1] > 1 and weight.ndim != 2:
        raise RefusedError(
            f"{edit.tensor}: groups of inputs are for weights of two dimensions; this one has {weight.ndim}"
        )
    matrix = edit.matrix(weight)
    if matrix.shape != (rows, columns):
        raise RefusedError(
            f"{edit.tensor}: integers of shape {tuple(matrix.shape)}, {(rows, columns)} is needed"
        )
    if bool((matrix < edit.low).any() or (matrix > edit.high).any()):
        raise RefusedError(f"{edit.tensor}: integers outside {edit.low} … {edit.high}")
    return matrix


def refuse_quantized(network: Network) -> None:
    """Raise RefusedError for a network that is quantized already."""
    for node in network.traced.module.graph.nodes:
        if str(node.target).startswith("quantized_decomposed"):
            raise RefusedError(
                f"{network.name} is quantized already (at {node.name}); quantize the float network"
            )
