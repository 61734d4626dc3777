"""Drop: whole blocks leave, and what went into them comes out in their place."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from tinier.edits.base import Edit
from tinier.edits.config import parts
from tinier.edits.proof import NOT_PROVED, TOLERANCE, difference, on_meta, random_inputs
from tinier.edits.slice import named
from tinier.edits.stock_keras_layers import without_blocks
from tinier.errors import RefusedError
from tinier.graph.blocks import Block, blocks, without
from tinier.graph.groups import channel_groups
from tinier.modules.keras import KerasModule
from tinier.modules.skip import Skip
from tinier.network import Network

DEPTH = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
)  # fmt: skip


@dataclass(frozen=True)
class Drop(Edit):
    """Take a residual block out.

    Attributes:
        block: path of its module.
        parameters: how many numbers leave with it.
    """

    kind: ClassVar[str] = "drop"

    block: str
    parameters: int

    def row(self) -> tuple[str, str]:
        """The block, and what it weighed."""
        return self.block, f"{self.parameters:,} parameters → 0"

    @classmethod
    def apply_all(cls, edits: list[Edit], network: Network) -> Network:
        """A shallower network, proved equal to the original graph that goes around the blocks; the user's class where it can be kept.

        Raises:
            RefusedError: a block is not there, or the proof fails.

        Cost:
            Copies of the network and a few runs.
        """
        drops = [edit for edit in edits if isinstance(edit, Drop)]
        traced = network.traced
        found = {block.path: block for block in blocks(traced, channel_groups(traced))}
        for drop in drops:
            if drop.block not in found:
                raise RefusedError(f"drop {drop.block}: the network has no such residual block")
        dropped = [found[drop.block] for drop in drops]
        for module in _candidates(network.module, [block.path for block in dropped]):
            candidate = Network(module, network.example, network.name, network.folder)
            if on_meta(network):
                return candidate.noted(NOT_PROVED)
            if _equal(network, candidate, dropped):
                return candidate.noted(*network.notes)
        graph = _graph(network, dropped)
        result = Network(graph, network.example, network.name, network.folder)
        if not on_meta(network) and not _equal(network, result, dropped):
            raise RefusedError(
                f"{network.name}: without {', '.join(d.block for d in drops)} it is not the original that goes around them"
            )
        return result.noted(*network.notes)


def _equal(original: Network, candidate: Network, dropped: list[Block]) -> bool:
    """Whether a network is the original that goes around the blocks, as it stands and traced."""
    for inputs in (random_inputs(original, seed=0), dict(original.example)):
        wanted = without(original.traced, dropped, inputs)
        try:
            found = candidate(inputs)
            with torch.no_grad():
                traced = tuple(candidate.traced.module(**inputs))
        except Exception:  # the user's code without one of its parts: anything may be raised
            return False
        if len(found) != len(wanted) or len(traced) != len(wanted):
            return False
        if max(difference(found, wanted), difference(traced, wanted)) > TOLERANCE:
            return False
    return candidate.traced.batched == original.traced.batched


def _candidates(module: nn.Module, paths: list[str]) -> Iterator[nn.Module]:
    """The user's class without the blocks: taken out of their lists, or with something that passes values on in their place."""
    if isinstance(module, fx.GraphModule):
        return
    if isinstance(module, KerasModule):
        keras = without_blocks(module, paths)
        if keras is not None:
            yield keras
        return
    shorter = _shorter(module, paths)
    if shorter is not None:
        yield shorter
    for wrapped in (False, True):
        skipped = copy.deepcopy(module)
        for path in paths:
            parent, _, leaf = path.rpartition(".")
            setattr(skipped.get_submodule(parent), leaf, Skip(wrapped))
        skipped.train(module.training)
        yield skipped


def _shorter(module: nn.Module, paths: list[str]) -> nn.Module | None:
    """With shorter lists of layers and a config that says so; None where a block is in no list."""
    result = copy.deepcopy(module)
    places: dict[str, list[int]] = {}
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        if not isinstance(result.get_submodule(parent), nn.ModuleList | nn.Sequential):
            return None
        places.setdefault(parent, []).append(int(leaf) if leaf.isdigit() else -1)
    for parent, indices in places.items():
        layers: Any = result.get_submodule(parent)
        if min(indices) < 0:
            return None
        before = len(layers)
        for index in sorted(indices, reverse=True):
            del layers[index]
        for number, layer in enumerate(layers):
            for part in layer.modules():
                if type(getattr(part, "layer_idx", None)) is int:
                    part.layer_idx = number
        config = getattr(result, "config", None)
        if hasattr(config, "to_dict"):
            _shorten(config, before, set(indices))
    return result


def _shorten(config: Any, before: int, gone: set[int]) -> None:
    """A config with as many layers as are left, and its lists of one entry for each layer without the others."""
    for part in parts(config):
        for name, value in list(vars(part).items()):
            if isinstance(value, list) and len(value) == before:
                setattr(part, name, [item for i, item in enumerate(value) if i not in gone])
        for name in DEPTH:
            if getattr(part, name, None) == before:
                setattr(part, name, before - len(gone))


def _graph(network: Network, dropped: list[Block]) -> fx.GraphModule:
    """The traced graph without the blocks and their parameters."""
    traced = network.traced
    module = copy.deepcopy(traced.module)
    nodes = dict(zip(traced.module.graph.nodes, module.graph.nodes, strict=True))
    for block in dropped:
        nodes[block.exit].replace_all_uses_with(nodes[block.entry])
    # Dropout counts as impure by default, and would keep what feeds it.
    module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    used = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    for name in [*dict(module.named_parameters()), *dict(module.named_buffers())]:
        if name not in used:
            parent, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(parent), leaf)
    module.graph.lint()
    module.recompile()
    result = named(module, traced)
    result.train(network.module.training)
    return result
