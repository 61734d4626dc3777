"""Mixed precision: how many bits each layer gets, so that the outputs lose least within a limit of bytes or milliseconds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, fx
from torch.nn.functional import kl_div, log_softmax

from tinier.data.check import class_axis
from tinier.edits.pairs import from_matrix
from tinier.errors import DataError, InputError, RefusedError
from tinier.graph.fold import fold, read
from tinier.graph.rerun import Rerun, value_bytes
from tinier.graph.stored import Store
from tinier.methods.quantization import Quantization
from tinier.methods.weight_integers import integers_of
from tinier.network import Network
from tinier.statistics import Statistics

KINDS = ("kl", "output", "fisher")
MEMORY = 2**30  # bytes of values that are kept at once
FLOAT = 0  # stands for a layer that stays float
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
    """How much the outputs change when one weight alone is quantized.

    Args:
        network: the folded float network.
        method: ranges, groups and rounding of the weights.
        batches: input name → tensor; a few dozen examples do. Not needed by "fisher".
        choices: bits; 0 for float, whose loss is 0.
        statistics: what the method needs; for "fisher" also squared gradients.
        kind: "kl": Kullback–Leibler divergence of the classes of the first output, squared error where it has none; "output": squared error
            over variance of all outputs; "fisher": Σ F (ŵ − w)² with the mean squared gradient F of each weight.

    Returns:
        Weight → bits → loss.

    Raises:
        InputError: an unknown kind. DataError: no examples.

    Cost:
        For each weight and number of bits a run of what comes after it; "fisher" runs nothing.

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
        for (name, bits), value in rounded.items():
            squares = None if statistics is None else statistics.squares.get(name)
            if squares is None:
                raise InputError(f"sensitivity='fisher': no squared gradients of {name}")
            old = read(module, name)
            assert old is not None
            result[name][bits] = float((squares * (value - old.detach()).double().square()).sum())
        return result
    examples = 0
    for run, count in _runs(network, module, batches):
        examples += count
        for (name, bits), value in rounded.items():
            for node in module.graph.find_nodes(op="get_attr"):
                if node.target == name:
                    changed = run.with_value(node, value)
                    result[name][bits] += count * _change(run.outputs, changed, kind)
    if not examples:
        raise DataError("sensitivities: no examples; a few dozen are needed")
    return {
        name: {bits: loss / examples for bits, loss in row.items()} for name, row in result.items()
    }


def packed_bytes(network: Network, method: Quantization, choices: Sequence[int]) -> Table:
    """Weight → bits → bytes of its integers without gaps, its scales (4 bytes each) and zero points; 0 bits as float32."""
    module = fold(network.traced.module)
    result = {}
    for store in method.stores(network):
        weight = read(module, store.name)
        assert weight is not None
        channels = weight.shape[store.axis]
        scales = 1 if method.per_tensor else channels
        if method.group and store.kind in ("linear", "embedding"):
            scales = weight.numel() // method.group
        each = 4.0 if method.symmetric else 5.0
        result[store.name] = {
            bits: weight.numel() * bits / 8 + scales * each if bits else 4.0 * weight.numel()
            for bits in choices
        }
    return result


def _rounded(
    module: fx.GraphModule,
    store: Store,
    method: Quantization,
    bits: int,
    statistics: Statistics | None,
) -> Tensor:
    weight = read(module, store.name)
    assert weight is not None
    scheme = replace(method.scheme(store.name, method.activations is not None), bits=bits)
    edit, _ = integers_of(module, store, scheme, statistics, {})
    return from_matrix(edit.grid.dequantize(edit.matrix(weight)), weight, store.axis)


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
