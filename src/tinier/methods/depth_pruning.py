"""Depth pruning: the residual blocks that change the output least leave whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tinier.edits.base import Plan
from tinier.edits.drop import Drop
from tinier.errors import InputError, RefusedError
from tinier.graph.blocks import Block, blocks, without
from tinier.graph.groups import channel_groups
from tinier.methods.base import Method, covers, must_exist
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.units import is_number, is_whole


@dataclass(frozen=True)
class DepthPruning(Method):
    """Drop blocks one by one, each time the one without which the output changes least for the MACs that it costs.

    The change is ‖f(x) − f₋ᵦ(x)‖² / ‖f(x) − mean f‖², f₋ᵦ being the network that goes around block b and those dropped before. Blocks
    inside of each other are weighed against each other: a part of a layer may leave alone.

    Attributes:
        keep: the share of the MACs of all blocks that may be left, in [0, 1]; what is not in a block stays.
        count: how many blocks leave instead.
        whole: whether only the outermost blocks leave, so that the layers that stay are whole.
        exclude: patterns of names of modules, groups or parameters that stay, and with them the blocks that they are in.

    Source:
        Men et al. 2024, "ShortGPT: Layers in large language models are more redundant than you expect", for dropping by influence.

    Differs:
        The change of the output is measured and blocks are chosen greedily; the paper compares a block's input with its output.
    """

    name: ClassVar[str] = "depth_pruning"

    keep: float = 0.75
    count: int | None = None
    whole: bool = True
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not is_number(self.keep) or not 0 <= self.keep <= 1:
            raise InputError(f"keep={self.keep!r}: a share of the blocks in [0, 1] is needed")
        if self.count is not None and (not is_whole(self.count) or self.count < 0):
            raise InputError(f"count={self.count!r}: a whole number of blocks is needed")

    def plan(self, network: Network, statistics: Statistics | None = None) -> Plan:
        """One drop for each block that leaves.

        Args:
            network: left as it is.
            statistics: its ``samples`` are what the change is measured on; the network's example if there are none.

        Raises:
            RefusedError: there is no residual block, or fewer than asked for.

        Cost:
            For each dropped block a run of the network on the samples for each block that is left.
        """
        traced = network.traced
        channels = channel_groups(traced)
        named = [*(group.name for group in channels.groups), *channels.parameters]
        must_exist(self.exclude, network, named)
        every = self._candidates(blocks(traced, channels))
        if not every and (self.count or self.keep < 1):
            raise RefusedError(
                f"{network.name}: no block can be dropped: no submodule has a path around its weights inside, and the shape of its input; "
                "write each residual block, its sum included, as a module of its own (with Keras a layer or a nested model)"
            )
        found = self._free(every, [*named, *(name for name, _ in network.module.named_modules())])
        if self.count is not None and self.count > len(found):
            less = f" that exclude={list(self.exclude)} leaves" if self.exclude else ""
            raise RefusedError(
                f"{network.name}: {self.count} blocks were to be dropped, there are {len(found)}{less}: {', '.join(b.path for b in found)}"
            )
        samples = statistics.samples if statistics and statistics.samples else (network.example,)
        whole = sum(block.macs for block in every)
        dropped: list[Block] = []
        while not self._enough(dropped, whole):
            rest = [b for b in found if not any(_overlap(b, d) for d in dropped)]
            if self.count is None:
                # The last one may cost no more than what is still to go, or half of it would be cut for nothing.
                over = (1 - self.keep) * whole - sum(block.macs for block in dropped)
                rest = [block for block in rest if block.macs <= over * 1.0001]
            if not rest:
                break
            changes = output_changes(network, dropped, rest, samples)
            dropped.append(min(rest, key=lambda b: changes[b.path] / max(b.macs, 1.0)))
        if not found and not self._enough(dropped, whole):
            raise RefusedError(
                f"{network.name}: exclude={list(self.exclude)} leaves no block to drop"
            )
        if not dropped and not self._enough(dropped, whole):
            least = min(block.macs for block in found) / whole
            raise RefusedError(
                f"{network.name}: keep={self.keep:g} leaves less than one block to drop; the smallest has {least:.0%} of the blocks' MACs"
            )
        order = {block.path: place for place, block in enumerate(found)}
        dropped.sort(key=lambda block: order[block.path])
        return Plan(tuple(Drop(block.path, round(block.parameters)) for block in dropped))

    def _candidates(self, found: Sequence[Block]) -> list[Block]:
        if not self.whole:
            return list(found)
        # A stack of layers has a path around it, too, but it is its layers that are meant.
        stacks = [block for block in found if _is_stack(block, found)]
        rest = [block for block in found if block not in stacks]
        return [block for block in rest if not any(block.nodes < other.nodes for other in rest)]

    def _free(self, found: Sequence[Block], names: Sequence[str]) -> list[Block]:
        """The blocks that hold nothing that is to stay, and are not inside of it."""
        stay = {name.partition(":")[0] for name in names if covers(self.exclude, name)}
        return [
            block
            for block in found
            if not covers(self.exclude, block.path)
            and not any(f"{name}.".startswith(f"{block.path}.") for name in stay)
        ]

    def _enough(self, dropped: Sequence[Block], whole: float) -> bool:
        if self.count is not None:
            return len(dropped) >= self.count
        return sum(block.macs for block in dropped) >= (1 - self.keep) * whole * 0.9999


def output_changes(
    network: Network,
    dropped: Sequence[Block],
    rest: Sequence[Block],
    samples: Sequence[Mapping[str, Tensor]],
) -> dict[str, float]:
    """How much the outputs change when one more block is dropped, relative to their variance over the samples.

    Args:
        network: the original.
        dropped: blocks that are gone already.
        rest: blocks that may go next.
        samples: batches of inputs.

    Returns:
        Path of the block → ‖f(x) − f₋ᵦ(x)‖² / ‖f(x) − mean f‖² over all float outputs.
    """
    result = dict.fromkeys((block.path for block in rest), 0.0)
    for inputs in samples:
        before = [out.double() for out in network(inputs) if out.is_floating_point()]
        scale = [
            float((out - out.mean(0)).square().sum()) or float(out.square().sum()) for out in before
        ]
        for block in rest:
            after = without(network.traced, [*dropped, block], inputs)
            floats = [out.double() for out in after if out.is_floating_point()]
            for a, b, size in zip(before, floats, scale, strict=True):
                result[block.path] += float((a - b).square().sum()) / max(size, 1e-30)
    return result


def _is_stack(block: Block, found: Sequence[Block]) -> bool:
    """Whether a block holds a list with two or more blocks in it, which are numbered."""
    inside = [other.path for other in found if other.nodes < block.nodes]
    lists = [path.rpartition(".")[0] for path in inside if path.rpartition(".")[2].isdigit()]
    return any(lists.count(name) > 1 for name in lists)


def _overlap(left: Block, right: Block) -> bool:
    return bool(left.nodes & right.nodes)
