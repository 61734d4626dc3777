"""Slice: channels leave for good, from every parameter that has them, and the result is proved."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from tinier.edits.base import Edit, Plan
from tinier.edits.rewrite import Kept, kept_along, sliced_graph
from tinier.edits.stock import stock_modules
from tinier.errors import ModelError, RefusedError
from tinier.graph.axes import Atom, Axis, atoms, positions
from tinier.graph.groups import Channels, Group, channel_groups
from tinier.graph.masked import masked_outputs, masked_values
from tinier.graph.single import HALF, is_half, recast, recast_inputs, recast_traced, single
from tinier.graph.states import repeatable
from tinier.graph.trace import Traced, isolated, leaves
from tinier.modules.masked import hold, masks_of
from tinier.modules.piece import replaced
from tinier.network import Network

TOLERANCE = 1e-5
ROUNDING = 1e-3  # a difference above this is none of rounding
EXACT = 1e-10  # what rounding leaves in float64
# Of the class to the graph: the same operators on the same weights, so a wrong size shows.
SAME = 1e-6
NOT_PROVED = (
    "it is on the meta device, where nothing can be run: the smaller network was not proved equal to the masked reference; "
    "apply the plan to the network with its weights for that"
)


@dataclass(frozen=True)
class Slice(Edit):
    """Keep some channels of a group and cut the others out of every parameter.

    Attributes:
        group: name of the channel group.
        size: number of channels before.
        kept: the channels that stay, ascending.
        cuts: for each place of the group: (parameter, dimension, positions that stay along it if only this group is cut).
            Where several groups meet in one dimension, what stays is the intersection.
    """

    kind: ClassVar[str] = "slice"

    group: str
    size: int
    kept: tuple[int, ...]
    cuts: tuple[tuple[str, int, tuple[int, ...]], ...]

    @staticmethod
    def of(group: Group, kept: Iterable[int]) -> "Slice":
        """The slice that keeps these channels of a group."""
        channels = tuple(sorted(kept))
        atom = {group.atom: torch.tensor(channels, dtype=torch.int64)}
        cuts = []
        for parameter, dim, axis in dict.fromkeys(
            (s.parameter, s.dim, s.axis) for s in group.slots
        ):
            cuts.append((parameter, dim, tuple(_left(axis, atom).tolist())))
        return Slice(group.name, group.size, channels, tuple(cuts))

    def row(self) -> tuple[str, str]:
        """The group, and how many channels it had and keeps."""
        return self.group, f"{self.size} → {len(self.kept)}"

    @classmethod
    def apply_all(cls, edits: list[Edit], network: Network) -> Network:
        """A smaller network, proved equal to the masked reference; the user's class where it can be kept.

        Raises:
            RefusedError: a slice does not fit the network, or the proof fails.

        Cost:
            One trace, two copies of what is kept, and a few runs at batch 2 and 3; networks in half precision are also copied whole to
            float32, in which they are proved.
        """
        slices = [edit for edit in edits if isinstance(edit, Slice)]
        traced = network.traced
        channels = channel_groups(traced)
        kept = _kept_atoms(slices, channels)
        if not kept:
            return network.copy()
        graph = sliced_graph(traced, channels, kept)
        notes: tuple[str, ...] = ()
        if on_meta(network):
            notes = (NOT_PROVED,)
        else:
            gap = _prove(network, graph, graph, channels, kept, seed=0)
            notes = (
                f"equals its masked reference to {gap:.0e} of its largest output, as it was cut",
            )
        try:
            pruned = _stock(network, graph, channels, kept)
        except ModelError as error:  # a class that is built anew from its config says why it cannot
            pruned, notes = None, (*notes, f"what is left is the traced graph: {error}")
        if pruned is None:
            # Nothing compares this graph with the user's class any more: the one that it was cut from has to be the class.
            if not traced.by_export and not on_meta(network) and not _traced_right(network):
                return cls.apply_all(edits, network.exported())
            module = named(graph, traced)
            try:
                hold(module, _cut_masks(network, channels, kept))
            except ValueError as error:
                raise RefusedError(f"{network.name}: a mask is lost, {error}; unmask it") from error
            pruned = Network(module, network.example, network.name, network.folder)
        pruned = pruned.noted(*notes, *replaced(pruned.module))
        pruned.module.train(network.module.training)
        return pruned


def kept(plan: Plan) -> dict[str, dict[int, tuple[int, ...]]]:
    """What a plan keeps: parameter name → dimension → positions that stay, over all groups that meet there."""
    result: dict[str, dict[int, tuple[int, ...]]] = {}
    for edit in plan.edits:
        for parameter, dim, left in edit.cuts if isinstance(edit, Slice) else ():
            dims = result.setdefault(parameter, {})
            both = set(left) & set(dims.get(dim, left))
            dims[dim] = tuple(index for index in left if index in both)
    return result


def prove(original: Network, pruned: Network, plan: Plan, seed: int = 0) -> float:
    """Show that a pruned network equals the masked reference on random inputs.

    Args:
        original: the network before the plan.
        pruned: what applying the plan gave, not trained since.
        plan: its slices are checked; it has no other edits.
        seed: of the random inputs.

    Returns:
        The largest difference, relative to the largest output; at most 1e-5.

    Raises:
        RefusedError: they differ; the message names the first operator that does.

    Cost:
        One run of the original and one of the pruned network at batch 3.
    """
    channels = channel_groups(original.traced)
    slices = [edit for edit in plan.edits if isinstance(edit, Slice)]
    atoms_kept = _kept_atoms(slices, channels)
    graph = sliced_graph(original.traced, channels, atoms_kept)
    return _prove(original, pruned, graph, channels, atoms_kept, seed)


def _traced_right(network: Network) -> bool:
    """Whether the traced graph computes what the module does."""
    inputs = random_inputs(network, seed=2)
    with torch.no_grad(), repeatable():
        wanted = network(inputs)
    with torch.no_grad(), repeatable():
        found = leaves(isolated(network.traced.module, inputs))
    return len(found) == len(wanted) and difference(found, wanted) <= TOLERANCE


def on_meta(network: Network) -> bool:
    """Whether parameters or inputs have no values (torch.device("meta"))."""
    return any(t.is_meta for t in (*network.module.parameters(), *network.example.values()))


def _prove(
    original: Network,
    pruned: Network | fx.GraphModule,
    graph: fx.GraphModule,
    channels: Channels,
    kept: Kept,
    seed: int,
) -> float:
    inputs, traced, run = random_inputs(original, seed), original.traced, pruned
    if is_half(traced.module, inputs):
        traced, channels = recast_traced(traced, channels, HALF, torch.float32)
        run = single(pruned if isinstance(pruned, fx.GraphModule) else pruned.traced.module)
        graph, inputs = single(graph), recast_inputs(inputs, HALF, torch.float32)
    with repeatable():
        wanted = masked_outputs(traced, channels, kept, inputs)
    try:
        with torch.no_grad(), repeatable():
            found = run(inputs) if isinstance(run, Network) else leaves(isolated(run, inputs))
        gap = difference(found, wanted)
    except (RuntimeError, IndexError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RefusedError(f"{original.name}: the pruned network does not run: {first}") from error
    if TOLERANCE < gap <= ROUNDING:
        # Deep networks round that much in float32. What is rounding vanishes in float64, and what is wrong stays.
        single_type, double = (torch.float32,), torch.float64
        module = run.traced.module if isinstance(run, Network) else run
        with torch.no_grad(), repeatable():
            wide = recast_inputs(inputs, single_type, double)
            exact = leaves(isolated(recast(module, single_type, double), wide))
        with repeatable():
            reference = masked_outputs(
                *recast_traced(traced, channels, single_type, double), kept, wide
            )
        if difference(exact, reference) <= EXACT:
            return gap
    if gap > TOLERANCE:
        where = _first_difference(traced, graph, channels, kept, inputs)
        raise RefusedError(
            f"{original.name}: the pruned network differs from the masked reference by {gap:.1e} (relative); {where}"
        )
    return gap


def random_inputs(network: Network, seed: int) -> dict[str, Tensor]:
    """Inputs like the example: normal as it is, or drawn from the integers in which its rows differ; batch 3 where it is free."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in (
        network.batch(3).items() if network.traced.batched else network.example.items()
    ):
        if tensor.is_floating_point():
            deviation = tensor.float().std() if tensor.numel() > 1 else torch.tensor(0.0)
            if not deviation > 0:  # an example of zeros or ones would prove nothing
                deviation = torch.tensor(1.0)
            noise = (
                torch.randn(tensor.shape, generator=generator).to(tensor.device) * deviation
                + tensor.float().mean()
            )
            result[name] = noise.to(tensor)
        elif tensor.dtype == torch.bool or tensor.max() <= 1:  # masks and types
            result[name] = tensor
        else:
            # Where all rows agree, a token may have a meaning of its own, as the placeholders of an image.
            fixed = (tensor == tensor[:1]).all(0, keepdim=True).expand(tensor.shape)
            pool = tensor[~fixed] if not bool(fixed.all()) else tensor.flatten()[:0]
            chosen = torch.randint(max(len(pool), 1), tensor.shape, generator=generator)
            drawn = pool[chosen.to(tensor.device)] if len(pool) else tensor
            result[name] = torch.where(fixed, tensor, drawn)
    return result


