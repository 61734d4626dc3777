"""Batch norms that were folded get their statistics again, from what the quantized layers before them give."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from tinier.edits.assign import Assign
from tinier.edits.base import Edit, Plan, Values
from tinier.edits.pairs import as_matrix
from tinier.edits.quantize import Quantize, QuantizeWeight
from tinier.graph.fold import fold, layer_before, parameter_of, read
from tinier.graph.layers import Layer, linear_layer
from tinier.graph.rules import operator_name
from tinier.graph.walk import Walk, outputs_of
from tinier.methods.sampled import examples, relative_error
from tinier.network import Network
from tinier.statistics.chunks import Batch

NAME = "batch_norm_reestimation"
MOST = 64  # examples
_LARGEST_BIAS = (
    2**30
)  # in units of input scale · weight scale: the sum of products gets the other bit
_REASON = "statistics of the quantized layer"


def normed(network: Network) -> tuple[str, ...]:
    """The weights, by their names in the folded graph, of layers that a batch norm was folded into."""
    module = network.traced.module
    folded = {node.name: node for node in fold(module).graph.nodes}
    layers = [
        layer_before(node, folded)
        for node in module.graph.nodes
        if operator_name(node) == "batch_norm" and node.name not in folded
    ]
    names = [None if node is None else parameter_of(folded[node.name].args[1]) for node in layers]
    return tuple(name for name in names if name is not None)


def reestimate_folded_norms(
    folded: Network,
    plan: Plan,
    batches: Iterable[Batch],
    weights: Collection[str],
    *,
    most: int = MOST,
) -> tuple[Plan, tuple[str, ...]]:
    """Give channels of quantized layers the mean and the variance that they have in the float network, one layer after the other.

        s'_c = r s_c,    b'_c = E[y_c] − r (E[ŷ_c] − b_c),    r = √(Var[y_c] / Var[ŷ_c])

    with y the layer's result in the float network and ŷ that in the quantized one behind the corrected layers before it: what a batch norm
    behind the layer does, whose running statistics are taken of ŷ. The integers stay as they are.

    Args:
        folded: the float network that ``plan`` is for; left as it is.
        plan: the quantization.
        batches: inputs, or pairs of inputs and labels, which are not used.
        weights: those of the layers; see ``normed``.
        most: examples that are used, 2 or more.

    Returns:
        The plan with other scales and biases, and what there is to say. Where the error of the outputs does not fall, or no layer is of
        use, it is the plan as it was. Where all channels share a scale, the means alone are put right.

    Raises:
        DataError: there are no examples.

    Cost:
        A run of both networks, and two of the quantized one; the values that are alive inside for all examples together.

    Source:
        Sun et al. 2019, "Hybrid 8-bit Floating Point (HFP8) Training and Inference for Deep Neural Networks", section 3.3, and Nagel et al.
        2022, "Overcoming Oscillations in Quantization-Aware Training", section 5.1.

    Differs:
        The norms are folded, and re-estimated after training, too. The aims are the float network's mean and variance on the same examples,
        not β and γ², so that what is peculiar to these examples goes out.
    """
    data = examples(folded, batches, most)
    if sum(len(batch[0]) for batch in data) < 2:
        return plan, (f"{NAME} left out: two examples or more are needed",)
    if not set(weights) & {e.tensor for e in plan.edits if isinstance(e, QuantizeWeight)}:
        return plan, (f"{NAME} left out: no batch norm was folded into a quantized layer",)
    before = Plan(tuple(edit for edit in plan.edits if isinstance(edit, Assign)))
    rest = Plan(tuple(edit for edit in plan.edits if not isinstance(edit, Assign)))
    base = before.apply(folded) if before.edits else folded
    module = fold(base.traced.module)
    simulation = rest.apply(base).module
    assert isinstance(simulation, fx.GraphModule)
    done = _Reestimation(module, simulation, rest.edits, data, weights)
    done.run()
    found = before + Plan((*done.biases, *done.edits))
    last = found.apply(folded).module
    assert isinstance(last, fx.GraphModule)
    was = relative_error(done.float.outputs, outputs_of(rest.apply(base).module, data))  # type: ignore[arg-type]
    now = relative_error(done.float.outputs, outputs_of(last, data))
    if not now < was:
        note = f"{NAME} left out: the error of the outputs would be {now:.3g}, it is {was:.3g}"
        return plan, (note,)
    return found, ()


@dataclass(frozen=True)
class _Moments:
    """Mean and variance of each channel, (C,) float64."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, values: Sequence[Tensor]) -> "_Moments":
        """Of (batch, C, …) each."""
        flat = torch.cat([value.double().movedim(1, 0).flatten(1) for value in values], 1)
        return cls(flat.mean(1), flat.var(1, correction=0))


