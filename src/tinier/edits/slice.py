"""Slice: channels leave for good, from every parameter that has them, and the result is proved."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import has_side_effect

from tinier.edits.base import Edit, Plan
from tinier.edits.proof import (
    NOT_PROVED,
    ROUNDING,
    TOLERANCE,
    Reference,
    difference,
    left,
    on_meta,
    random_inputs,
    traced_right,
)
from tinier.edits.rewrite import Kept, kept_along, sliced_graph
from tinier.edits.stock import stock_modules
from tinier.errors import InputError, ModelError, RefusedError
from tinier.graph.axes import Atom
from tinier.graph.groups import Channels, Group, channel_groups
from tinier.graph.same import same_graph
from tinier.graph.states import repeatable
from tinier.graph.trace import Traced, is_free, isolated, leaves
from tinier.modules.masked import hold, masks_of
from tinier.modules.piece import replaced
from tinier.network import Network

# Of the class to the graph: the same operators on the same weights, so a wrong size shows.
SAME = 1e-6


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
            cuts.append((parameter, dim, tuple(left(axis, atom).tolist())))
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
            Two traces, one copy of what is kept, one run of the original at batch 3 and one of the smaller network; some more runs where
            the class does not trace to the cut graph. Networks in half precision are also copied whole to float32, and proved in it.
        """
        slices = [edit for edit in edits if isinstance(edit, Slice)]
        traced = network.traced
        channels = channel_groups(traced)
        kept = _kept_atoms(slices, channels)
        if not kept:
            return network.copy()
        made: dict[str, Tensor] = {}  # cut once, for the graph and for the class
        graph = sliced_graph(traced, channels, kept, made)
        reference = Reference(network, channels, kept, seed=0)
        notes: tuple[str, ...] = ()
        pruned, gap = None, None
        try:
            pruned, gap = _stock(reference, graph, made)
        except ModelError as error:  # a class that is built anew from its config says why it cannot
            notes = (f"what is left is the traced graph: {error}",)
        if on_meta(network):
            notes = (NOT_PROVED, *notes)
        else:
            gap = reference.prove(graph, graph) if gap is None else gap
            found = f"equals its masked reference to {gap:.0e} of its largest output, as it was cut"
            notes = (found, *notes)
        if pruned is None:
            # Nothing compares this graph with the user's class any more: the one that it was cut from has to be the class.
            if not on_meta(network) and not traced_right(network):
                if not traced.by_export:
                    return cls.apply_all(edits, network.exported())
                raise RefusedError(
                    f"{network.name}: its traced graph computes something else than its class on random inputs, and its class cannot "
                    "take the smaller weights; exclude the layers that it treats in a way of its own"
                )
            module = named(graph, traced)
            try:
                hold(module, _cut_masks(network, channels, kept))
            except ValueError as error:
                raise RefusedError(f"{network.name}: a mask is lost, {error}; unmask it") from error
            pruned = Network(module, network.example, network.name, network.folder)
        pruned = pruned.noted(*notes, *replaced(pruned.module))
        modes = {path: part.training for path, part in network.module.named_modules()}
        for path, part in pruned.module.named_modules():
            part.training = modes.get(path, network.module.training)
        return pruned


def kept(plan: Plan) -> dict[str, dict[int, tuple[int, ...]]]:
    """What a plan keeps: parameter name → dimension → positions that stay, over all groups that meet there."""
    result: dict[str, dict[int, tuple[int, ...]]] = {}
    for edit in plan.edits:
        for parameter, dim, stays in edit.cuts if isinstance(edit, Slice) else ():
            dims = result.setdefault(parameter, {})
            both = set(stays) & set(dims.get(dim, stays))
            dims[dim] = tuple(index for index in stays if index in both)
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
    return Reference(original, channels, atoms_kept, seed).prove(pruned, graph)