def _cut_masks(network: Network, channels: Channels, kept: Kept) -> dict[str, Tensor]:
    """What is left of the masks that hold weights of the network at zero."""
    along, result = kept_along(channels, kept), {}
    for name, mask in masks_of(network.module).items():
        for dim, indices in along.get(name, {}).items():
            mask = mask.index_select(dim, indices)
        result[name] = mask
    return result


def _left(axis: Axis, kept: Kept) -> Tensor:
    return positions(axis, lambda atom: kept[atom] if atom in kept else torch.arange(atom.size))


def _kept_atoms(slices: list[Slice], channels: Channels) -> Kept:
    result: dict[Atom, Tensor] = {}
    for edit in slices:
        group = channels.group(edit.group)
        if group is None or group.size != edit.size:
            has = (
                "has no such channel group" if group is None else f"has {group.size} channels there"
            )
            raise RefusedError(f"slice {edit.group} of {edit.size} channels: the network {has}")
        if len(edit.kept) < group.minimum:
            raise RefusedError(
                f"slice {edit.group}: {len(edit.kept)} of {group.size} are kept, {group.minimum} are needed, because so many are chosen"
            )
        if not edit.kept or edit != Slice.of(group, edit.kept):
            raise RefusedError(f"slice {edit.group}: its cuts are not those of this network")
        if len(edit.kept) < group.size:
            indices = torch.tensor(edit.kept, dtype=torch.int64)
            if group.atom in result:
                indices = indices[torch.isin(indices, result[group.atom])]
            result[group.atom] = indices
    return result


