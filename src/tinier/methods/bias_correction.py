"""Bias correction: what quantization moves the mean of each channel by is taken off its bias."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import floor, prod
from typing import ClassVar

import torch
from torch import Tensor, fx

from tinier.edits.assign import Assign
from tinier.edits.base import Plan, Values
from tinier.edits.quantize import QuantizeWeight
from tinier.graph.fold import fold, parameter_of, read
from tinier.graph.layers import Layer, linear_layer
from tinier.graph.placement import clamp_bounds
from tinier.graph.rules import operator_name
from tinier.graph.walk import Walk, outputs_of
from tinier.methods.base import Method
from tinier.methods.norm_statistics import moments
from tinier.methods.sampled import examples, relative_error, samples_of
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.statistics.chunks import Batch

MOST = 128  # examples
POSITIONS = 256  # of each example, that errors are looked at
STEPS = 4  # of Newton's method, each a pass over a layer's results
_LARGEST = 2**30  # a bias in units of input scale · weight scale, of 32 bits
_CORRECTED = "error of the quantized layer made least"


@dataclass(frozen=True)
class BiasCorrection(Method):
    """b' = b + E[y − ŷ] for each output channel, y of the float layer, ŷ of the quantized one behind all quantized layers before it.

    Attributes:
        quantized: the quantization that is corrected: `Quantize` and `QuantizeWeight` edits, and corrections made for them.
        norms: batch norms that could not be folded take the mean and variance of their quantized input.
        most: examples, at least 2.

    Source:
        Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2, with empirical means.

    Differs:
        A channel is corrected only where the correction found on each half of the examples makes the error on the other half
        smaller, and the network only where its outputs come nearer to the float network's.
    """

    name: ClassVar[str] = "bias_correction"

    quantized: Plan = field(default_factory=Plan)
    norms: bool = True
    most: int = MOST

    def plan(self, network: Network, statistics: Statistics | None = None) -> Plan:
        """Correct it.

        Args:
            network: the folded float network; left as it is.
            statistics: with ``samples`` of inputs.

        Returns:
            The corrections and, behind them, the quantization.

        Raises:
            InputError: samples are missing.

        Cost:
            As of ``correct_biases``.
        """
        data = samples_of(network, statistics, self.most, "bias correction")
        return _corrected(network, self.quantized, data, self.norms)[0]


def correct_biases(
    folded: Network,
    plan: Plan,
    batches: Iterable[Batch],
    *,
    norms: bool = True,
    most: int = MOST,
) -> Plan:
    """Put biases right for a quantization: b' = b + E[y − ŷ], layer by layer in the order of the graph.

    Args:
        folded: the float network that ``plan`` is for; left as it is.
        plan: `Quantize` and `QuantizeWeight` edits, after `Assign` edits if there are some.
        batches: inputs, or pairs of inputs and labels, which are not used.
        norms: whether batch norms that could not be folded get statistics of their quantized input:
            σ'² = σ² · Var x̂ / Var x, μ' = E x̂ − (E x − μ) · σ' / σ.
        most: examples that are used.

    Returns:
        The plan with `Assign` edits before its quantization; the same plan where nothing got better.

    Raises:
        DataError: there are no examples.

    Cost:
        Two runs of the quantized network, one of the float one, and passes over a sample of each layer's results; the values that are alive
        inside both for all examples together.
    """
    return _corrected(folded, plan, examples(folded, batches, most), norms)[0]


def correct_biases_noted(
    folded: Network,
    plan: Plan,
    batches: Iterable[Batch],
    *,
    most: int = MOST,
    aim: Network | None = None,
) -> tuple[Plan, tuple[str, ...]]:
    """As ``correct_biases``, and what there is to say of single layers.

    ``aim`` is what has the results y; None for the float network with the plan's `Assign` edits, which then leave its function as
    it is.
    """
    return _corrected(folded, plan, examples(folded, batches, most), True, aim)


def _corrected(
    folded: Network,
    plan: Plan,
    data: Sequence[Sequence[Tensor]],
    norms: bool,
    aim: Network | None = None,
) -> tuple[Plan, tuple[str, ...]]:
    if sum(len(batch[0]) for batch in data) < 2:
        return plan, ("bias correction left out: two examples or more are needed to check it",)
    before = Plan(tuple(edit for edit in plan.edits if isinstance(edit, Assign)))
    rest = Plan(tuple(edit for edit in plan.edits if not isinstance(edit, Assign)))
    base = before.apply(folded) if before.edits else folded
    wanted, own = (fold(one.traced.module) for one in (aim or base, base))
    correction = _Correction(wanted, own, _module(rest, base), rest, data, norms)
    correction.run()
    if not correction.edits:
        return plan, correction.notes
    was = relative_error(correction.float.outputs, outputs_of(_module(rest, base), data))
    now = relative_error(correction.float.outputs, correction.quantized.outputs)
    if not now < was:
        note = f"bias correction left out: the error of the outputs would be {now:.3g}, it is {was:.3g}"
        return plan, (note,)
    return before + Plan(tuple(correction.edits)) + rest, correction.notes


def _module(plan: Plan, folded: Network) -> fx.GraphModule:
    """A network's own graph, whose nodes are called as those of the float one; its trace may call them otherwise."""
    module = plan.apply(folded).module
    return module if isinstance(module, fx.GraphModule) else fold(folded.traced.module)


