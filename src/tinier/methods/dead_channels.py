"""Dead channels: those that cannot change the output leave; what they add as a constant goes into biases."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tinier.edits.base import Plan
from tinier.edits.shift import Shift
from tinier.edits.slice import Slice
from tinier.graph.axes import atoms, places
from tinier.graph.axes import coordinates as channel_of
from tinier.graph.groups import Channels, Group, channel_groups, named_tensors
from tinier.graph.known import Known
from tinier.graph.rules import argument, operator_name
from tinier.graph.trace import Traced
from tinier.graph.weights import CONVOLUTION, LINEAR, RECURRENT, TRANSPOSED
from tinier.methods.base import Method
from tinier.network import Network
from tinier.statistics import Statistics

ROUNDS = 50  # a channel whose readers all left may leave in the next; networks are seldom deeper
FLAT = ("linear", "matmul", "mm")  # readers whose weight is a matrix
PRODUCTS = (*LINEAR, *CONVOLUTION, *TRANSPOSED, "mv", "dot", "addmv", "einsum")


@dataclass(frozen=True)
class DeadChannels(Method):
    """Find channels that cannot change the output, exactly.

    A channel is dead where, at every operator that sums over it, it is zero for any input, or the weights that read it are zero, or it
    is a constant that a bias can take up: c · Σ w goes into the bias of the reader (or comes off the running mean of the batch norm
    behind it). Convolutions with padding cannot take up a constant, for their border sees zeros.
    """

    name: ClassVar[str] = "dead_channels"

    def plan(self, network: Network, statistics: Statistics | None = None) -> Plan:
        """Shifts of biases, and one slice for each group that has dead channels; a group keeps one channel at least.

        Cost:
            A few runs of the network on its example, each with a second product for every product.
        """
        search = _Search(network)
        while search.round():
            pass
        slices = []
        for group in search.groups:
            dead = search.dead[group.name]
            if dead.any():
                slices.append(Slice.of(group, (~dead).nonzero().flatten().tolist()))
        shifts = [
            Shift(name, tuple(values.tolist()))
            for name, values in search.shifts.items()
            if bool((values != 0).any())
        ]
        return Plan((*shifts, *slices)) if slices else Plan()


class _Search:
    """Rounds of looking: what is found dead is written as zeros into a copy of the tensors, where the next round sees more."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.traced: Traced = network.traced
        self.channels: Channels = channel_groups(self.traced)
        self.tensors: dict[str, Tensor] = {}
        own: dict[int, Tensor] = {}
        for name, tensor in named_tensors(self.traced.module).items():
            self.tensors[name] = own.setdefault(id(tensor), tensor.detach().clone())
        # Norms and means over a channel count it even when it is zero.
        self.groups = [
            group
            for group in self.channels.groups
            if group.size > 1 and "normalised" not in group.atom.roles
        ]
        self.dead = {g.name: torch.zeros(g.size, dtype=torch.bool) for g in self.groups}
        self.spared: dict[str, int] = {}
        self.shifts: dict[str, Tensor] = {}
        self.rounds = 0

    def round(self) -> bool:
        """Look once; whether anything new was found."""
        self.rounds += 1
        run = Known(self.traced, self.tensors, self.network.example)
        found = []
        for group in self.groups:
            dead, folds = self._dead(run, group)
            new = dead & ~self.dead[group.name]
            if group.name in self.spared:
                new[self.spared[group.name]] = False
            elif bool((dead | self.dead[group.name]).all()):
                self.spared[group.name] = spare = int(new.nonzero()[0])
                new[spare] = False
            if new.any():
                found.append((group, new, folds))
        # Constants first: they are those of the tensors as they are.
        shifts: dict[str, Tensor] = {}
        for _, new, folds in found:
            for name, per_channel in folds:
                delta = per_channel[:, new].sum(1)
                shifts[name] = shifts.get(name, torch.zeros_like(delta)) + delta
        for name, delta in shifts.items():
            self.shifts[name] = self.shifts.get(name, torch.zeros_like(delta)) + delta
            self.tensors[name] += delta.to(self.tensors[name].dtype)
        for group, new, _ in found:
            self.dead[group.name] |= new
            self._erase(group, new)
        return bool(found) and self.rounds < ROUNDS

    def _erase(self, group: Group, dead: Tensor) -> None:
        for slot in group.slots:
            tensor = self.tensors[slot.parameter]
            if tensor.is_floating_point() and not slot.parameter.endswith("running_var"):
                index = slot.index()
                going = torch.where(index >= 0, dead[index.clamp_min(0)], False)
                shape = [-1 if dim == slot.dim else 1 for dim in range(tensor.ndim)]
                tensor.masked_fill_(going.view(shape), 0)

    def _dead(self, run: Known, group: Group) -> tuple[Tensor, list[tuple[str, Tensor]]]:
        """Which channels of a group are dead, and what each adds to which tensor: name → (entries, channels)."""
        dead = torch.ones(group.size, dtype=torch.bool)
        folds: list[tuple[str, Tensor]] = []
        for node in self.traced.module.graph.nodes:
            if node.op != "call_function" or not dead.any():
                continue
            read = [
                (source, dim, path)
                for source in node.all_input_nodes
                for dim, path in self._occurs(source, group)
            ]
            if not read:
                continue
            if operator_name(node) in RECURRENT:
                dead &= self._unread_by_cells(run, node, group)
            elif not self._occurs(node, group):
                zero, fold = self._at_exit(run, node, group, read)
                dead &= zero
                folds += fold
        return dead, folds

    def _occurs(self, node: fx.Node, group: Group) -> list[tuple[int, tuple[int, ...]]]:
        """(dimension, path) of each place of the group in the axes of a result."""
        found: Any = self.channels.axes.get(node)
        if not found:
            return []
        lists = found if isinstance(found, tuple) else [found]
        return [
            (dim, path)
            for axes in lists
            for dim, axis in enumerate(axes)
            if group.atom in atoms(axis)
            for atom, path in places(axis)
            if atom is group.atom
        ]

    def _at_exit(
        self,
        run: Known,
        node: fx.Node,
        group: Group,
        read: list[tuple[fx.Node, int, tuple[int, ...]]],
    ) -> tuple[Tensor, list[tuple[str, Tensor]]]:
        """At an operator that sums over the channels: those whose terms are zero, or constants that a bias takes up."""
        nothing = torch.zeros(group.size, dtype=torch.bool)
        name = operator_name(node)
        zeros = []
        for source in dict.fromkeys(source for source, _, _ in read):
            own = torch.ones(group.size, dtype=torch.bool)
            for dim, path in [(d, p) for s, d, p in read if s is source]:
                own &= self._zero(run, source, dim, path, group)
            zeros.append(own)
        if name in ("slice", "narrow"):  # it takes another part of a concatenation
            return torch.ones(group.size, dtype=torch.bool), []
        if name == "sum":
            return zeros[0], []
        if name == "scaled_dot_product_attention":
            query_key = [z for z, s in zip(zeros, dict.fromkeys(s for s, _, _ in read), strict=True)
                         if s in node.args[:2]]  # fmt: skip
            same = len(query_key) == len(zeros)
            return (torch.stack(query_key).any(0), []) if same and query_key else (nothing, [])
        if name not in PRODUCTS:
            return nothing, []
        zero = torch.stack(zeros).any(0)
        fold = self._fold(run, node, group) if not zero.all() else None
        if fold is None:
            return zero, []
        target, constant, per_channel = fold
        per_channel = torch.where(zero, 0.0, per_channel)
        return zero | constant, [(target, per_channel)]

    def _zero(
        self, run: Known, node: fx.Node, dim: int, path: tuple[int, ...], group: Group
    ) -> Tensor:
        """(channels,) whether a result is zero wherever it belongs to the channel."""
        zeros = run.zeros(node)
        axes: Any = self.channels.axes[node]
        if zeros is None:
            return torch.zeros(group.size, dtype=torch.bool)
        along = zeros.movedim(dim, 0).flatten(1).all(1) if zeros.ndim > 1 else zeros
        return _of_channels(along, channel_of(axes[dim], path), group.size)

    def _fold(self, run: Known, node: fx.Node, group: Group) -> tuple[str, Tensor, Tensor] | None:
        """Where a reader's constants go, which channels are constants, and what each adds: (entries, channels)."""
        name, source, reader = operator_name(node), node.args[0], node.args[1]
        if name not in (*FLAT, *CONVOLUTION[:3]) or not isinstance(source, fx.Node):
            return None
        if not isinstance(reader, fx.Node) or bool(run.open[reader].any()) or _padded(node):
            return None
        value, weight = run.values[source], run.values[reader]
        if name != "linear" and name in FLAT:
            weight = weight.mT
        if name in FLAT and weight.ndim != 2:
            return None
        dim = value.ndim - weight.ndim + 1
        target, scale = self._takes_up(run, node, dim)
        spots = [path for d, path in self._occurs(source, group) if d == dim]
        if target is None or len(spots) != 1 or len(self._occurs(source, group)) != 1:
            return None
        axes: Any = self.channels.axes[source]
        index = channel_of(axes[dim], spots[0])
        if len(index) != value.shape[dim] or weight.shape[1] != len(index):  # grouped convolutions
            return None
        rows = value.movedim(dim, 0).flatten(1)
        fixed = ~run.open[source].movedim(dim, 0).flatten(1).any(1) & (rows == rows[:, :1]).all(1)
        constant = _of_channels(fixed, index, group.size)
        terms = weight.double().flatten(2).sum(2) if weight.ndim > 2 else weight.double()
        terms = terms * torch.where(fixed, rows[:, 0].double(), 0.0)
        inside = index >= 0
        per_channel = torch.zeros(len(terms), group.size, dtype=torch.float64)
        per_channel.index_add_(1, index[inside], terms[:, inside])
        if len(scale) not in (1, len(per_channel)):
            return None
        inverse = torch.where(scale == 0, 0.0, 1 / scale)  # a masked row adds nothing
        return target, constant, inverse[:, None] * per_channel

    def _takes_up(self, run: Known, node: fx.Node, dim: int) -> tuple[str | None, Tensor]:
        """The bias of a reader, or the running mean of the batch norm behind it, if nothing else reads that; and what it is times.

        Args:
            run: with the values of what does not depend on the input.
            node: the reader.
            dim: the dimension of its result's channels.
        """
        scale, nothing = torch.ones(1, dtype=torch.float64), (None, torch.ones(1))
        flat = operator_name(node) in FLAT and operator_name(node) != "linear"
        bias: Any = None if flat else argument(node, 2, "bias")
        before = node
        while bias is None:  # the operators behind it, where the result goes nowhere else
            follower = next(iter(before.users))
            name = operator_name(follower)
            if len(before.users) != 1 or follower.op != "call_function":
                return nothing
            if name == "batch_norm" and follower.args[0] is before and dim == 1:
                bias, scale = follower.args[3], -scale
            elif name == "add" and not follower.kwargs and len(follower.args) == 2:
                bias = follower.args[1] if follower.args[0] is before else follower.args[0]
                shape = getattr(run.values.get(bias), "shape", ())
                aligned = dim - follower.meta["val"].ndim + len(shape)
                if aligned < 0 or any(n > 1 for d, n in enumerate(shape) if d != aligned):
                    return nothing
            elif name == "permute":
                order: Any = follower.args[1]
                dim = [d % len(order) for d in order].index(dim)
            elif name not in ("contiguous", "clone"):
                return nothing
            before = follower
        while isinstance(bias, fx.Node) and bias.op == "call_function":
            name = operator_name(bias)
            if name == "mul" and all(isinstance(factor, fx.Node) for factor in bias.args):
                factor: Any
                bias, factor = bias.args  # the mask of another tool
                if bool(run.open[factor].any()) or run.values[factor].ndim != 1:
                    return nothing
                scale = scale * run.values[factor].double()
            elif name in ("view", "reshape", "unsqueeze", "contiguous", "clone"):
                bias = bias.args[0]
            else:
                return nothing
        if not isinstance(bias, fx.Node) or bias.op != "get_attr":
            return nothing
        name = str(bias.target)
        tensor = self.tensors[name]
        readers = [
            user
            for other in self.traced.module.graph.find_nodes(op="get_attr")
            if self.tensors.get(str(other.target)) is tensor
            for user in other.users
        ]
        return (name, scale) if len(readers) == 1 and tensor.ndim == 1 else nothing

    def _unread_by_cells(self, run: Known, node: fx.Node, group: Group) -> Tensor:
        """Recurrent layers read units inside: each place must be zero, or its weights must be."""
        dead = torch.ones(group.size, dtype=torch.bool)
        parameters: Any = node.args[2]
        units = run.units.get(node)
        per_layer = 2 if bool(node.args[7]) else 1
        if units is None:
            return torch.zeros(group.size, dtype=torch.bool)
        each = len(parameters) // len(units)  # two weights, and their biases
        zeros = run.zeros(node.args[0])  # type: ignore[arg-type]
        assert zeros is not None
        first = zeros.flatten(0, -2).all(0)
        for number in range(len(units)):
            layer = number // per_layer
            below = units[(layer - 1) * per_layer : layer * per_layer] if layer else [first]
            for source, zero in zip(
                parameters[each * number : each * number + 2],
                (torch.cat(below), units[number]),
                strict=True,
            ):
                for dim, path in self._occurs(source, group):
                    if dim == 1:
                        columns = (self.tensors[str(source.target)] == 0).all(0)
                        axes: Any = self.channels.axes[source]
                        index = channel_of(axes[1], path)
                        dead &= _of_channels(zero | columns, index, group.size)
        return dead


def _of_channels(along: Tensor, index: Tensor, size: int) -> Tensor:
    """(size,) whether all positions that belong to a channel are True; none where lengths say that an axis was free."""
    if len(along) != len(index):
        return torch.zeros(size, dtype=torch.bool)
    inside = index >= 0
    wrong = torch.zeros(size, dtype=torch.int64)
    wrong.index_add_(0, index[inside], (~along[inside]).long())
    return wrong == 0


def _padded(node: fx.Node) -> bool:
    padding = argument(node, 4, "padding", 0)
    if operator_name(node) == "linear":
        return False
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)
