"""Histograms of activations, for quantization and for looking at them."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tinier.errors import DataError, InputError
from tinier.graph.fold import fold, read
from tinier.graph.layers import Layer, linear_layer
from tinier.graph.placement import place
from tinier.network import Network
from tinier.statistics.base import COLLECTS, Ends, Moments, Statistics
from tinier.statistics.chunks import CHUNK, Batch, chunk_size, chunks
from tinier.statistics.importance import MOST, weigh
from tinier.statistics.places import layer_rows
from tinier.statistics.recurrent import WHOLE, column, reads
from tinier.tensors.histogram import Histogram


def collect(
    network: Network,
    batches: Iterable[Batch],
    nodes: Sequence[str] | None = None,
    needs: Collection[str] = (),
    *,
    most: int | None = None,
) -> Statistics:
    """Run a network over data and keep what quantization needs of every activation that it may ask for.

    Args:
        network: the network; left as it is.
        batches: input name → tensor, dimension 0 the batch; or pairs of these and labels, which are not looked at.
        nodes: the activations to watch, by their names in the folded graph, as ``floating_activations`` lists them; None for those that
            static quantization asks for.
        needs: keys of ``COLLECTS``, collected in the same run: "channels", the ends of each channel; "columns", the moments of what each
            column of a layer's weights is multiplied with; "importance", by at most 64 of the examples, which values the outputs depend on.
        most: about how many values of each example and activation are looked at, as ``Histogram.add`` says; None for all. The smallest and
            the largest are those of all, always.

    Returns:
        Statistics of examples that ran in chunks of one size, so that they do not depend on how they were batched, nor but for rounding,
        ``most`` and what ``Histogram.mean_ends`` says on their order. With ``nodes``, what is not finite has a histogram that says so.

    Raises:
        DataError: no examples; an input is missing; NaN or infinity in an input or inside the network, with the operator.
        InputError: an unknown need, or a node that is no floating-point activation.

    Cost:
        One run of the network; memory is flat in the number of examples: that of a run of at most 32, 32 kB for each activation and, with
        "columns", 32 bytes for each column. With "importance" a run forth and back over 64 examples.
    """
    if unknown := set(needs) - COLLECTS.keys():
        raise InputError(
            f"needs: {', '.join(sorted(unknown))}: unknown; there are {', '.join(COLLECTS)}"
        )
    module = fold(network.traced.module)
    watched = list(place(module).observed() if nodes is None else nodes)
    known = set(_floating(module))
    if missing := [name for name in watched if name not in known]:
        raise InputError(
            f"nodes: {missing[0]} is no floating-point activation of {network.name}; floating_activations(network) lists them"
        )
    recorder = _Recorder(module, watched, frozenset(needs), nodes is None, most)
    examples = 0
    first: list[dict[str, Tensor]] = []
    for inputs, _ in chunks(network, batches, chunk_size(network, CHUNK)):
        if "importance" in needs and examples < MOST:
            left = MOST - examples if network.traced.batched else None  # fixed batches stay whole
            first.append({name: value[:left] for name, value in inputs.items()})
        ordered = [inputs[name] for name in network.traced.inputs]
        with torch.no_grad():
            recorder.run(*ordered)
        examples += len(ordered[0])
    if not examples:
        raise DataError(
            f"{network.name}: no examples to collect statistics of; one or more are needed"
        )
    if first:
        weigh(network, module, recorder.histograms, first)
    return Statistics(
        recorder.histograms, examples, channels=recorder.channels, columns=recorder.columns
    )


def floating_activations(network: Network) -> list[str]:
    """Names of all floating-point values of the folded graph that depend on the inputs, in its order; inputs are among them."""
    return _floating(fold(network.traced.module))


def _floating(module: fx.GraphModule) -> list[str]:
    moving: set[fx.Node] = set()
    names = []
    for node in module.graph.nodes:
        if node.op == "placeholder" or any(source in moving for source in node.all_input_nodes):
            moving.add(node)
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.is_floating_point() and node.op != "output":
                names.append(node.name)
    return names


class _Recorder(fx.Interpreter):
    """Runs a graph and adds the values of chosen nodes to their histograms."""

    def __init__(
        self,
        module: fx.GraphModule,
        watched: Sequence[str],
        needs: frozenset[str],
        strict: bool,
        most: int | None,
    ) -> None:
        super().__init__(module)
        self.strict, self.most = strict, most
        self.histograms = {name: Histogram() for name in watched}
        self.dims = _batch_dims(module)
        self.channels: dict[str, dict[int, Ends]] = {}
        if "channels" in needs:
            found = [node for node in module.graph.nodes if node.name in self.histograms]
            self.channels = {node.name: _ends(node) for node in found}
        self.layers: dict[str, Layer] = {}
        self.columns: dict[str, Moments] = {}
        if "columns" in needs:
            layers = {node.name: linear_layer(node) for node in module.graph.nodes}
            self.layers = {name: layer for name, layer in layers.items() if layer is not None}
        self.recurrent = {
            node.name for node in module.graph.nodes if "columns" in needs and node.target in WHOLE
        }

    def run_node(self, node: fx.Node) -> object:
        layer = self.layers.get(node.name)
        if layer is not None:
            self._add_columns(layer, self.env[layer.source])
        value = super().run_node(node)
        if node.name in self.recurrent:
            self._add_recurrent(node, value)
        if isinstance(value, Tensor) and node.name in self.histograms:
            histogram = self.histograms[node.name]
            histogram.add(value, self.dims.get(node.name), self.most)
            if value.numel() and self.strict and not histogram.finite:
                what = "input" if node.op == "placeholder" else f"output of {node.target}"
                raise DataError(
                    f"{node.name}: NaN or infinity in the {what}; "
                    "remove such examples, or exclude what makes them"
                )
            for axis, ends in self.channels.get(node.name, {}).items():
                ends.add(value, axis)
        return value

    def _add_recurrent(self, node: fx.Node, value: Any) -> None:
        states = node.args[1]
        state = states[0] if isinstance(states, list | tuple) else states
        read_by = reads(node, self.env[node.args[0]], self.env[state], value[0])  # type: ignore[index]
        for weight, rows in read_by:
            key = column(node.name, weight)
            self.columns.setdefault(key, Moments.empty(rows.shape[1])).add(rows)

    def _add_columns(self, layer: Layer, value: Tensor) -> None:
        weight = read(self.module, layer.weight)  # type: ignore[arg-type]
        assert weight is not None
        for rows in layer_rows(layer, value, weight.detach()):  # (g, rows, n)
            flat = rows.transpose(0, 1).flatten(1)
            self.columns.setdefault(layer.node.name, Moments.empty(flat.shape[1])).add(flat)


def _batch_dims(module: fx.GraphModule) -> dict[str, int]:
    """Name of each value that has the batch as a dimension of its own → that dimension."""
    inputs = [node.meta.get("val") for node in module.graph.find_nodes(op="placeholder")]
    sizes = {_said(value.shape[0]) for value in inputs if isinstance(value, Tensor) and value.ndim}
    found: dict[str, int] = {}
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            # A batch of fixed size is told from other sizes only where it comes first.
            free = [d for d, size in enumerate(value.shape) if not isinstance(size, int) or not d]
            dims = [d for d in free if _said(value.shape[d]) in sizes]
            if len(dims) == 1:
                found[node.name] = dims[0]
    return found


def _said(size: int | torch.SymInt) -> str:
    return str(size if isinstance(size, int) else size.node.expr)


def _ends(node: fx.Node) -> dict[int, Ends]:
    """For dimension 1 and for the last, those that hold channels of fixed number."""
    value = node.meta["val"]
    axes = [1, -1] if value.ndim > 2 else [1] if value.ndim == 2 else []
    return {
        axis: Ends.empty(value.shape[axis]) for axis in axes if isinstance(value.shape[axis], int)
    }