class _Correction:
    """One run of the float and the quantized graph side by side; ``module`` has the biases that are corrected."""

    def __init__(
        self,
        aim: fx.GraphModule,
        module: fx.GraphModule,
        quantized: fx.GraphModule,
        plan: Plan,
        data: Sequence[Sequence[Tensor]],
        norms: bool,
    ) -> None:
        self.module, self.norms = module, norms
        self.float, self.quantized = Walk(aim, data), Walk(quantized, data)
        self.twins = {node.name: node for node in self.float.nodes if node.op == "call_function"}
        self.readers = _reader_count(module)
        self.scales = {
            edit.tensor: edit.scale.tensor
            for edit in plan.edits
            if isinstance(edit, QuantizeWeight)
        }
        self.edits: list[Assign] = []
        self.left: list[str] = []
        self.first = [torch.arange(len(batch[0])) % 2 == 0 for batch in data]

    @property
    def notes(self) -> tuple[str, ...]:
        """Which layers keep their biases."""
        if not self.left:
            return ()
        more = f" and {len(self.left) - 5} others" if len(self.left) > 5 else ""
        return (
            f"biases left as they are, no channel gets better: {', '.join(self.left[:5])}{more}",
        )

    def run(self) -> None:
        """Go through all layers."""
        while (node := self.quantized.next()) is not None:
            twin = self.twins.get(node.name)
            layer = None if twin is None else linear_layer(twin)
            if twin is not None and self.norms and operator_name(twin) == "batch_norm":
                self._norm(twin, node)
            self.quantized.step()
            if layer is not None:
                self.float.to(node.name)
                self.float.step()
                self._layer(layer, node)
        while self.float.next() is not None:
            self.float.step()

    def _layer(self, layer: Layer, node: fx.Node) -> None:
        dim = 1 if layer.kind in ("convolution", "transposed") else -1
        if layer.kind == "matmul" and layer.groups > 1:
            return
        name = layer.bias or _new_name(self.module, layer)
        if name is None or self.readers.get(layer.bias or "", 1) > 1:
            return
        behind = self._behind(layer.node, node, dim)
        if behind is None:
            return
        shift, tried = behind.shift()
        shift = self._within(layer, self._old(layer, len(shift)), shift)
        if not bool(shift.any()):
            if tried:
                self.left.append(layer.weight)
            return
        values_of = Values((self._old(layer, len(shift)) + shift).float().contiguous())
        reader = "" if layer.bias else layer.weight
        self.edits.append(Assign(name, values_of, reader, _CORRECTED))
        added = behind.along(shift.float())
        self.quantized.change(node, lambda value: value + added)

    def _behind(self, twin: fx.Node, node: fx.Node, dim: int) -> "_Behind | None":
        """What the layer's result becomes in a sum and a clamp that alone read it, as far as it is known by now."""
        at, bounds = twin, (float("-inf"), float("inf"))
        others: list[tuple[Tensor, Tensor]] = []
        user = next(iter(at.users)) if len(at.users) == 1 else None
        if user is not None and operator_name(user) == "add" and not user.kwargs:
            other = next((one for one in user.args[:2] if one is not at), None)
            same = [
                one
                for one in self.quantized.nodes
                if isinstance(other, fx.Node) and one.name == other.name
            ]
            if (
                same
                and isinstance(other, fx.Node)
                and all(
                    other in one and same[0] in two
                    for one, two in zip(self.float.values, self.quantized.values, strict=True)
                )
            ):
                others = [
                    (one[other], two[same[0]])
                    for one, two in zip(self.float.values, self.quantized.values, strict=True)
                ]
                at = user
                user = next(iter(at.users)) if len(at.users) == 1 else None
        if user is not None and user.op == "call_function":
            bounds = clamp_bounds(user) or bounds
        parts = []
        for index, values in enumerate(self.quantized.values):
            want, got = self.float.values[index][twin], values[node]
            count = len(self.first[index])
            if want.ndim < 2 or len(want) % count:
                return None  # not as many rows for each example
            if others:
                want, got = want + others[index][0], got + others[index][1]
            want, got = _thinned(want, dim), _thinned(got, dim)
            first = self.first[index].repeat_interleave(len(want) // count)
            for half, inside in ((0, first), (1, ~first)):
                parts.append((half, want[inside].clamp(*bounds), got[inside]))
        return _Behind(parts, bounds, dim % parts[0][1].ndim)

    def _old(self, layer: Layer, size: int) -> Tensor:
        bias = read(self.module, layer.bias) if layer.bias else None
        return torch.zeros(size, dtype=torch.float64) if bias is None else bias.detach().double()

    def _within(self, layer: Layer, old: Tensor, shift: Tensor) -> Tensor:
        """No shift where the new bias would not fit 32 bits: channels that are nearly dead have tiny scales."""
        scale = self.scales.get(layer.weight)
        steps = [
            float(source.args[1])  # type: ignore[arg-type]
            for source in self.quantized.nodes
            if str(source.target).startswith("quantized_decomposed.dequantize_per_tensor")
            and any(user.name == layer.node.name for user in source.users)
        ]
        if scale is None or not steps or scale.shape[1] != 1:
            return shift
        most = scale[:, 0].double() * min(steps) * _LARGEST
        return torch.where((old + shift).abs() <= most, shift, 0.0)

    def _norm(self, twin: fx.Node, node: fx.Node) -> None:
        """New running statistics before the norm runs."""
        names = [parameter_of(tensor) for tensor in twin.args[3:5]]
        mean, variance = (None if name is None else read(self.module, name) for name in names)
        source, own = twin.args[0], node.args[0]
        if mean is None or variance is None or twin.args[5]:
            return
        if any(self.readers.get(str(name), 1) > 1 for name in names):
            return
        self.float.to(twin.name)
        if not isinstance(source, fx.Node) or not isinstance(own, fx.Node):
            return
        was = moments([one[source] for one in self.float.values])
        now = moments([one[own] for one in self.quantized.values])
        if was is None or now is None:
            return
        (_, m1, v1), (_, m2, v2) = was, now
        # What lies off the running statistics goes on lying off them by as many deviations.
        fresh = (m2 - (m1 - mean.double()) * (v2 / v1).sqrt(), variance.double() * v2 / v1)
        for name, value, like in zip(names, fresh, (mean, variance), strict=True):
            values = value.to(like.dtype)
            reason = "statistics of the norm's quantized input"
            self.edits.append(Assign(str(name), Values(values.contiguous()), reason=reason))
            self.quantized.set(str(name), values)


class _Behind:
    """A layer's results behind the sum and the clamp that read them, of the float and of the quantized network.

    Args:
        parts: (half of the examples, what the float network has, what the quantized one has before the clamp).
        bounds: of the clamp.
        dim: of the channels.
    """

    def __init__(
        self, parts: list[tuple[int, Tensor, Tensor]], bounds: tuple[float, float], dim: int
    ) -> None:
        self.parts, self.bounds, self.dim = parts, bounds, dim
        self.rank, self.size = parts[0][1].ndim, parts[0][1].shape[dim]
        self.rest = [d for d in range(self.rank) if d != dim]

    def along(self, values: Tensor) -> Tensor:
        """(size,) values, to be added to the layer's result."""
        return values.reshape([-1 if d == self.dim else 1 for d in range(self.rank)])

    def shift(self) -> tuple[Tensor, bool]:
        """(size,) float64: what makes the squared error least, where each half of the examples helps the other; whether one was tried."""
        shifts = torch.zeros(2, self.size, dtype=torch.float64)
        for _ in range(STEPS):
            total, active, _ = self._sums(shifts)
            shifts += torch.where(active > 0, total / active.clamp_min(1), 0.0)
        before = self._sums(torch.zeros_like(shifts))[2]
        after = self._sums(shifts.flip(0))[2]
        helps = (after < before).all(0)
        return torch.where(helps, shifts.mean(0), 0.0), bool(shifts.any())

    def _sums(self, shifts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each half and channel: Σ errors of values that the clamp lets through, their number, Σ squared errors of all."""
        total, active, squares = (torch.zeros_like(shifts) for _ in range(3))
        low, high = self.bounds
        for half, want, got in self.parts:
            moved = got + self.along(shifts[half].float())
            inside = (moved > low) & (moved < high)
            error = want - moved.clamp(low, high)
            total[half] += (error * inside).sum(self.rest, dtype=torch.float64)
            active[half] += inside.sum(self.rest)
            squares[half] += error.square().sum(self.rest, dtype=torch.float64)
        return total, active, squares


def _thinned(value: Tensor, dim: int) -> Tensor:
    """About ``POSITIONS`` positions of each example, evenly spread: neighbours are alike."""
    places = [d for d in range(1, value.ndim) if d != dim % value.ndim]
    total = prod(value.shape[d] for d in places)
    every = max(floor((total / POSITIONS) ** (1 / max(len(places), 1))), 1)
    for place in places:
        value = value[(slice(None),) * place + (slice(None, None, every),)]
    return value


def _reader_count(module: fx.GraphModule) -> dict[str, int]:
    result: dict[str, int] = {}
    own: dict[int, list[str]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        result[name] = result.get(name, 0) + len(node.users)
        own.setdefault(id(read(module, name)), []).append(name)
    for names in own.values():
        total = sum(result[name] for name in set(names))
        for name in names:
            result[name] = total
    return result


def _new_name(module: fx.GraphModule, layer: Layer) -> str | None:
    """What a layer's first bias is called; None where it cannot have one."""
    if layer.kind not in ("linear", "convolution") or operator_name(layer.node) not in (
        "linear",
        "conv1d",
        "conv2d",
        "conv3d",
    ):
        return None
    readers = sum(
        len(node.users)
        for node in module.graph.find_nodes(op="get_attr")
        if node.target == layer.weight
    )
    return f"{layer.weight}_bias" if readers == 1 else None
