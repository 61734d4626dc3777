"""What a network consists of, what could leave it, and what cannot and why."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tinier.data.base import Examples
from tinier.data.check import runs
from tinier.data.read import read
from tinier.edits.slice import Slice
from tinier.errors import InputError, OutputError, RefusedError
from tinier.graph.axes import Atom
from tinier.graph.groups import Channels, channel_groups
from tinier.graph.macs import Row, describe
from tinier.methods.channel_pruning import ChannelPruning
from tinier.network import Example, Network
from tinier.report.distributions import distribution_tables, distributions_html, legend
from tinier.report.words import bar
from tinier.sources.load import load_for
from tinier.statistics.distributions import Described, describe_activations, describe_weights

BATCH = 64
MOST = 512  # examples that activations are looked at on


@dataclass(frozen=True)
class Inspection:
    """Layers, channel groups and pins of a network.

    Attributes:
        name: of the network.
        rows: a row for each operator that has parameters or multiplies.
        channels: the groups, and what is pinned.
        batched: whether the batch size is free.
        keep: the share of the MACs at which bars show what would be left.
        widths: group → how many channels would be left there.
        refusal: why that share cannot be reached; empty if it can.
        distributions: of every weight, and of every activation where there were data; empty unless they were asked for.
        examples: how many examples the activations are of.
    """

    name: str
    rows: list[Row]
    channels: Channels
    batched: bool
    keep: float = 0.5
    widths: Mapping[str, int] = field(default_factory=dict)
    refusal: str = ""
    distributions: tuple[Described, ...] = ()
    examples: int = 0

    @property
    def parameters(self) -> int:
        """Number of trainable numbers, tied ones once."""
        return sum(row.parameters for row in self.rows)

    @property
    def macs(self) -> int:
        """Multiply–accumulates of one example."""
        return sum(row.macs for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "macs": self.macs,
            "batch_is_free": self.batched,
            "layers": [asdict(row) for row in self.rows],
            "groups": [
                {
                    "name": group.name,
                    "size": group.size,
                    "kind": group.kind,
                    "would_keep": self.widths.get(group.name, group.size),
                    "members": [f"{slot.parameter}[{slot.dim}]" for slot in group.slots],
                }
                for group in self.channels.groups
            ],
            "pinned": [
                {
                    "parameter": pinned.parameter,
                    "dim": pinned.dim,
                    "size": pinned.size,
                    "reasons": [f"{why.operator}: {why.reason}" for why in pinned.pins],
                }
                for pinned in self.channels.pins
            ],
            **self._distributions(),
        }

    def _distributions(self) -> dict[str, Any]:
        if not self.distributions:
            return {}
        return {
            "examples": self.examples,
            "distributions": [
                asdict(one)
                | {"decibels": {b: _finite(one.values.decibels(b)) for b in one.values.noise}}
                if one.values
                else asdict(one)
                for one in self.distributions
            ],
        }

    def show_distributions(self, console: Console) -> None:
        """Print a line for each weight and each activation; columns that do not fit the console are left out."""
        for table in distribution_tables(self.distributions, console.width):
            console.print(table)
        console.print(legend(), style="dim", soft_wrap=True)

    def write_distributions(self, path: str | Path) -> None:
        """Write an HTML file with a histogram of each weight and each activation; it needs no network.

        Args:
            path: of the file; one that exists is replaced.

        Raises:
            InputError: the distributions were not asked for.
            OutputError: it cannot be written there.
        """
        if not self.distributions:
            raise InputError("no distributions to write: inspect(…, distributions=True)")
        try:
            Path(path).write_text(
                distributions_html(self.name, self.distributions, self.examples), encoding="utf-8"
            )
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written: {error.strerror}; name a file in a folder that exists"
            ) from error

    def show(self, console: Console) -> None:
        """Print three tables: layers, channel groups, pins."""
        console.print(
            f"{self.name}: {self.parameters:,} parameters, {self.macs:,} MACs an example, "
            f"batch size {'free' if self.batched else 'fixed'}",
            style="bold",
        )
        console.print(
            self.refusal or f"Bars: what pruning to {self.keep:.0%} of the MACs would leave.",
            style="dim",
            soft_wrap=True,
        )
        layers = _table("layer", "operator", "shape", "parameters", "MACs", "left")
        for row in self.rows:
            shape = " × ".join(str(size) if size else "free" for size in row.shape)
            layers.add_row(
                row.layer,
                row.kind,
                shape,
                f"{row.parameters:,}",
                f"{row.macs:,}",
                bar(row.left, 10),
            )
        console.print(layers)
        groups = _table("channel group", "kind", "size", "left", "what leaves together")
        for group in self.channels.groups:
            members = ", ".join(f"{slot.parameter}[{slot.dim}]" for slot in group.slots)
            left = bar(self.widths.get(group.name, group.size) / group.size, 10)
            groups.add_row(group.name, group.kind, str(group.size), left, members)
        console.print(groups)
        pins = _table("pinned", "size", "why")
        for pinned in self.channels.pins:
            reasons = "; ".join(
                dict.fromkeys(f"{why.operator}: {why.reason}" for why in pinned.pins)
            )
            pins.add_row(f"{pinned.parameter}[{pinned.dim}]", str(pinned.size), reasons)
        console.print(pins)
        if self.distributions:
            self.show_distributions(console)

    def __str__(self) -> str:
        console = Console(width=140, no_color=True)
        with console.capture() as captured:
            self.show(console)
        return captured.get()


def inspect(
    model: Any,
    example: Example | None = None,
    *,
    data: Any = None,
    keep: float = 0.5,
    distributions: bool = False,
) -> Inspection:
    """Look at a network without changing it.

    Args:
        model: an ``nn.Module``, the path of an ONNX file or of a Hugging Face directory.
        example: example inputs, for modules and for files that leave sizes open.
        data: where the example inputs come from if there is no example; with ``distributions`` at most 512 examples are run.
        keep: share of the MACs for the bars that show what pruning by magnitude would leave.
        distributions: look at the values of every weight, and with data of every activation, too.

    Raises:
        ModelError: it cannot be read, run or traced.
        DataError: with ``distributions``, the data do not fit the network.
        RefusedError: with ``distributions``, the network has no values.

    Cost:
        One trace and one analysis of its axes; milliseconds a hundred operators. With ``distributions`` a dozen passes over the weights,
        and a run of the network over the data.
    """
    network = model if isinstance(model, Network) else load_for(model, example, data)
    channels = channel_groups(network.traced)
    refusal, sizes = "", dict[Atom, int]()
    method = ChannelPruning(keep=keep)
    try:
        widths = {
            edit.row()[0]: len(edit.kept)
            for edit in method.plan(network).edits
            if isinstance(edit, Slice)
        }
    except RefusedError as error:
        refusal, widths = str(error), {}
    for group in channels.groups:
        sizes[group.atom] = widths.get(group.name, group.size)
    described, examples = _described(network, data) if distributions else ((), 0)
    return Inspection(
        network.name,
        describe(network.traced, channels, sizes),
        channels,
        network.traced.batched,
        keep,
        widths,
        refusal,
        described,
        examples,
    )


def _described(network: Network, data: Any) -> tuple[tuple[Described, ...], int]:
    """Distributions of weights and, with data, of activations, and over how many examples."""
    network.need_values("show distributions of")
    weights = describe_weights(network)
    if data is None:
        return tuple(weights), 0
    examples = data
    if not isinstance(data, Examples):
        examples = read(data, network.example, tokenizer_folder=network.folder)
    size = BATCH if network.traced.batched else len(next(iter(network.example.values())))
    count = min(len(examples), MOST)
    count -= 0 if network.traced.batched else count % size
    runs(examples, network)
    # Spread over the data, which may be sorted by class.
    chosen = examples.subset([i * len(examples) // count for i in range(count)])
    return (*weights, *describe_activations(network, chosen.batches(size))), count


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _table(*heads: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in heads:
        numeric = head in ("parameters", "MACs", "size")
        table.add_column(head, justify="right" if numeric else "left", overflow="fold")
    return table