def _cut_masks(network: Network, channels: Channels, kept: Kept) -> dict[str, Tensor]:
    """What is left of the masks that hold weights of the network at zero."""
    along, result = kept_along(channels, kept), {}
    for name, mask in masks_of(network.module).items():
        for dim, indices in along.get(name, {}).items():
            mask = mask.index_select(dim, indices)
        result[name] = mask
    return result


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


def _stock(
    reference: Reference, graph: fx.GraphModule, made: dict[str, Tensor]
) -> tuple[Network | None, float | None]:
    """The user's class with smaller parameters if it computes what the graph does, as it stands and traced.

    Returns:
        The network, or None; and its difference to the masked reference, where that was the comparison.
    """
    network, channels, kept = reference.original, reference.channels, reference.kept
    if isinstance(network.module, fx.GraphModule):
        return None, None
    meta = on_meta(network)
    batches = [network.example] if meta else [random_inputs(network, seed=1), network.example]
    wanted: list[tuple[Tensor, ...]] = []
    inputs = None if meta else batches[0]
    for module in stock_modules(
        network.module, channels, kept, network.traced, graph, inputs, made
    ):
        candidate = Network(module, network.example, network.name, network.folder)
        try:
            gap = 0.0 if meta or reference.half else reference.gap(candidate)
            if gap > ROUNDING:
                continue
            # Some classes take another way while they are traced: both ways are compared.
            traced = candidate.traced
            if traced.batched != network.traced.batched:
                continue
            compared = not meta and not reference.half and reference.finite and gap <= TOLERANCE
            if compared and same_graph(traced.module, graph):
                return candidate, gap
            if not wanted:
                with torch.no_grad(), repeatable():
                    wanted = [leaves(isolated(graph, inputs)) for inputs in batches]
            with repeatable():
                found = [] if meta else [candidate(inputs) for inputs in batches]
            if not meta and not _agree(found, wanted):
                continue
            with torch.no_grad(), repeatable():
                found = [leaves(isolated(traced.module, inputs)) for inputs in batches]
        except Exception:  # the user's code: anything may be raised, and the graph stands in
            continue
        if _agree(found, wanted):
            return candidate, None
    return None, None


def _agree(found: list[tuple[Tensor, ...]], wanted: list[tuple[Tensor, ...]]) -> bool:
    return all(
        len(a) == len(b) and difference(a, b) <= SAME for a, b in zip(found, wanted, strict=True)
    )


def named(graph: fx.GraphModule, traced: Traced) -> fx.GraphModule:
    """The graph returning what the user's module did: one tensor, a tuple, or a dict by output name; inputs of other sizes are refused."""
    inputs = graph.graph.find_nodes(op="placeholder")
    with graph.graph.inserting_after(inputs[-1]):
        for node, old in zip(inputs, traced.module.graph.find_nodes(op="placeholder"), strict=True):
            fixed = tuple(None if is_free(size) else int(size) for size in old.meta["val"].shape)
            graph.graph.call_function(check_sizes, (node, fixed, str(node.target)))
    output = next(iter(graph.graph.find_nodes(op="output")))
    values = output.args[0]
    assert isinstance(values, tuple)
    if traced.outputs == ("output",):
        output.args = (values[0],)
    elif not all(name.startswith("output_") for name in traced.outputs):
        output.args = (dict(zip(traced.outputs, values, strict=True)),)
    graph.recompile()
    return graph


@has_side_effect
def check_sizes(tensor: Tensor, sizes: tuple[int | None, ...], name: str) -> None:
    """Refuse an input whose sizes a traced graph was not made for; None is free.

    Raises:
        InputError: the input has other sizes where they are fixed.
    """
    found = tuple(tensor.shape)
    if len(found) != len(sizes) or any(
        size is not None and size != length for size, length in zip(sizes, found, strict=False)
    ):
        wanted = " × ".join("free" if size is None else str(size) for size in sizes)
        raise InputError(
            f"{name}: {' × '.join(map(str, found))} was given, {wanted} is needed: the network is a traced graph, whose other sizes are "
            "those of the example; prune with an example of the sizes that you need"
        )
