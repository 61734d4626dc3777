"""Which layer loses what, and why: the loss of a quantized network, split into rounding and clipping of weights and of activations."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tinier.edits.base import Plan
from tinier.edits.pairs import as_matrix, from_matrix
from tinier.edits.quantize import Quantize, QuantizeDynamically, QuantizeWeight
from tinier.errors import DataError, InputError
from tinier.graph.fold import fold, read
from tinier.graph.rerun import Rerun, value_bytes
from tinier.graph.rules import operator_name
from tinier.graph.walk import outputs_of
from tinier.network import Network

MEMORY = 2**29  # bytes of the values that are kept at once
CAUSES = ("weight rounding", "weight clipping", "activation rounding", "activation clipping")

Edited = Quantize | QuantizeDynamically | QuantizeWeight


@dataclass(frozen=True)
class LayerLoss:
    """What quantizing one layer does to the outputs.

    Every loss is the mean squared change of the floating-point outputs, divided by their variance. Activations rounded in the range of
    each run lose by rounding alone: such a range clips nothing.

    Attributes:
        layer: its weight's name without ".weight", or the node's name.
        operator: such as conv2d.
        weight_rounding, weight_clipping, activation_rounding, activation_clipping: loss of the float network with this alone.
        alone: loss of the float network with this layer quantized.
        restored: by how much the loss of the quantized network falls when this layer alone computes in float; negative where the error
            makes up for another's.
    """

    layer: str
    operator: str
    weight_rounding: float
    weight_clipping: float
    activation_rounding: float
    activation_clipping: float
    alone: float
    restored: float

    @property
    def causes(self) -> dict[str, float]:
        """Cause → loss of it alone."""
        values = (
            self.weight_rounding,
            self.weight_clipping,
            self.activation_rounding,
            self.activation_clipping,
        )
        return dict(zip(CAUSES, values, strict=True))


@dataclass(frozen=True)
class Attribution:
    """The loss of a quantized network by layer and cause.

    Attributes:
        layers: those whose restoring gives most back first.
        total: loss of the quantized network.
        examples: how many it is of.
    """

    layers: tuple[LayerLoss, ...]
    total: float
    examples: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        rows = [
            {"layer": row.layer, "operator": row.operator, **row.causes}
            | {"alone": row.alone, "restored": row.restored}
            for row in self.layers
        ]
        return {"total": self.total, "examples": self.examples, "layers": rows}


def attribute(network: Network, plan: Plan, batches: Iterable[Mapping[str, Tensor]]) -> Attribution:
    """Split the loss of a quantized network by layer and cause, on the simulation.

    Args:
        network: the float network that the plan was made for.
        plan: its ``Quantize``, ``QuantizeDynamically`` and ``QuantizeWeight`` edits, and those before them.
        batches: input name → tensor; a few dozen examples do.

    Returns:
        One row for each operator that reads rounded values or integer weights.

    Raises:
        InputError: the plan quantizes nothing.
        DataError: no examples, or outputs that are not finite.

    Cost:
        For each layer five runs of what comes after it, in the float network, and one in the quantized one.
    """
    return _split(network, plan, batches, causes=True).result()


def restored_losses(
    network: Network, plan: Plan, batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, float]:
    """Layer → ``LayerLoss.restored`` alone, those that give back most first; arguments and errors as of ``attribute``.

    Cost:
        For each layer one run of what comes after it in the quantized network.
    """
    split = _split(network, plan, batches, causes=False)
    found = {label: sums["restored"] / split.examples for label, sums in split.sums.items()}
    return dict(sorted(found.items(), key=lambda row: -row[1]))


def outputs_loss(
    found: Iterable[tuple[Tensor, ...]], wanted: Iterable[tuple[Tensor, ...]]
) -> float:
    """Mean squared difference of floating-point outputs, divided by the variance of those wanted, over batches that count by their size."""
    total, examples = 0.0, 0
    for got, want in zip(found, wanted, strict=True):
        count = len(want[0]) if want[0].ndim else 1
        total += count * _loss(got, want, [_variance(value) for value in want])
        examples += count
    return total / max(examples, 1)


def _split(
    network: Network, plan: Plan, batches: Iterable[Mapping[str, Tensor]], causes: bool
) -> "_Split":
    before = Plan(tuple(e for e in plan.edits if not isinstance(e, Edited)))
    ours = [e for e in plan.edits if isinstance(e, Edited)]
    if not ours:
        raise InputError("attribution: the plan quantizes nothing")
    base = before.apply(network) if before.edits else network
    split = _Split(base, Plan(tuple(ours)).apply(base), ours, causes)
    for batch in batches:
        split.add(batch)
    if not split.examples:
        raise DataError(f"{network.name}: no examples to attribute the loss with")
    return split


class _Split:
    def __init__(
        self,
        base: Network,
        simulation: Network,
        edits: list[Edited],
        causes: bool,
    ) -> None:
        self.causes = causes
        self.module = fold(base.traced.module)
        assert isinstance(simulation.module, fx.GraphModule)
        self.simulation = simulation.module
        self.names = base.traced.inputs
        self.values = {e.tensor: e for e in edits if not isinstance(e, QuantizeWeight)}
        self.weights = {e.tensor: e for e in edits if isinstance(e, QuantizeWeight)}
        self.twin = {node.name: node for node in self.simulation.graph.nodes}
        example = len(next(iter(base.example.values())))
        each = max(1, value_bytes(self.module) // max(example, 1))
        self.chunk = max(1, MEMORY // (3 * each)) if base.traced.batched else example
        self.sums: dict[str, dict[str, float]] = {}
        self.operators: dict[str, str] = {}
        self.total = 0.0
        self.examples = 0

    def add(self, batch: Mapping[str, Tensor]) -> None:
        inputs = [batch[name] for name in self.names]
        for parts in zip(*(value.split(self.chunk) for value in inputs), strict=True):
            self._chunk(parts)

    def _chunk(self, inputs: tuple[Tensor, ...]) -> None:
        rounded, count = Rerun(self.simulation, inputs), len(inputs[0])
        float_run = Rerun(self.module, inputs) if self.causes else None
        wanted = outputs_of(self.module, [inputs])[0] if float_run is None else float_run.outputs
        scale = [_variance(value) for value in wanted]

        def loss(outputs: tuple[Tensor, ...]) -> float:
            return count * _loss(outputs, wanted, scale)

        whole = loss(rounded.outputs)
        if not whole < float("inf"):
            raise DataError("attribution: outputs are not finite")
        self.total += whole
        self.examples += count
        for node in self.module.graph.nodes:
            sources = self._sources(node)
            if not sources:
                continue
            label = _label(node, sources)
            self.operators[label] = operator_name(node)
            sums = self.sums.setdefault(label, dict.fromkeys((*CAUSES, "alone", "restored"), 0.0))
            twin = self.twin[node.name]
            sums["restored"] += whole - loss(
                rounded.with_arguments(twin, self._float(node, rounded))
            )
            if float_run is None:
                continue
            changes = self._changes(sources, float_run)
            for what in CAUSES:
                changed = {s: c[what] for s, c in changes.items() if what in c}
                if changed:
                    sums[what] += loss(float_run.with_arguments(node, changed))
            both = {source: change["all"] for source, change in changes.items()}
            sums["alone"] += loss(float_run.with_arguments(node, both))

    def _sources(self, node: fx.Node) -> dict[fx.Node, Edited]:
        """Input of a node that is quantized for it → by what."""
        result: dict[fx.Node, Edited] = {}
        for source in node.all_input_nodes:
            edit: Edited | None = self.values.get(source.name)
            if source.op == "get_attr":
                edit = self.weights.get(str(source.target), edit)
            if edit is not None and (not edit.readers or node.name in edit.readers):
                result[source] = edit
        return result

    def _changes(
        self, sources: Mapping[fx.Node, Edited], run: Rerun
    ) -> dict[fx.Node, dict[str, Tensor]]:
        """Input of a node that is quantized for it → what it reads under each cause."""
        return {
            source: _weight_parts(edit, run.values[source])
            if isinstance(edit, QuantizeWeight)
            else _activation_parts(edit, run.values[source])
            for source, edit in sources.items()
        }

    def _float(self, node: fx.Node, rounded: Rerun) -> dict[fx.Node, Tensor]:
        """What the node of the simulation would read, were its own inputs and weights float."""
        twin = self.twin[node.name]
        changed = {}
        for ours, theirs in zip(node.all_input_nodes, twin.all_input_nodes, strict=True):
            if ours.op == "get_attr":
                value = read(self.module, str(ours.target))
                assert value is not None
                changed[theirs] = value.detach()
            elif ours.name in self.twin:
                changed[theirs] = rounded.values[self.twin[ours.name]]
        return changed

    def result(self) -> Attribution:
        rows = [
            LayerLoss(
                label,
                self.operators[label],
                *(sums[what] / self.examples for what in (*CAUSES, "alone", "restored")),
            )
            for label, sums in self.sums.items()
        ]
        rows.sort(key=lambda row: -row.restored)
        return Attribution(tuple(rows), self.total / self.examples, self.examples)


def _label(node: fx.Node, sources: Iterable[fx.Node]) -> str:
    weight = next((str(s.target) for s in sources if s.op == "get_attr"), "")
    return weight.removesuffix(".weight") or node.name


def _weight_parts(edit: QuantizeWeight, weight: Any) -> dict[str, Tensor]:
    """A weight as it is under each cause. Clipping moves what lies outside of the grid to its end; rounding all that lies inside."""
    matrix = as_matrix(weight.detach(), edit.axis)
    grid = edit.grid
    whole = grid.dequantize(edit.matrix(weight))
    low, high = (
        grid.dequantize(torch.full_like(matrix, end, dtype=grid.integers.dtype))
        for end in (edit.low, edit.high)
    )
    clipped = torch.minimum(torch.maximum(matrix, low), high)
    inside = torch.where(clipped == matrix, whole, matrix)
    parts = {"weight rounding": inside, "weight clipping": clipped, "all": whole}
    return {what: from_matrix(part, weight, edit.axis) for what, part in parts.items()}


def _activation_parts(edit: Quantize | QuantizeDynamically, value: Any) -> dict[str, Tensor]:
    if isinstance(edit, QuantizeDynamically):
        rounded = edit.rounded(value)
        return {"activation rounding": rounded, "all": rounded}
    whole = edit.rounded(value)
    low, high = ((end - edit.zero_point) * edit.scale for end in (edit.low, edit.high))
    clipped = value.clamp(low, high)
    inside = torch.where(clipped == value, whole, value)
    return {"activation rounding": inside, "activation clipping": clipped, "all": whole}


def _variance(value: Tensor) -> float:
    return max(float(value.double().var()), 1e-30) if value.numel() > 1 else 1.0


def _loss(outputs: tuple[Tensor, ...], wanted: tuple[Tensor, ...], scale: list[float]) -> float:
    """Mean over the floating-point outputs of their mean squared change over their variance."""
    parts = [
        float((a.double() - b.double()).square().mean()) / s
        for a, b, s in zip(outputs, wanted, scale, strict=True)
        if b.is_floating_point() and b.numel()
    ]
    return sum(parts) / max(len(parts), 1)