class _Reestimation:
    """One run of the float and the quantized graph side by side."""

    def __init__(
        self,
        module: fx.GraphModule,
        simulation: fx.GraphModule,
        edits: Sequence[Edit],
        data: Sequence[Sequence[Tensor]],
        weights: Collection[str],
    ) -> None:
        self.module, self.weights = module, set(weights)
        self.float, self.quantized = Walk(module, data), Walk(simulation, data)
        self.twins = {node.name: node for node in self.float.nodes if node.op == "call_function"}
        self.edits = list(edits)
        self.places = {
            edit.tensor: place for place, edit in enumerate(edits) if isinstance(edit, QuantizeWeight)
        }  # fmt: skip
        self.steps = {edit.tensor: edit.scale for edit in edits if isinstance(edit, Quantize)}
        self.biases: list[Assign] = []

    def run(self) -> None:
        """Go through all layers."""
        while (node := self.quantized.next()) is not None:
            twin = self.twins.get(node.name)
            layer = None if twin is None else linear_layer(twin)
            self.quantized.step()
            if layer is not None and layer.weight in self.weights & self.places.keys():
                self.float.to(node.name)
                self.float.step()
                self._layer(layer, node)
        while self.float.next() is not None:
            self.float.step()

    def _layer(self, layer: Layer, node: fx.Node) -> None:
        place = self.places[layer.weight]
        edit = self.edits[place]
        weight = read(self.module, layer.weight)
        bias = None if layer.bias is None else read(self.module, layer.bias)
        assert isinstance(edit, QuantizeWeight) and weight is not None
        if bias is None or layer.kind == "transposed":
            return
        want = _Moments.of([values[layer.node] for values in self.float.values])
        have = _Moments.of([values[node] for values in self.quantized.values])
        least = 1e-6 * float(
            want.variance.mean()
        )  # channels that hardly move have no variance to match
        alive = (want.variance > least) & (have.variance > least)
        ratio = torch.where(alive, (want.variance / have.variance).sqrt(), 1.0)
        scale = edit.scale.tensor
        if len(scale) != len(ratio):
            ratio = torch.ones_like(ratio)  # one scale for all channels
        old = bias.detach().double()
        fresh = want.mean - ratio * (have.mean - old)
        fits = self._fits(layer, scale, ratio, fresh)
        ratio, fresh = torch.where(fits, ratio, 1.0), torch.where(fits, fresh, old)
        if len(scale) == len(ratio):
            chosen = Values(edit.matrix(weight).contiguous())
            wider = (scale.double() * ratio[:, None]).float().contiguous()
            self.edits[place] = replace(edit, scale=Values(wider), integers=chosen)
        assert layer.bias is not None and as_matrix(weight, edit.axis).shape[0] == len(fresh)
        self.biases.append(Assign(layer.bias, Values(fresh.float().contiguous()), reason=_REASON))
        rank = self.quantized.values[0][node].ndim

        def channels(values: Tensor) -> Tensor:
            return values.float().reshape(1, -1, *[1] * (rank - 2))

        r, b, c = channels(ratio), channels(old), channels(fresh)
        self.quantized.change(node, lambda value: (value - b) * r + c)

    def _fits(self, layer: Layer, scale: Tensor, ratio: Tensor, bias: Tensor) -> Tensor:
        """(C,) bool: whether the new bias fits 32 bits."""
        step = self.steps.get(layer.source.name)
        if step is None or scale.shape[1] != 1:
            return torch.ones_like(ratio, dtype=torch.bool)
        return bias.abs() <= scale[:, 0].double() * ratio * step * _LARGEST_BIAS