def difference(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The largest difference relative to the largest value; infinity for other shapes or NaN in one alone."""
    largest = 0.0
    for a, b in zip(found, wanted, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.is_meta:
            continue
        if not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        same = a == b
        scale = b.double().nan_to_num(0, 0, 0).abs().max().clamp(min=1e-6) if b.numel() else 1
        gap = torch.where(same | a.isnan(), 0.0, (a.double() - b.double()).abs() / scale)
        largest = max(largest, float(gap.max()) if gap.numel() else 0.0)
    return largest


def _first_difference(
    traced: Traced,
    graph: fx.GraphModule,
    channels: Channels,
    kept: Kept,
    inputs: Mapping[str, Tensor],
) -> str:
    """The first operator whose sliced result is not the kept part of the masked one."""
    interpreter = fx.Interpreter(graph, garbage_collect_values=False)
    interpreter.env = {}
    pairs = zip(graph.graph.nodes, masked_values(traced, channels, kept, inputs), strict=True)
    with torch.no_grad():
        for node, (original, masked) in pairs:
            if node.op == "placeholder":
                interpreter.env[node] = inputs[str(node.target)].clone()
                continue
            if "empty" in str(node.target):  # whatever was in memory, filled later on
                interpreter.env[node] = interpreter.run_node(node)
                continue
            try:
                interpreter.env[node] = found = interpreter.run_node(node)
            except RuntimeError as error:
                return f"first at {original.name} ({original.target}): {error}"
            axes = channels.axes.get(original)
            # Integers may be positions, which are numbered anew.
            if (
                isinstance(masked, Tensor)
                and isinstance(axes, list)
                and (masked.is_floating_point() or masked.is_complex())
            ):
                for dim, axis in enumerate(axes):
                    if any(atom in kept for atom in atoms(axis)):
                        left = _left(axis, kept)
                        if masked.shape[dim] != original.meta["val"].shape[dim]:
                            break
                        masked = masked.index_select(dim, left.to(masked.device))
                else:
                    if difference([found], [masked]) > TOLERANCE:
                        return f"first at {original.name} ({original.target})"
    return "though no operator of the traced graph does: the class computes something else"


def _stock(
    network: Network, graph: fx.GraphModule, channels: Channels, kept: Kept
) -> Network | None:
    """The user's class with smaller parameters if it computes what the graph does, as it stands and traced."""
    if isinstance(network.module, fx.GraphModule):
        return None
    meta = on_meta(network)
    batches = [network.example] if meta else [random_inputs(network, seed=1), network.example]
    with torch.no_grad(), repeatable():
        wanted = [leaves(isolated(graph, inputs)) for inputs in batches]
    inputs = None if meta else batches[0]
    for module in stock_modules(network.module, channels, kept, network.traced, graph, inputs):
        candidate = Network(module, network.example, network.name, network.folder)
        try:
            with repeatable():
                found = [] if meta else [candidate(inputs) for inputs in batches]
            if not meta and not _agree(found, wanted):
                continue
            # Some classes take another way while they are traced.
            traced = candidate.traced
            with torch.no_grad(), repeatable():
                found = [leaves(isolated(traced.module, inputs)) for inputs in batches]
        except Exception:  # the user's code: anything may be raised, and the graph stands in
            continue
        if _agree(found, wanted) and candidate.traced.batched == network.traced.batched:
            return candidate
    return None


def _agree(found: list[tuple[Tensor, ...]], wanted: list[tuple[Tensor, ...]]) -> bool:
    return all(
        len(a) == len(b) and difference(a, b) <= SAME for a, b in zip(found, wanted, strict=True)
    )


def named(graph: fx.GraphModule, traced: Traced) -> fx.GraphModule:
    """The graph returning what the user's module did: one tensor, a tuple, or a dict by output name."""
    output = next(iter(graph.graph.find_nodes(op="output")))
    values = output.args[0]
    assert isinstance(values, tuple)
    if traced.outputs == ("output",):
        output.args = (values[0],)
    elif not all(name.startswith("output_") for name in traced.outputs):
        output.args = (dict(zip(traced.outputs, values, strict=True)),)
    graph.recompile()
    return graph
