"""Histograms of activations, for quantization."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from tinier.errors import DataError
from tinier.graph.fold import fold
from tinier.graph.placement import place
from tinier.network import Network
from tinier.statistics.base import Statistics
from tinier.tensors.histogram import Histogram


def collect(network: Network, batches: Iterable[Mapping[str, Tensor]]) -> Statistics:
    """Run a network over data and keep what quantization needs of every activation that it may ask for.

    Args:
        network: the network; left as it is.
        batches: input name → tensor, dimension 0 the batch.

    Returns:
        Statistics that do not depend on how the examples were batched.

    Raises:
        DataError: no examples; an input is missing; NaN or infinity in an input or inside the network, with the operator.

    Cost:
        One run of the network per batch; memory is flat in the number of batches.
    """
    module = fold(network.traced.module)
    watched = place(module).observed()
    recorder = _Recorder(module, {name: Histogram() for name in watched})
    examples = 0
    for batch in batches:
        missing = [name for name in network.traced.inputs if name not in batch]
        if missing:
            raise DataError(
                f"data: no input {', '.join(missing)}; there are {', '.join(batch) or 'none'}"
            )
        inputs = [batch[name] for name in network.traced.inputs]
        with torch.no_grad():
            recorder.run(*inputs)
        examples += len(inputs[0])
    if not examples:
        raise DataError(
            f"{network.name}: no examples to collect statistics of; one or more are needed"
        )
    return Statistics(recorder.histograms, examples)


class _Recorder(fx.Interpreter):
    """Runs a graph and adds the values of chosen nodes to their histograms."""

    def __init__(self, module: fx.GraphModule, histograms: dict[str, Histogram]) -> None:
        super().__init__(module)
        self.histograms = histograms

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        if isinstance(value, Tensor) and node.name in self.histograms:
            histogram = self.histograms[node.name]
            histogram.add(value)
            if value.numel() and not histogram.finite:
                what = "input" if node.op == "placeholder" else f"output of {node.target}"
                raise DataError(
                    f"{node.name}: NaN or infinity in the {what}; "
                    "remove such examples, or exclude what makes them"
                )
        return value
