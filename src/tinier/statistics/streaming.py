"""One streaming pass over data for criteria: moments, Gram matrices, gradients."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from tinier.errors import DataError, InputError
from tinier.graph.axes import Atom, Axis, Product, atoms, shallow
from tinier.graph.groups import Channels, channel_groups, named_tensors
from tinier.graph.rules.base import hint
from tinier.network import Network
from tinier.statistics.base import NEEDS, Gates, Gram, Moments, Statistics, Use
from tinier.statistics.chunks import CHUNK, Batch, chunk_size, chunks
from tinier.statistics.finite import NotFinite, culprit
from tinier.statistics.histograms import Histograms
from tinier.statistics.losses import Loss, summed_loss
from tinier.statistics.places import Place, group_uses, layer_rows, reading_places
from tinier.statistics.sensitivity import Sensitivities

PINNED = 16  # part of the most that a Gram matrix may take, for layers of whose inputs no channel can be cut
_EVERY = 8  # examples, of which at least one is looked at where each has many positions
LOSSES = frozenset({"gradients", "gates", "squares"})


def observe(
    network: Network,
    batches: Iterable[Batch],
    needs: Collection[str],
    *,
    loss: Loss | None = None,
    seed: int = 0,
    most_gram: int = 2**30,
    channels: Channels | None = None,
    rows: int | None = None,
) -> Statistics:
    """Run a network over data once and keep what criteria ask for.

    Args:
        network: left as it is; it runs in evaluation mode.
        batches: input name → tensor, dimension 0 the batch; or pairs of these and labels (or None), as ``Examples.batches`` gives.
        needs: keys of ``NEEDS``: "activations", "entropy", "gram", "gradients", "gates", "squares", "sensitivity".
        loss: for the last three: (outputs, labels) → scalar, a mean over the batch, or one value for each example. None for cross-entropy
            with class numbers (a mean over positions), binary cross-entropy with 0 and 1 for one logit, half the squared error with values.
            Without labels, answers are drawn from the network's own distribution, a softmax over the axis of classes of its first output or
            else a normal one around it: this gives the true Fisher information, and gradients whose expectation is 0.
        seed: of the answers that are drawn.
        most_gram: bytes that one Gram matrix may take.
        channels: the network's axes, if they are known.
        rows: of each example that the Gram matrix of a convolution needs on average; where one has more positions, every second to eighth
            example is taken, whole. None for all examples.

    Returns:
        Statistics that do not depend on how the examples were batched.

    Raises:
        DataError: no examples; an input is missing; labels that fit no output; NaN or infinity, with the operator.
        InputError: an unknown need; a Gram matrix above ``most_gram``, with its layer.

    Cost:
        One run of the network; with a loss one run backward; with "squares" one run forward and backward for each example alone.
        Memory is flat in the number of examples: Gram matrices of 8 · (inputs · kernel)² bytes, gradients of 8 bytes for each
        parameter, histograms of 2 kB for each channel, and a run of at most 32 examples.
    """
    asked = frozenset(needs)
    if unknown := asked - NEEDS.keys():
        raise InputError(
            f"needs: {', '.join(sorted(unknown))}: unknown; there are {', '.join(NEEDS)}"
        )
    channels = channels or channel_groups(network.traced)
    recorder = _Recorder(network, channels, asked, most_gram, rows)
    generator = torch.Generator().manual_seed(seed)
    examples, given = 0, False
    weighted = Sensitivities(network.traced) if "sensitivity" in asked else None
    for inputs, labels in chunks(network, batches, recorder.chunk):
        recorder.take(inputs, labels, loss, generator)
        if weighted is not None:
            weighted.add(inputs, generator)
        examples += len(next(iter(inputs.values())))
        given = labels is not None
    if not examples:
        raise DataError(
            f"{network.name}: no examples to collect statistics of; one or more are needed"
        )
    result = recorder.statistics(examples, given or loss is not None)
    return result if weighted is None else replace(result, sensitivities=weighted.sums)


class _Recorder(fx.Interpreter):
    """Runs a graph and adds up what is asked for at the places where operators read channel groups."""

    def __init__(
        self,
        network: Network,
        channels: Channels,
        needs: frozenset[str],
        most_gram: int,
        rows: int | None,
    ) -> None:
        module = network.traced.module
        super().__init__(module, garbage_collect_values=True)
        self.traced, self.needs, self.rows = network.traced, needs, rows
        self.examples = 0  # before the chunk that runs
        self.tensors = named_tensors(module)
        found = reading_places(network.traced, channels)
        self.uses = group_uses(channels, channels.groups, found)
        self.sizes = {group.name: group.size for group in channels.groups}
        self.places: dict[fx.Node, list[Place]] = {}
        for place in found:
            self.places.setdefault(place.node, []).append(place)
        self.batch_dims = {
            place.read: _batch_dim(network, channels, place)
            for place in found
            if needs & {"gates", "entropy"}
        }
        self.chunk = chunk_size(network, CHUNK)
        if "squares" in needs or None in self.batch_dims.values():
            self.chunk = 1
        self.whole = (
            not network.traced.batched
        )  # the batch size is fixed: its examples stay together
        if self.whole and len(next(iter(network.example.values()))) > 1 and self.chunk == 1:
            raise InputError(
                f"{network.name}: its batch size is fixed, and the gradients of single examples are needed: "
                "trace it with an example of batch size 1, or use a criterion that needs no gradients"
            )
        self.moments: dict[str, Moments] = {}
        self.histograms: dict[str, Histograms] = {}
        self.grams: dict[str, Gram] = {}
        self.shared: dict[tuple[Any, ...], str] = {}  # layers that read the same in the same way
        if "gram" in needs:
            self._make_grams(most_gram)
        self.gates = {
            name: Gates.empty(size)
            for name, size in self.sizes.items()
            if "gates" in needs and self.uses[name]
        }
        self.gradients: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}
        self.seen: set[str] = set()
        self.taps: list[tuple[Place, Tensor]] = []

    def take(
        self,
        inputs: Mapping[str, Tensor],
        labels: Tensor | None,
        loss: Loss | None,
        generator: torch.Generator,
    ) -> None:
        """Add one chunk."""
        self.seen, self.taps = set(), []
        ordered = [inputs[name] for name in self.traced.inputs]
        self.leaves = {}
        try:
            if not self.needs & LOSSES:
                with torch.no_grad():
                    self.run(*ordered)
            else:
                with torch.enable_grad():
                    self._make_leaves()
                    outputs = tuple(self.run(*ordered))
                    total = summed_loss(outputs, labels, len(ordered[0]), loss, generator)
                    if not bool(total.isfinite()):
                        raise NotFinite("the loss")
                    self._differentiate(total, len(ordered[0]))
        except NotFinite as found:
            raise DataError(culprit(self.traced.module, ordered, str(found))) from None
        finally:
            self.leaves, self.taps = {}, []
        self.examples += len(ordered[0])

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            leaf = self.leaves.get(str(node.target))
            return super().run_node(node) if leaf is None else leaf
        replaced: dict[fx.Node, Tensor] = {}
        for place in self.places.get(node, ()):
            value = self.env[place.source]
            self._read(place, value.detach())
            if "gates" in self.needs:
                # The operator reads a tensor of its own, whose gradient comes through this operator alone.
                tap = replaced.get(place.source)
                if tap is None:
                    tap = value.view_as(value) if value.requires_grad else value.detach().clone()
                    tap.requires_grad_()
                    replaced[place.source] = tap
                self.taps.append((place, tap))
        if not replaced:
            return super().run_node(node)
        kept = {source: self.env[source] for source in replaced}
        self.env.update(replaced)
        result = super().run_node(node)
        self.env.update(kept)
        return result

    def statistics(self, examples: int, given: bool) -> Statistics:
        """What was found."""
        grams = {
            place.node.name: self.grams[self.shared[key]]
            for places in self.places.values()
            for place in places
            if (key := _gram_key(place)) in self.shared
        }
        names = {
            id(tensor): name for name, tensor in self.tensors.items() if name in self.gradients
        }
        for name, tensor in self.tensors.items():  # tied parameters under every name
            first = names.get(id(tensor))
            if first is not None and first != name:
                self.gradients[name] = self.gradients[first]
                if first in self.squares:
                    self.squares[name] = self.squares[first]
        different = self.needs & LOSSES
        return Statistics(
            {},
            examples,
            self.needs,
            self.uses,
            self.moments,
            self.histograms,
            grams,
            {
                name: Gates(g.total / examples, g.absolute / examples, g.squares / examples)
                for name, g in self.gates.items()
            },
            {name: value / examples for name, value in self.gradients.items()},
            {name: value / examples for name, value in self.squares.items()},
            ("given" if given else "sampled") if different else "",
        )

    def _read(self, place: Place, value: Tensor) -> None:
        if "gram" in self.needs and (key := _gram_key(place)) in self.shared:
            self._add_gram(place, value, key)
        if place.read in self.seen or not self.needs & {"activations", "entropy"}:
            return
        self.seen.add(place.read)
        length = value.shape[place.dim]
        if "activations" in self.needs:
            moments = self.moments.setdefault(place.read, Moments.empty(length))
            moments.add(value.movedim(place.dim, -1).reshape(-1, length))
            if not bool(moments.squares.isfinite().all()):
                raise NotFinite(place.source.name)
        if "entropy" in self.needs:
            means = self._examples(place, value.float()).mean(1)
            if not bool(means.isfinite().all()):
                raise NotFinite(place.source.name)
            self.histograms.setdefault(place.read, Histograms(length)).add(means)

    def _examples(self, place: Place, value: Tensor) -> Tensor:
        """(examples, positions, length) of what was read."""
        length = value.shape[place.dim]
        batch = None if self.chunk == 1 else self.batch_dims[place.read]
        if batch is None:
            return value.movedim(place.dim, -1).reshape(1, -1, length)
        ordered = value.movedim((batch, place.dim), (0, -1))
        return ordered.reshape(self.size, -1, length)

    @property
    def size(self) -> int:
        """Number of examples of the chunk that runs."""
        return self._size

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self._size = len(args[0])
        return super().run(*args, **kwargs)

    def _make_grams(self, most: int) -> None:
        wanted = {use.node for uses in self.uses.values() for use in uses if use.layer}
        for node, places in self.places.items():
            for place in places:
                if place.layer is None:
                    continue
                matrix = place.layer.matrix(self.tensors[place.layer.weight].detach())
                groups, _, columns = matrix.shape
                # Inputs that no channel leaves, as those of the network, matter to the rounding of weights alone.
                if node.name not in wanted and groups * columns**2 * 8 > most // PINNED:
                    continue
                if groups * columns**2 * 8 > most:
                    size = groups * columns**2 * 8
                    raise InputError(
                        f"{place.layer.weight}: its Gram matrix of {groups} × {columns} × {columns} takes {size / 2**20:.1f} MB, "
                        f"at most {most / 2**20:.1f} MB are allowed; raise most_gram, or use a criterion that needs none"
                    )
                key = _gram_key(place)
                if key not in self.shared:
                    self.shared[key] = node.name
                    self.grams[node.name] = Gram.empty(groups, columns)

    def _add_gram(self, place: Place, value: Tensor, key: tuple[Any, ...]) -> None:
        if self.shared[key] != place.node.name or place.layer is None:
            return
        layer, gram = place.layer, self.grams[place.node.name]
        weight = self.tensors[layer.weight].detach()
        if self.rows is not None and layer.kind in ("convolution", "transposed"):
            positions = (
                layer.node.meta["val"].shape[2:] if layer.kind == "convolution" else value.shape[2:]
            )
            every = min(max(prod(hint(n) for n in positions) // self.rows, 1), _EVERY)
            value = value[-self.examples % every :: every]
            if not len(value):
                return
        for rows in layer_rows(layer, value, weight):
            gram.add(rows)
        if not bool(gram.total.isfinite().all()):
            raise NotFinite(place.source.name)

    def _make_leaves(self) -> None:
        own: dict[int, Tensor] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):  # type: ignore[union-attr]
            leaf = own.setdefault(id(parameter), parameter.detach())
            # Parameters take part whether or not the user froze them; the user's own tensors stay as they are.
            if leaf.is_floating_point() and self.needs & {"gradients", "squares"}:
                leaf.requires_grad_()
            self.leaves[name] = leaf

    def _differentiate(self, total: Tensor, examples: int) -> None:
        parameters: dict[int, tuple[str, Tensor]] = {}
        for name, leaf in self.leaves.items():
            if leaf.requires_grad:
                parameters.setdefault(id(leaf), (name, leaf))
        taps = {id(tap): tap for _, tap in self.taps}
        wanted = [leaf for _, leaf in parameters.values()] + list(taps.values())
        if not wanted or not total.requires_grad:
            return
        found = torch.autograd.grad(total, wanted, allow_unused=True)
        for (name, leaf), gradient in zip(parameters.values(), found, strict=False):
            self._add_gradient(name, leaf, gradient)
        if "gates" in self.needs:
            of_taps = dict(zip(taps, found[len(parameters) :], strict=True))
            self._add_gates(of_taps, examples)

    def _add_gradient(self, name: str, leaf: Tensor, gradient: Tensor | None) -> None:
        if name not in self.gradients:
            self.gradients[name] = torch.zeros(leaf.shape, dtype=torch.float64)
            if "squares" in self.needs:
                self.squares[name] = torch.zeros(leaf.shape, dtype=torch.float64)
        if gradient is None:
            return
        if not bool(gradient.isfinite().all()):
            raise NotFinite(f"the gradient of {name}")
        self.gradients[name] += gradient.cpu()
        if "squares" in self.needs:
            self.squares[name] += gradient.double().cpu().square()

    def _add_gates(self, gradients: Mapping[int, Tensor | None], examples: int) -> None:
        z = {
            name: torch.zeros(examples, self.sizes[name], dtype=torch.float64)
            for name in self.gates
        }
        uses: dict[tuple[str, str], list[tuple[str, Use]]] = {}
        for name in self.gates:
            for use in self.uses[name]:
                uses.setdefault((use.node, use.read), []).append((name, use))
        for place, tap in self.taps:
            gradient = gradients[id(tap)]
            if gradient is None:
                continue
            both = self._examples(place, tap.detach().double() * gradient.double()).sum(1).cpu()
            if not bool(both.isfinite().all()):
                raise NotFinite(f"the gradient of {place.source.name}")
            for name, use in uses.get((place.node.name, place.read), ()):
                inside = use.index >= 0
                z[name].index_add_(1, use.index[inside], both[:, inside])
        for name, values in z.items():
            self.gates[name].add(values)


def _gram_key(place: Place) -> tuple[Any, ...]:
    layer = place.layer
    if layer is None:
        return ()
    weight = layer.node.args[1] if layer.kind != "matmul" else None
    kernel = tuple(weight.meta["val"].shape[2:]) if isinstance(weight, fx.Node) else ()
    how = (layer.groups, layer.stride, layer.padding, layer.dilation, layer.after)
    return (place.source.name, layer.kind, kernel, *how)


def _batch_dim(network: Network, channels: Channels, place: Place) -> int | None:
    """The dimension of what is read that starts with the batch; None where it is not seen."""
    batches: set[Atom] = set()
    for node in network.traced.module.graph.find_nodes(op="placeholder"):
        axes = channels.axes.get(node)
        if isinstance(axes, list) and axes:
            batches.update(atoms(axes[0]))
    axes = channels.axes[place.source]
    for dim, axis in enumerate(axes if isinstance(axes, list) else ()):
        first: Axis = shallow(axis)
        while isinstance(first, Product) and first.factors:
            first = shallow(first.factors[0])
        if dim != place.dim and isinstance(first, Atom) and first in batches:
            return dim
    return None
