"""Linear layers and convolutions of a graph as what they are: y = W x + b for every row of a matrix of inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tinier.graph.rules import argument, operator_name


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution whose weight is a parameter.

    Attributes:
        node: where it is computed.
        source: its input.
        weight: name of the parameter.
        bias: name of the parameter, None if there is none.
        kind: "linear" (weight (m, n)), "matmul" (weight (n, m) or (g, n, m)), "convolution" or "transposed".
        groups: g; 1 but for grouped convolutions and batched products.
        stride, padding, dilation, after: of a convolution, one for each spatial dimension; ``after`` is its output padding.
    """

    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    kind: str
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def matrix(self, weight: Tensor) -> Tensor:
        """The parameter as (g, m, n): outputs by inputs."""
        if self.kind == "linear":
            return weight[None]
        if self.kind == "matmul":
            return (weight if weight.ndim == 3 else weight[None]).mT
        if self.kind == "convolution":
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        flipped = weight.flip(list(range(2, weight.ndim)))
        grouped = flipped.reshape(self.groups, -1, *weight.shape[1:])  # (g, n/k, m, *kernel)
        return grouped.transpose(1, 2).flatten(2)

    def parameter(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """A matrix as a parameter of that shape: the inverse of ``matrix``."""
        if self.kind == "transposed":
            outputs, kernel = shape[1], tuple(shape[2:])
            grouped = matrix.reshape(self.groups, outputs, -1, *kernel).transpose(1, 2)
            return grouped.reshape(*shape).flip(list(range(2, len(shape))))
        return (matrix.mT if self.kind == "matmul" else matrix).reshape(*shape)

    def rows(self, y: Tensor) -> int:
        """How many rows an output tensor has."""
        channels = {"linear": -1, "matmul": -1}.get(self.kind, 1)
        groups = self.groups if self.kind == "matmul" else 1
        return y.numel() // y.shape[channels] // groups

    def outputs(self, y: Tensor, index: Tensor | None = None) -> Tensor:
        """Rows of the result, (g, rows, m); ``index`` picks rows."""
        if self.kind == "matmul" and self.groups > 1:
            return y if index is None else y[:, index]
        flat = y.flatten(0, -2) if y.ndim > 1 else y[None]
        if self.kind in ("convolution", "transposed"):
            flat = y.movedim(1, -1).flatten(0, -2)
        flat = flat if index is None else flat[index]
        return flat.unflatten(-1, (self.groups, -1)).transpose(0, 1)

    def inputs(self, x: Tensor, weight: Tensor, index: Tensor | None = None) -> Tensor:
        """Rows of the input, (g, rows, n), of which row i makes row i of the result; ``index`` picks rows."""
        if self.kind == "linear" or (self.kind == "matmul" and self.groups == 1):
            flat = x.flatten(0, -2) if x.ndim > 1 else x[None]
            return (flat if index is None else flat[index])[None]
        if self.kind == "matmul":
            return x if index is None else x[:, index]
        kernel = weight.shape[2:]
        windows = self._spread(x) if self.kind == "transposed" else x
        windows = F.pad(windows, [side for pair in reversed(self._pads(kernel)) for side in pair])
        steps = (1,) * len(kernel) if self.kind == "transposed" else self.stride
        for dim, (size, step, dilation) in enumerate(
            zip(kernel, steps, self.dilation, strict=True), start=2
        ):
            windows = windows.unfold(dim, (size - 1) * dilation + 1, step)[..., ::dilation]
        spatial = len(kernel)
        order = (0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
        windows = windows.permute(order)  # (batch, *positions, channels, *kernel)
        shape = windows.shape[: 1 + spatial]
        if index is None:
            index = torch.arange(prod(shape))
        picked = windows[torch.unravel_index(index, shape)]  # (rows, channels, *kernel)
        return picked.reshape(len(index), self.groups, -1).transpose(0, 1)

    def _spread(self, x: Tensor) -> Tensor:
        """Zeros between the positions of the input, which make a transposed convolution a plain one."""
        sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], self.stride, strict=True)]
        result = x.new_zeros(*x.shape[:2], *sizes)
        every = tuple(slice(None, None, step) for step in self.stride)
        result[(slice(None), slice(None), *every)] = x
        return result

    def _pads(self, kernel: Sequence[int]) -> list[tuple[int, int]]:
        if self.kind == "convolution":
            return list(self.padding)
        return [
            (d * (k - 1) - before, d * (k - 1) - before + extra)
            for k, d, (before, _), extra in zip(
                kernel, self.dilation, self.padding, self.after, strict=True
            )
        ]


