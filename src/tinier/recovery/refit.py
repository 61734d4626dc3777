"""Two networks side by side, node by node: the original gives the targets, the pruned one is fitted to them as it goes."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from tinier.edits.rewrite import Kept, sliced_graph
from tinier.graph.axes import atoms, positions
from tinier.graph.groups import Channels, named_tensors
from tinier.graph.layers import Layer, linear_layer
from tinier.graph.rules import argument, operator_name
from tinier.graph.rules.base import hint
from tinier.graph.trace import Traced
from tinier.statistics.sensitivity import output_gradients
from tinier.tensors.least_squares import Sums

MOST_ROWS, ROWS_PER_INPUT = 2**15, 16  # rows that a Gram matrix is summed over: the larger of both
SMALLEST_SCALE = (
    1e-3  # of a batch norm, relative to its largest: what is smaller cannot be fitted through
)

Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class Way:
    """What happens to the result of a layer before it meets something else.

    Attributes:
        norms: batch norms that it goes through, in order.
        scales: parameters that it is multiplied by, channel by channel.
        other: the other summand, where it ends in a residual sum whose other summand is known before the layer.
    """

    norms: tuple[fx.Node, ...]
    scales: tuple[fx.Node, ...]
    other: fx.Node | None


class Refit:
    """The pruned graph beside the original.

    Args:
        traced: the original; left as it is.
        channels: its axes.
        kept: atom → (kept,) int64 positions that stay.
        data: chunks of input name → tensor.
        ridge: see ``Sums.fit``.
        seed: of the weights of rows, and of the rows that are drawn.

    Attributes:
        tensors: name → parameter or buffer of the pruned graph.
        changed: the names that ``run`` changed, in order.
    """

    def __init__(
        self,
        traced: Traced,
        channels: Channels,
        kept: Kept,
        data: list[dict[str, Tensor]],
        ridge: float,
        seed: int,
    ) -> None:
        self.traced, self.channels, self.kept, self.data = traced, channels, kept, data
        self.ridge, self.seed = ridge, seed
        self.graph = sliced_graph(traced, channels, kept)
        self.old = fx.Interpreter(traced.module)
        self.new = fx.Interpreter(self.graph)
        nodes = zip(traced.module.graph.nodes, self.graph.graph.nodes, strict=True)
        self.twin: dict[fx.Node, fx.Node] = dict(nodes)
        self.order = {node: number for number, node in enumerate(self.twin)}
        self.before, self.tensors = named_tensors(traced.module), named_tensors(self.graph)
        self.changed: list[str] = []
        self.same: set[fx.Node] = set()
        self.rows = torch.Generator().manual_seed(seed)
        self.uses: dict[int, int] = {}  # id of a tensor → number of operators that read it
        for node in traced.module.graph.find_nodes(op="get_attr"):
            number = id(self.before[str(node.target)])
            self.uses[number] = self.uses.get(number, 0) + len(node.users)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of the pruned network.

        Raises:
            KeyError: one is missing. RuntimeError: one has another shape.
        """
        with torch.no_grad():
            for name in self._read():
                own, given = self.tensors[name], state.get(name)
                if given is None and name in dict(self.traced.module.named_parameters()):
                    raise KeyError(f"no parameter {name}")
                if given is not None:
                    if own.shape != given.shape:
                        shapes = f"{tuple(given.shape)}, not {tuple(own.shape)}"
                        raise RuntimeError(f"{name} is {shapes}")
                    own.copy_(given)

    def error(self) -> float:
        """Mean squared difference of the floating-point outputs to the original's, each divided by its variance."""
        total, energy = 0.0, 0.0
        with torch.no_grad():
            for batch in self.data:
                inputs = [batch[name] for name in self.traced.inputs]
                wanted = fx.Interpreter(self.traced.module).run(*(x.clone() for x in inputs))
                found = fx.Interpreter(self.graph).run(*(x.clone() for x in inputs))
                for a, b in zip(found, wanted, strict=True):
                    if b.is_floating_point() and a.shape == b.shape:
                        b = b.double()
                        scale = float(b.var().clamp(min=1e-30)) if b.numel() > 1 else 1.0
                        total += float((a.double() - b).square().sum()) / scale
                        energy += b.numel()
        return total / max(energy, 1.0)

    def run(self) -> None:
        """Fit every layer behind a cut, in the order of the graph.

        Cost:
            One run of both networks over the data and, for the weights of rows, one run and one backward of the original.
        """
        weights = self._weights()
        pairs: list[tuple[Values, Values]] = [({}, {}) for _ in self.data]
        with torch.no_grad():
            for node, twin in self.twin.items():
                if node.op == "output":
                    break
                shared = self._shared(node)
                if shared:
                    self.same.add(node)
                elif _mutable(node):
                    _part(node, twin, pairs)
                for (theirs, _), batch in zip(pairs, self.data, strict=True):
                    theirs[node] = self._value(self.old, theirs, node, batch)
                if not shared:
                    layer = linear_layer(twin)
                    if layer is not None and self._free(layer.weight, layer.bias):
                        self._fit(node, layer, pairs, weights.get(node))
                    if operator_name(node) in NORMS:
                        self._renew(twin, [ours for _, ours in pairs])
                for (theirs, ours), batch in zip(pairs, self.data, strict=True):
                    # Parameters stay apart, for one that was equal may be fitted later.
                    alias = shared and node.op != "get_attr"
                    value = theirs[node] if alias else self._value(self.new, ours, twin, batch)
                    ours[twin] = value
                for theirs, ours in pairs:
                    for last in self.old.user_to_last_uses.get(node, []):
                        del theirs[last]
                    for last in self.new.user_to_last_uses.get(twin, []):
                        del ours[last]

    def _read(self) -> list[str]:
        names = [str(node.target) for node in self.graph.graph.find_nodes(op="get_attr")]
        return list(dict.fromkeys(names))

    def _value(
        self,
        interpreter: fx.Interpreter,
        values: Values,
        node: fx.Node,
        batch: Mapping[str, Tensor],
    ) -> Any:
        if node.op == "placeholder":
            return batch[str(node.target)].clone()
        interpreter.env = values
        return interpreter.run_node(node)

    def _shared(self, node: fx.Node) -> bool:
        """Whether both networks compute the same there, so that once is enough."""
        if node.op == "placeholder":
            return True
        if node.op == "get_attr":
            ours, theirs = self.tensors[str(node.target)], self.before[str(node.target)]
            return torch.equal(ours, theirs)
        if not all(source in self.same for source in node.all_input_nodes):
            return False
        twin = self.twin[node]
        return str((node.args, node.kwargs)) == str((twin.args, twin.kwargs))

    def _free(self, *names: str | None) -> bool:
        """Whether each tensor is read by one operator only, under one name."""
        return all(name is None or self.uses[id(self.before[name])] == 1 for name in names)

    def _weights(self) -> dict[fx.Node, list[Tensor]]:
        """Layer → for each chunk how much each row of its result matters, (rows,); 1 in the mean over all."""
        generator = torch.Generator().manual_seed(self.seed)
        found: dict[fx.Node, list[Tensor]] = {}
        for batch in self.data:
            for node, gradient in output_gradients(self.traced, batch, generator).items():
                layer = linear_layer(node)
                assert layer is not None
                squares = layer.outputs(gradient).float().cpu().square().sum((0, 2))
                found.setdefault(node, []).append(squares)
        for node, parts in found.items():
            rows = torch.cat(parts).double()
            if len(parts) == len(self.data) and bool(rows.isfinite().all()) and rows.sum() > 0:
                found[node] = [part.double() / rows.mean() for part in parts]
        return {
            node: parts
            for node, parts in found.items()
            if parts[0].dtype == torch.float64  # the others have none, and all rows count alike
        }

    def _kept_part(self, node: fx.Node, value: Tensor) -> Tensor:
        """What stays of a value of the original."""
        axes: Any = self.channels.axes.get(node) or []
        for dim, axis in enumerate(axes):
            if any(atom in self.kept for atom in atoms(axis)):
                left = positions(
                    axis, lambda a: self.kept[a] if a in self.kept else torch.arange(a.size)
                )
                value = value.index_select(dim, left.to(value.device))
        return value

    def _fit(
        self,
        node: fx.Node,
        layer: Layer,
        pairs: list[tuple[Values, Values]],
        weights: list[Tensor] | None,
    ) -> None:
        weight = self.tensors[layer.weight]
        matrix = layer.matrix(weight).double().cpu()
        groups, outputs, inputs = matrix.shape
        way = self._way(node)
        norm = way.norms[0] if way.norms and node in way.norms[0].all_input_nodes else None
        mean = None if norm is None else str(norm.args[3].target)  # type: ignore[union-attr]
        if mean is not None and not self._free(mean):
            mean = None
        stretch = self._stretch(way, outputs * groups)
        sums = Sums(groups, inputs, outputs)
        total = sum(layer.rows(theirs[node]) for theirs, _ in pairs)
        limit = max(MOST_ROWS, ROWS_PER_INPUT * inputs)
        for number, (theirs, ours) in enumerate(pairs):
            target = self._kept_part(node, theirs[node])
            if way.other is not None:
                gap = self._kept_part(way.other, theirs[way.other]) - ours[self.twin[way.other]]
                target = target + gap * _along(stretch, gap, layer).to(gap)
            rows, index = layer.rows(target), None
            if total > limit:
                few = max(1, rows * limit // total)
                index = torch.randperm(rows, generator=self.rows)[:few].sort().values
            x = layer.inputs(ours[layer.source], weight, index)
            y = layer.outputs(target, index)
            if x.shape[1] != y.shape[1]:
                return  # data decides how many rows there are, as where tokens choose experts
            w = None if weights is None else weights[number]
            if w is not None and len(w) != rows:
                return
            sums.add(x, y, w if w is None or index is None else w[index])
        if not sums.weight > 0:
            return
        old = (
            self.tensors[layer.bias].double().cpu() if layer.bias else torch.zeros(groups * outputs)
        )
        fitted, shift = sums.fit(
            matrix,
            old.double().view(groups, outputs),
            self.ridge,
            intercept=layer.bias is not None or mean is not None,
        )
        self._set(layer.weight, layer.parameter(fitted, weight.shape))
        if layer.bias is not None:
            self._set(layer.bias, shift.flatten())
        elif mean is not None:
            self._set(mean, self.tensors[mean].double().cpu() - shift.flatten())

    def _way(self, node: fx.Node) -> Way:
        norms: list[fx.Node] = []
        scales: list[fx.Node] = []
        at = node
        while len(at.users) == 1:
            user = next(iter(at.users))
            name = operator_name(user)
            if name in NORMS and user.args[0] is at:
                norms.append(user)
            elif name == "mul" and isinstance(scale := _second(user, at), fx.Node):
                if scale.op != "get_attr":
                    break
                scales.append(scale)
            elif name == "add" and not user.kwargs:
                other = _second(user, at)
                known = isinstance(other, fx.Node) and self._known(other, node)
                return Way(tuple(norms), tuple(scales), other if known else None)
            elif name != "dropout":
                break
            at = user
        return Way(tuple(norms), tuple(scales), None)

    def _known(self, other: fx.Node, node: fx.Node) -> bool:
        """Whether a summand is a value of the layer's shape that was computed before the layer."""
        value = other.meta.get("val")
        return (
            other.op == "call_function"
            and self.order[other] < self.order[node]
            and isinstance(value, Tensor)
            and [hint(n) for n in value.shape] == [hint(n) for n in node.meta["val"].shape]
        )

    def _stretch(self, way: Way, outputs: int) -> Tensor:
        """(outputs,) float64: by how much the layer must change for the sum to change by 1; 0 where it cannot."""
        scale = torch.ones(outputs, dtype=torch.float64)
        for node in way.scales if way.other is not None else ():
            factor = self.tensors[str(node.target)].double().cpu().flatten()
            if len(factor) not in (1, outputs):
                return torch.zeros(outputs, dtype=torch.float64)
            scale = scale * factor
        for norm in way.norms if way.other is not None else ():
            weight, variance = norm.args[1], norm.args[4]
            own = (self._tensor(variance) + _epsilon(norm)).rsqrt()
            scale = scale * (own if weight is None else own * self._tensor(weight))
        enough = scale.abs() > SMALLEST_SCALE * scale.abs().max()
        return torch.where(enough, 1 / scale, 0.0)

    def _tensor(self, node: Any) -> Tensor:
        return self.tensors[str(node.target)].double().cpu()

    def _set(self, name: str, value: Tensor) -> None:
        self.tensors[name].copy_(value)
        if name not in self.changed:
            self.changed.append(name)

    def _renew(self, norm: fx.Node, values: list[Values]) -> None:
        """Give a batch norm the statistics of its new input, and the scale and shift with which its function stays."""
        source, *arguments = norm.args[:5]
        if not all(isinstance(a, fx.Node) and a.op == "get_attr" for a in arguments):
            return
        weight, bias, mean, variance = (str(a.target) for a in arguments)  # type: ignore[union-attr]
        if not self._free(weight, bias, mean, variance):
            return
        total = square = torch.zeros(len(self.tensors[mean]), dtype=torch.float64)
        count = 0
        for value in values:
            x = value[source].double().cpu()  # type: ignore[index]
            others = [dim for dim in range(x.ndim) if dim != 1]
            total, square = total + x.sum(others), square + x.square().sum(others)
            count += prod(x.shape[dim] for dim in others)
        centre = total / count
        spread = (square / count - centre.square()).clamp(min=0)
        # A channel that never changes has no statistics that training could go on from.
        lively = spread > 1e-12 * (square / count)
        old = [self.tensors[name].double().cpu() for name in (weight, bias, mean, variance)]
        scale = old[0] / (old[3] + _epsilon(norm)).sqrt()
        fresh = [
            scale * (spread + _epsilon(norm)).sqrt(),
            old[1] + scale * (centre - old[2]),
            centre,
            spread,
        ]
        for name, now, was in zip((weight, bias, mean, variance), fresh, old, strict=True):
            self._set(name, torch.where(lively & now.isfinite(), now, was))


NORMS = {"batch_norm", "_native_batch_norm_legit_no_training"}


def _second(node: fx.Node, first: fx.Node) -> Any:
    """The other operand of a sum or product of two; None if it is the same."""
    if len(node.args) != 2:
        return None
    left, right = node.args
    other = right if left is first else left
    return None if other is first else other


def _epsilon(norm: fx.Node) -> float:
    position = 7 if operator_name(norm) == "batch_norm" else 6
    return float(argument(norm, position, "eps", 1e-5))


def _along(stretch: Tensor, value: Tensor, layer: Layer) -> Tensor:
    shape = [1] * value.ndim
    shape[1 if layer.kind in ("convolution", "transposed") else -1] = -1
    return stretch.view(shape)


def _mutable(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _part(node: fx.Node, twin: fx.Node, pairs: list[tuple[Values, Values]]) -> None:
    """Give the twin tensors of its own where both networks hold the same one and an operator changes it in place."""
    for source, own in zip(node.all_input_nodes, twin.all_input_nodes, strict=True):
        for theirs, ours in pairs:
            if (
                isinstance(ours[own], Tensor)
                and ours[own] is theirs[source]
                and source.op != "get_attr"
            ):
                ours[own] = ours[own].clone()
