"""Bias correction: what quantization moves the mean of each channel by is taken off its bias."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
from tinier.graph.walk import Walk, alive, outputs_of
from tinier.methods.base import Method
from tinier.methods.bias_shift import UNBOUNDED, Shift
from tinier.methods.norm_statistics import moments
from tinier.methods.sampled import examples, relative_error, samples_of
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.statistics.chunks import Batch, largest_value

MOST = 128  # examples
LARGE = (
    2**20
)  # bytes of a network's largest value, above which half as many examples show as much: each has thousands of positions
MEMORY = 2**27  # bytes of the values of all examples, in both graphs together
FEWEST = 8  # examples, where they take more
CHECKED = 32  # examples whose outputs are compared at the end
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
        most = enough(network, self.most)
        data = samples_of(network, statistics, most, "bias correction", None)
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
        most: examples that are used; half of them where the network's largest value takes more than 1 MB for each.

    Returns:
        The plan with `Assign` edits before its quantization; the same plan where nothing got better.

    Raises:
        DataError: there are no examples.

    Cost:
        One run of both networks, another of the quantized one on 32 examples, and passes over a sample of each layer's results.
        Memory of 128 MB of values beside copies of the weights: layers with large results see fewer examples (and of each hundreds of
        positions) than those behind them, which further examples reach through the layers corrected so far.
    """
    return _corrected(folded, plan, examples(folded, batches, enough(folded, most), None), norms)[0]


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
    few = examples(folded, batches, enough(folded, most), None)
    return _corrected(folded, plan, few, True, aim)


def enough(network: Network, most: int = MOST) -> int:
    """How many examples a network's biases are corrected with: ``most``, or half of them where its values are large."""
    return most if largest_value(network) <= LARGE else max(most // 2, 2)


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
    quantized = _module(rest, base)
    most = alive(wanted, len(next(iter(base.example.values()))))
    room = {name: max(MEMORY // (2 * size), FEWEST) for name, size in most.items()}
    correction = _Correction(wanted, own, quantized, rest, data, room, norms)
    correction.run()
    if not correction.edits:
        return plan, correction.notes
    few = correction.ran[: max(CHECKED // len(data[0][0]), 1)]
    if correction.renewed:
        quantized = _module(rest, base)
    expected, found = (
        walk.outputs[: len(few)] for walk in (correction.float, correction.quantized)
    )
    was = relative_error(expected, outputs_of(quantized, few))
    now = relative_error(expected, found)
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
        room: Mapping[str, int],
        norms: bool,
    ) -> None:
        self.module, self.room, self.norms = module, room, norms
        few = max(next(iter(room.values())) // len(data[0][0]), 1)  # batches
        # The first ones are from everywhere: data may be sorted.
        every = -(-len(data) // few)
        self.waiting = [batch for start in range(every) for batch in data[start::every]]
        self.ran, self.waiting = self.waiting[:few], self.waiting[few:]
        self.counts = [len(batch[0]) for batch in self.ran]
        self.float, self.quantized = Walk(aim, self.ran), Walk(quantized, self.ran)
        self.twins = {node.name: node for node in self.float.nodes if node.op == "call_function"}
        self.readers = _reader_count(module)
        self.scales = {
            edit.tensor: edit.scale.tensor
            for edit in plan.edits
            if isinstance(edit, QuantizeWeight)
        }
        self.edits: list[Assign] = []
        self.left: list[str] = []
        self.renewed = False  # whether the quantized graph has other statistics

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
            if layer is not None:
                self.float.to(node.name)
                self._grow(node.name)
            self.quantized.step()
            if layer is not None:
                self.float.step()
                self._layer(layer, node)
        while self.float.next() is not None:
            self.float.step()

    def _grow(self, name: str) -> None:
        """Half as many more examples, or all of them, where values have become so small that they have room."""
        behind = (
            self.float.next()
        )  # the float graph is behind the quantized one: its values are larger
        if behind is None:
            return
        have = total = sum(self.counts)
        extra: list[Sequence[Tensor]] = []
        for batch in self.waiting:
            total += len(batch[0])
            if total > self.room[name]:
                break
            extra.append(batch)
        left = self.waiting[len(extra) :]
        if extra and (not left or 2 * sum(len(batch[0]) for batch in extra) >= have):
            self.float.add(extra)
            self.quantized.add(extra)
            self.counts += [len(batch[0]) for batch in extra]
            self.ran, self.waiting = [*self.ran, *extra], left

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
        shift, tried = behind.best()
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

    def _behind(self, twin: fx.Node, node: fx.Node, dim: int) -> Shift | None:
        """What the layer's result becomes in a sum and a clamp that alone read it, as far as it is known by now."""
        at, bounds = twin, UNBOUNDED
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
        wanted, found = [], []
        for index, values in enumerate(self.quantized.values):
            want, got = self.float.values[index][twin], values[node]
            if want.ndim < 2 or len(want) % self.counts[index]:
                return None  # not as many rows for each example
            if others:
                want, got = want + others[index][0], got + others[index][1]
            wanted.append(want)
            found.append(got)
        return Shift(wanted, found, self.counts, bounds, dim)

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
            self.renewed = True


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
