"""Bits that a runtime takes, and in how many its files keep them: asked before any work, and by all that counts bytes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tinier.graph.dynamic import ROUND, ROUND_TOKENS
from tinier.graph.rules import operator_name


@dataclass(frozen=True)
class Precision:
    """What a runtime takes of quantized networks.

    Attributes:
        weights: bits of weights, alone or as factors of integer products.
        activations: bits of activations that are rounded to fixed ranges; empty for none.
        dynamic: activations may be rounded in the range of each run.
        containers: bits that the file keeps an integer in: the least that it fits.
        reason: why it takes no quantized network, where it takes none.
    """

    weights: tuple[int, ...] = ()
    activations: tuple[int, ...] = ()
    dynamic: bool = False
    containers: tuple[int, ...] = ()
    reason: str = ""

    def refuses(
        self, weights: Iterable[int], activations: Iterable[int] = (), dynamic: bool = False
    ) -> str | None:
        """Why bits cannot be, with those that can; None where all can.

        Args:
            weights: bits of weights that become integers.
            activations: bits of activations that are rounded to fixed ranges.
            dynamic: whether some are rounded in the range of each run.
        """
        if not self.weights:
            return f"quantized networks: {self.reason or 'it has no integers'}"
        for what, asked, known in (
            ("weights", weights, self.weights),
            ("activations", activations, self.activations),
        ):
            wrong = sorted(set(asked) - set(known))
            if wrong:
                can = f"{known[0]} to {known[-1]}" if known else "no"
                return f"{what} of {' and '.join(map(str, wrong))} bits; it takes {can} bits"
        if dynamic and not self.dynamic:
            return "activations that are rounded in the range of each run"
        return None

    def refuses_graph(self, module: fx.GraphModule) -> str | None:
        """Why the bits of a quantized graph cannot be; None where all can, and for float graphs."""
        weights: set[int] = set()
        activations: set[int] = set()
        dynamic = False
        for node in module.graph.nodes:
            if node.op != "call_function":
                continue
            dynamic |= node.target in (ROUND, ROUND_TOKENS)
            if _pairs(node) == "quantize_per_tensor":
                activations.add(_bits(*node.args[3:5]))
            elif _pairs(node) == "dequantize_per_channel" and node.args[6] != torch.int32:
                weights.add(_bits(*node.args[4:6]))  # biases are integers of 32 bits
            elif _pairs(node) == "dequantize_per_channel_group":
                weights.add(_bits(*node.args[3:5]))
        if not (weights or activations or dynamic):
            return None
        return self.refuses(weights, activations, dynamic)

    def container(self, bits: int) -> int:
        """Bits that the file keeps an integer of so many in."""
        return next((kept for kept in self.containers if kept >= bits), bits)


def _pairs(node: fx.Node) -> str:
    """Name of an operator of quantize/dequantize pairs; empty for others."""
    ours = getattr(node.target, "namespace", "") == "quantized_decomposed"
    return operator_name(node) if ours else ""


def _bits(low: Any, high: Any) -> int:
    return int(high - low).bit_length()


# ONNX files of opset 18 to 21, as `onnx_file` writes them, for each runtime that reads them. QuantizeLinear of 16 bits came with opset 21,
# and no CPU kernel multiplies those. Integers of 2 and 3 bits have no type of their own.
ONNX = Precision(
    weights=tuple(range(2, 9)),
    activations=tuple(range(2, 9)),
    dynamic=True,
    containers=(4, 8),
)
# A target that runs nothing takes everything that `quantize` makes.
ANY = Precision(tuple(range(2, 17)), tuple(range(2, 17)), True, (8, 16))
