"""Mixed precision: how many bits each layer gets, so that the outputs lose least within a limit of bytes or milliseconds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, fx
from torch.nn.functional import kl_div, log_softmax

from tinier.data.check import class_axis
from tinier.edits.pairs import IntegerBias, from_matrix, integer_biases
from tinier.edits.quantize import Quantize
from tinier.errors import DataError, InputError, RefusedError
from tinier.graph.fold import fold, read
from tinier.graph.layers import linear_layer
from tinier.graph.rerun import Rerun, leaves, value_bytes
from tinier.graph.stored import Store
from tinier.methods.quantization import Quantization
from tinier.methods.weight_integers import integers_of
from tinier.modules.fake_quantize import BIAS
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.statistics.losses import summed_loss
from tinier.tensors.affine import dequantize, quantize

KINDS = ("kl", "output", "fisher")
MEMORY = 2**30  # bytes of values that are kept at once
FLOAT = 0  # stands for a layer that stays float
NO_EXAMPLES = "sensitivities: no examples; a few dozen are needed"
Round = Callable[[Any], Any]
Inputs = dict[
    fx.Node, tuple[fx.Node, Round]
]  # reader of a weight → what it multiplies, and how that is rounded
Table = Mapping[str, Mapping[int, float]]  # layer → bits → loss or cost


def allocate(loss: Table, cost: Table, limit: float) -> dict[str, int]:
    """Bits of each layer with the least sum of losses whose costs keep a limit: an integer programme, solved exactly.

        min Σ_l Σ_b loss(l, b) x(l, b)   with   Σ_b x(l, b) = 1,   Σ_l Σ_b cost(l, b) x(l, b) ≤ limit,   x ∈ {0, 1}

    Args:
        loss: layer → bits → loss, finite; 0 bits for float.
        cost: the same keys → bytes or milliseconds.
        limit: in the unit of the costs.

    Raises:
        RefusedError: even the cheapest choice of every layer is above the limit.
    """
    if not loss:
        return {}
    pairs = [(layer, bits) for layer, row in loss.items() for bits in row]
    least = sum(min(cost[layer].values()) for layer in loss)
    if least > limit:
        raise RefusedError(
            f"{limit:,.6g} was asked for; the cheapest choice of bits takes {least:,.6g}"
        )
    weights = np.array([loss[layer][bits] for layer, bits in pairs])
    weights = weights / max(weights.max(), 1e-300)
    costs = np.array([cost[layer][bits] for layer, bits in pairs])
    one = np.array([[float(layer == own) for own, _ in pairs] for layer in loss])
    constraints = [LinearConstraint(one, 1, 1), LinearConstraint(costs[None], -np.inf, limit)]
    found = milp(
        weights, integrality=np.ones(len(pairs)), bounds=Bounds(0, 1), constraints=constraints
    )
    if found.x is None:
        raise RefusedError(f"no choice of bits was found: {found.message}")
    return {layer: bits for (layer, bits), x in zip(pairs, found.x, strict=True) if x > 0.5}


def sensitivities(
    network: Network,
    method: Quantization,
    batches: Iterable[Mapping[str, Tensor]],
    choices: Sequence[int],
    statistics: Statistics | None = None,
    kind: str = "kl",
) -> dict[str, dict[int, float]]:
    """How much the outputs change when one layer alone is quantized: its weight and, where activations are rounded, what it multiplies.

    Args:
        network: the folded float network.
        method: ranges, groups and rounding of the weights, and bits of activations.
        batches: input name → tensor; a few dozen examples do. Not needed by "fisher" for weights alone.
        choices: bits; 0 for a layer that stays float, whose loss is 0.
        statistics: what the method needs; for "fisher" also squared gradients.
        kind: "kl": Kullback–Leibler divergence of the classes of the first output, squared error where it has none; "output": squared error
            over variance of all outputs; "fisher": Σ F (ŵ − w)² + E Σ G (x̂ − x)², with the mean squared gradient F of each weight and the
            squared gradient G of each example's loss, of an answer drawn from the network, by what the layer reads.

    Returns:
        Weight → bits → loss.

    Raises:
        InputError: an unknown kind, or statistics are missing. DataError: no examples.

    Cost:
        For each weight and number of bits a run of what comes after it; "fisher" runs nothing, but once forward and backward where
        activations are rounded.

    Source:
        Dong et al. 2019, "HAWQ", for sensitivities in an allocation; here they are measured, not bounded.
    """
    if kind not in KINDS:
        raise InputError(f"sensitivity={kind!r}: {', '.join(KINDS)} are known")
    module = fold(network.traced.module)
    rounded = {
        (store.name, bits): _rounded(module, store, method, bits, statistics)
        for store in method.stores(network)
        for bits in choices
        if bits != FLOAT
    }
    names = list(dict.fromkeys(name for name, _ in rounded))
    result = {name: {bits: 0.0 for bits in choices} for name in names}
    if kind == "fisher":
        for (name, bits), (value, _) in rounded.items():
            squares = None if statistics is None else statistics.squares.get(name)
            if squares is None:
                raise InputError(f"sensitivity='fisher': no squared gradients of {name}")
            old = read(module, name)
            assert old is not None
            result[name][bits] = float((squares * (value - old.detach()).double().square()).sum())
        inputs = _read_rounded(module, network, method, statistics)
        read_losses = _read_fisher(network, module, batches, inputs) if any(inputs.values()) else {}
        return {
            name: {
                bits: loss + (read_losses.get(name, 0.0) if bits else 0.0)
                for bits, loss in row.items()
            }
            for name, row in result.items()
        }
    inputs = _read_rounded(module, network, method, statistics)
    pairs = [e for e in method.roundings(network, statistics) if isinstance(e, Quantize)]
    steps = {edit.tensor: edit.scale for edit in pairs}
    biases: dict[str, list[IntegerBias]] = {}
    for bias in integer_biases(module, steps, names):
        biases.setdefault(bias.weight, []).append(bias)
    examples = 0
    for run, count in _runs(network, module, batches):
        examples += count
        for (name, bits), (value, scale) in rounded.items():
            reads = _reads(module, name, value, inputs[name])
            if scale is not None:
                for bias in biases.get(name, ()):
                    reads[bias.reader][bias.argument] = _bias_rounded(scale, steps[bias.source])
            changed = run.with_reads(reads)
            result[name][bits] += count * _change(run.outputs, changed, kind)
    if not examples:
        raise DataError(NO_EXAMPLES)
    return {
        name: {bits: loss / examples for bits, loss in row.items()} for name, row in result.items()
    }


def packed_bytes(
    network: Network,
    method: Quantization,
    choices: Sequence[int],
    container: Callable[[int], int] = int,
) -> Table:
    """Weight → bits → bytes of its integers without gaps, its scales (4 bytes each) and zero points; 0 bits as float32.

    Args:
        network: the folded float network.
        method: its quantization.
        choices: bits.
        container: bits → those that a file keeps an integer of so many in.
    """
    module = fold(network.traced.module)
    result = {}
    for store in method.stores(network):
        weight = read(module, store.name)
        assert weight is not None
        channels = weight.shape[store.axis]
        scales = 1 if method.per_tensor else channels
        if method.group and store.kind in ("linear", "embedding"):
            scales = weight.numel() // method.group
        result[store.name] = {
            bits: weight.numel() * container(bits) / 8
            + scales * (4.0 if method.is_symmetric(bits) else 5.0)
            if bits
            else 4.0 * weight.numel()
            for bits in choices
        }
    return result


def _rounded(
    module: fx.GraphModule,
    store: Store,
    method: Quantization,
    bits: int,
    statistics: Statistics | None,
) -> tuple[Tensor, Tensor | None]:
    """A weight as its integers stand for it, and its scales, (m or 1,), where integer operators can have them."""
    weight = read(module, store.name)
    assert weight is not None
    scheme = method.scheme(store.name, method.activations is not None, bits)
    edit, _ = integers_of(module, store, scheme, statistics, {})
    value = from_matrix(edit.grid.dequantize(edit.matrix(weight)), weight, store.axis)
    whole = edit.scale.tensor.shape[1] == 1 and not bool(edit.zero_point.tensor.any())
    return value, edit.scale.tensor[:, 0] if whole else None


def _read_rounded(
    module: fx.GraphModule,
    network: Network,
    method: Quantization,
    statistics: Statistics | None,
) -> dict[str, Inputs]:
    """Weight → how its readers round what they multiply it with."""
    nodes = {node.name: node for node in module.graph.nodes}
    edits = {edit.tensor: edit for edit in method.roundings(network, statistics)}
    result: dict[str, Inputs] = {}
    for store in method.stores(network):
        own = result.setdefault(store.name, {})
        for name in store.readers:
            layer = linear_layer(nodes[name])
            edit = None if layer is None else edits.get(layer.source.name)
            if layer is not None and edit and (not edit.readers or name in edit.readers):
                own[layer.node] = (layer.source, edit.rounded)
    return result


def _reads(
    module: fx.GraphModule, name: str, value: Tensor, inputs: Inputs
) -> dict[fx.Node, dict[fx.Node, Round]]:
    """What the readers of a weight read when it and what they multiply with it are rounded."""
    result: dict[fx.Node, dict[fx.Node, Round]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        for reader in node.users if node.target == name else ():
            own = result.setdefault(reader, {})
            own[node] = lambda _: value
            if reader in inputs:
                source, by = inputs[reader]
                own[source] = by
    return result


def _bias_rounded(scale: Tensor, step: float) -> Round:
    """A bias in units of input scale · weight scale, as integer operators add it."""

    def by(bias: Tensor) -> Tensor:
        unit = (scale * step).expand(len(bias))
        zeros = torch.zeros(len(bias), dtype=torch.int64)
        integers = quantize(bias.detach().double(), unit.double(), zeros, BIAS, 0)
        return dequantize(integers, unit, zeros, 0)

    return by


def _read_fisher(
    network: Network,
    module: fx.GraphModule,
    batches: Iterable[Mapping[str, Tensor]],
    inputs: Mapping[str, Inputs],
) -> dict[str, float]:
    """Weight → E Σ G (x̂ − x)² of what is multiplied with it."""
    readers = {reader: by for own in inputs.values() for reader, by in own.items()}
    sums = dict.fromkeys(readers, 0.0)
    generator = torch.Generator().manual_seed(0)
    examples = 0
    for batch in batches:
        run = _Tapped(module, {reader: source for reader, (source, _) in readers.items()})
        ordered = [batch[name] for name in network.traced.inputs]
        with torch.enable_grad():
            outputs = leaves(run.run(*(value.clone() for value in ordered)))
            loss = summed_loss(outputs, None, len(ordered[0]), None, generator)
            taps = list(run.taps)
            found = torch.autograd.grad(loss, [run.taps[n] for n in taps], allow_unused=True)
        examples += len(ordered[0])
        for node, gradient in zip(taps, found, strict=True):
            if gradient is not None:
                value = run.taps[node].detach()
                moved = (readers[node][1](value) - value).double()
                sums[node] += float((gradient.double() * moved).square().sum())
    if not examples:
        raise DataError(NO_EXAMPLES)
    return {name: sum(sums[r] for r in own) / examples for name, own in inputs.items()}


class _Tapped(fx.Interpreter):
    """A run that keeps what some nodes read, each its own copy, to be differentiated by."""

    def __init__(self, module: fx.GraphModule, sources: Mapping[fx.Node, fx.Node]) -> None:
        super().__init__(module)
        self.sources = sources
        self.taps: dict[fx.Node, Tensor] = {}

    def run_node(self, node: fx.Node) -> Any:
        source = self.sources.get(node)
        if source is None:
            return super().run_node(node)
        before = self.env[source]
        self.taps[node] = (
            before.clone() if before.requires_grad else before.clone().requires_grad_()
        )
        self.env[source] = self.taps[node]
        try:
            return super().run_node(node)
        finally:
            self.env[source] = before


def _runs(
    network: Network, module: fx.GraphModule, batches: Iterable[Mapping[str, Tensor]]
) -> Iterable[tuple[Rerun, int]]:
    size = len(next(iter(network.example.values())))
    if network.traced.batched:
        size = max(1, MEMORY * size // max(2 * value_bytes(module), 1))
    for batch in batches:
        inputs = [batch[name] for name in network.traced.inputs]
        for parts in zip(*(value.split(size) for value in inputs), strict=True):
            yield Rerun(module, parts), len(parts[0])


def _change(before: Sequence[Tensor], after: Sequence[Tensor], kind: str) -> float:
    axis = class_axis(before[0].shape)
    if kind == "kl" and axis is not None:
        p, q = (log_softmax(x[0].double(), axis) for x in (before, after))
        return float(kl_div(q, p, log_target=True, reduction="none").sum(axis).mean())
    parts = []
    for old, new in zip(before, after, strict=True):
        if old.is_floating_point() and old.numel() > 1:
            variance = old.double().var().clamp_min(1e-30)
            parts.append(float((new.double() - old.double()).square().mean() / variance))
    return sum(parts) / max(len(parts), 1)