def linear_layer(node: fx.Node) -> Layer | None:
    """The node as a linear layer or convolution; None if it is none, or its weight is not a parameter."""
    if node.op != "call_function":
        return None
    name = operator_name(node)
    if name == "linear":
        return _made(node, 0, 1, argument(node, 2, "bias"), "linear")
    if name in ("matmul", "mm", "bmm"):
        return _made(node, 0, 1, None, "matmul")
    if name == "addmm" and not node.kwargs:
        return _made(node, 1, 2, node.args[0], "matmul")
    if name in ("conv1d", "conv2d", "conv3d", "convolution", "_convolution") or name.startswith(
        "conv_transpose"
    ):
        return _convolution(node, name)
    return None


def _made(
    node: fx.Node, source: int, weight: int, bias: Any, kind: str, **rest: Any
) -> Layer | None:
    x, w = node.args[source], node.args[weight]
    if not (isinstance(x, fx.Node) and isinstance(w, fx.Node) and w.op == "get_attr"):
        return None
    if bias is not None and not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
        return None
    rank, length = w.meta["val"].ndim, x.meta["val"].ndim
    if kind == "linear" and rank != 2:
        return None
    if kind == "matmul":
        if not (rank == 2 or (rank == 3 and length == 3)) or length < 2:
            return None
        rest["groups"] = int(w.meta["val"].shape[0]) if rank == 3 else 1
    name = None if bias is None else str(bias.target)
    return Layer(node, x, str(w.target), name, kind, **rest)


def _convolution(node: fx.Node, name: str) -> Layer | None:
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.meta["val"].ndim != node.meta["val"].ndim:
        return None  # an input without a batch
    spatial = weight.meta["val"].ndim - 2
    bias = argument(node, 2, "bias")
    stride, padding = argument(node, 3, "stride", 1), argument(node, 4, "padding", 0)
    after: Any = 0
    if name in ("convolution", "_convolution"):
        dilation, after = argument(node, 5, "dilation"), node.args[7]
        groups: Any = node.args[8]
        transposed = bool(node.args[6])
    elif name.startswith("conv_transpose"):
        after, groups = argument(node, 5, "output_padding", 0), argument(node, 6, "groups", 1)
        dilation, transposed = argument(node, 7, "dilation", 1), True
    else:
        dilation, groups = argument(node, 5, "dilation", 1), argument(node, 6, "groups", 1)
        transposed = False
    dilations, kernel = _each(dilation, spatial), weight.meta["val"].shape[2:]
    if padding == "same":
        whole = [d * (int(k) - 1) for d, k in zip(dilations, kernel, strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in whole)
    else:
        pads = tuple((p, p) for p in _each(0 if padding == "valid" else padding, spatial))
    kind = "transposed" if transposed else "convolution"
    return _made(
        node,
        0,
        1,
        bias,
        kind,
        groups=int(groups),
        stride=_each(stride, spatial),
        padding=pads,
        dilation=dilations,
        after=_each(after, spatial),
    )


def _each(value: Any, count: int) -> tuple[int, ...]:
    if isinstance(value, list | tuple):
        found = tuple(int(item) for item in value)
        return found * count if len(found) == 1 else found
    return (int(value),) * count
