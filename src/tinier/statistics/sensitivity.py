"""How much each row of a layer's result matters for what the network returns, and inputs weighted by it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tinier.errors import DataError
from tinier.graph.groups import named_tensors
from tinier.graph.layers import Layer, linear_layer
from tinier.graph.trace import Traced
from tinier.statistics.finite import NotFinite, culprit

MOST_ROWS = 2**10  # of a chunk, from which weighted Gram matrices are summed


@dataclass
class Sensitivity:
    """Sums over the rows of a linear layer or convolution, each weighted by how much its result matters.

    With g_r the gradient of the network's outputs by row r of the result (see ``output_gradients``), w_r = ‖g_r‖²: padding, and tokens
    that no output depends on, have weight 0.

    Attributes:
        examples: how many examples the sums are over.
        weight: Σ w.
        total: (g, n) float64, Σ w x, of the rows x that the layer multiplies with its weight matrix.
        products: (g, n, n) float64, Σ w x xᵀ.
        outputs: (g, m) float64, Σ g², for each output of the layer.
    """

    examples: int
    weight: float
    total: Tensor
    products: Tensor
    outputs: Tensor

    @property
    def covariance(self) -> Tensor:
        """(g, n, n) float64: Σ w (x − x̄)(x − x̄)ᵀ per example."""
        outer = self.total[:, :, None] * self.total[:, None, :] / max(self.weight, 1e-300)
        return (self.products - outer) / self.examples

    @property
    def shares(self) -> Tensor:
        """(g, m) float64: how much each output matters, 1 in sum."""
        return self.outputs / self.outputs.sum().clamp(min=1e-300)


class Sensitivities(fx.Interpreter):
    """Adds up ``Sensitivity`` for every layer of a graph, one chunk of examples after the other."""

    def __init__(self, traced: Traced) -> None:
        super().__init__(traced.module)
        self.traced = traced
        self.tensors = named_tensors(traced.module)
        self.sums: dict[str, Sensitivity] = {}
        self.gradients: dict[fx.Node, Tensor] = {}
        self.rows = torch.Generator().manual_seed(0)
        self.size = 0

    def add(self, inputs: Mapping[str, Tensor], generator: torch.Generator) -> None:
        """Two runs of the network and one backward.

        Raises:
            DataError: NaN or infinity, with the operator.
        """
        self.gradients = output_gradients(self.traced, inputs, generator)
        ordered = [inputs[name] for name in self.traced.inputs]
        self.size = len(ordered[0])
        try:
            with torch.no_grad():
                self.run(*(value.clone() for value in ordered))
        except NotFinite as found:
            raise DataError(culprit(self.traced.module, ordered, str(found))) from None

    def run_node(self, node: fx.Node) -> Any:
        gradient = self.gradients.pop(node, None)
        if gradient is not None:
            layer = linear_layer(node)
            assert layer is not None
            self._take(node.name, layer, self.env[layer.source], gradient)
        return super().run_node(node)

    def _take(self, name: str, layer: Layer, source: Tensor, gradient: Tensor) -> None:
        rows = layer.rows(gradient)
        count = min(rows, MOST_ROWS)
        index = torch.randperm(rows, generator=self.rows)[:count].sort().values
        squares = layer.outputs(gradient).double().cpu().square()
        # The rows that are drawn stand for all of them.
        weights = squares.sum((0, 2))[index] * (rows / count)
        x = layer.inputs(source, self.tensors[layer.weight], index).double().cpu()
        weighted = x * weights[:, None]
        if not bool(weighted.isfinite().all()):
            raise NotFinite(name)
        own = self.sums.get(name)
        if own is None:
            zero = x.new_zeros(x.shape[0], x.shape[2])
            wide = x.new_zeros(x.shape[0], x.shape[2], x.shape[2])
            outputs = x.new_zeros(x.shape[0], squares.shape[2])
            own = self.sums[name] = Sensitivity(0, 0.0, zero, wide, outputs)
        own.examples += self.size
        own.weight += float(weights.sum())
        own.total += weighted.sum(1)
        own.products += weighted.mT @ x
        own.outputs += squares.sum(1)


def output_gradients(
    traced: Traced, inputs: Mapping[str, Tensor], generator: torch.Generator
) -> dict[fx.Node, Tensor]:
    """Gradients of what the network returns by the result of each linear layer and convolution, of one random projection.

        g = ∂/∂y Σ ξ · (o − ō) / σ

    over the floating-point outputs o, with ξ standard normal for each number, ō the mean over the last dimension (a shift of all logits
    changes no softmax) and σ the standard deviation of the output. E ‖g‖² is the squared norm of the Jacobian: a change δ of one row
    changes the outputs by E (g · δ)² in the mean square, to first order. No labels are needed.

    Args:
        traced: left as it is.
        inputs: input name → tensor.
        generator: of ξ.

    Returns:
        Node → gradient of the shape of its result; layers that no output depends on are absent.

    Cost:
        One run of the network, with its activations kept, and one backward.
    """
    with torch.enable_grad():
        run = _Sensitive(traced.module)
        outputs = [
            output
            for output in run.run(*(inputs[name] for name in traced.inputs))
            if output.is_floating_point() and output.requires_grad
        ]
        value = torch.zeros(())
        for output in outputs:
            flat = output.ndim > 1 and output.shape[-1] > 1
            centred = output - output.mean(-1, keepdim=True) if flat else output
            noise = torch.randn(output.shape, generator=generator).to(output)
            scale = output.detach().float().std() if output.numel() > 1 else torch.ones(())
            value = value + (centred * noise).sum().float().cpu() / scale.cpu().clamp(min=1e-9)
        if not outputs:
            return {}
        nodes = list(run.results)
        gradients = torch.autograd.grad(value, list(run.results.values()), allow_unused=True)
    return {n: g for n, g in zip(nodes, gradients, strict=True) if g is not None}


class _Sensitive(fx.Interpreter):
    """Runs a graph with gradients and remembers the results of its layers."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.results: dict[fx.Node, Tensor] = {}
        self.tensors = {name: tensor.detach() for name, tensor in named_tensors(module).items()}

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            value = super().run_node(node)
            return value.clone()  # what changes it in place leaves the user's tensor alone
        if node.op == "get_attr":
            return self.tensors[str(node.target)]
        value = super().run_node(node)
        if linear_layer(node) is None or not value.is_floating_point():
            return value
        if not value.requires_grad:
            value.requires_grad_()
        self.results[node] = value
        return value.clone()  # and the remembered tensor
