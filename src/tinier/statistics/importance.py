"""How much the outputs of a network change with the values inside it."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from tinier.errors import DataError
from tinier.network import Network
from tinier.statistics.chunks import chunk_size, chunks
from tinier.tensors.histogram import Histogram

MOST = 64  # examples
CHUNK = 8  # examples whose values are kept at once for the way back


def weigh(
    network: Network,
    module: fx.GraphModule,
    histograms: Mapping[str, Histogram],
    batches: Iterable[Mapping[str, Tensor]],
) -> None:
    """Tell histograms which of their values matter: those by which the outputs change.

    With the outputs y, each divided by its standard deviation, and noise v of variance 1 for each of their values, the squared derivative
    of v · y by a value x inside is on average Σ (∂y/∂x)²: what a small error of x does to the squared error of the outputs.

    Args:
        network: whose inputs the batches are.
        module: its folded graph, whose nodes the histograms are named after.
        histograms: node → histogram; changed.
        batches: input name → tensor, all of them are used.

    Raises:
        DataError: no floating-point output, of which there is a derivative.

    Cost:
        A run forth and back over the examples; memory is that of 8 examples with all values inside kept.

    Source:
        Martens 2020, "New Insights and Perspectives on the Natural Gradient Method", section 9.2: the Gauss-Newton matrix and its estimate.
    """
    generator = torch.Generator().manual_seed(0)
    runner = _Runner(module, histograms)
    for inputs, _ in chunks(network, batches, chunk_size(network, CHUNK)):
        with torch.enable_grad():
            found = runner.run(*(inputs[name] for name in network.traced.inputs))
            outputs = [y for y in _tensors(found) if y.is_floating_point()]
            if not outputs:
                raise DataError(
                    f'ranges="importance": {network.name} has no floating-point output that values inside could change'
                )
            if any(y.requires_grad for y in outputs):
                _noisy(outputs, generator).backward()


def _noisy(outputs: list[Tensor], generator: torch.Generator) -> Tensor:
    """Σ v · y / σ(y)"""
    total = torch.zeros(())
    for y in outputs:
        deviation = float(y.detach().std(unbiased=False)) or 1.0
        noise = torch.randn(y.shape, generator=generator)
        total = total + (y * noise.to(y)).sum().float() / deviation
    return total


def _tensors(found: object) -> list[Tensor]:
    return [one for one in tree_leaves(found) if isinstance(one, Tensor)]


class _Runner(fx.Interpreter):
    """Runs a graph, and weighs values when the derivatives arrive."""

    def __init__(self, module: fx.GraphModule, histograms: Mapping[str, Histogram]) -> None:
        super().__init__(module)
        self.histograms = histograms

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        histogram = self.histograms.get(node.name)
        if node.op == "get_attr" and isinstance(value, Tensor):
            return value.detach()  # no derivatives by parameters
        if histogram is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        seen = value.detach()
        value.register_hook(lambda gradient: histogram.weigh(seen, gradient.square()))
        return value
