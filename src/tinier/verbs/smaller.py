"""What the steps give back: the smaller network, where it comes from, and the plan between them."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from tinier.data.base import Examples
from tinier.data.read import read
from tinier.edits.base import Plan
from tinier.edits.follow import joined
from tinier.edits.slice import kept as kept_indices
from tinier.graph.groups import channel_groups
from tinier.graph.macs import macs
from tinier.modules.keras import KerasModule
from tinier.network import Example, Network
from tinier.sources.load import load as load_source
from tinier.sources.load import load_for


@dataclass(frozen=True)
class Smaller:
    """A network that a plan made smaller.

    Attributes:
        network: the new network with its example inputs.
        original: the network that the plan was made for.
        plan: the decision; printing it shows what was changed.
        trainable: the float network before quantization; None where ``network`` is float itself.
        notes: what was done beside the plan, a sentence each.
    """

    network: Network
    original: Network
    plan: Plan
    trainable: Network | None = None
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> nn.Module:
        """The smaller module or Keras model, runnable and trainable."""
        module = self.network.module
        return module.model if isinstance(module, KerasModule) else module

    @property
    def kept(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """Parameter name → dimension → indices that were kept, of every parameter that was cut."""
        return kept_indices(self.plan)

    def as_dict(self) -> dict[str, Any]:
        """Costs before and after, the notes and the edits, JSON-able."""
        before, after = costs(self.original), costs(self.trainable or self.network)
        return {
            "name": self.original.name,
            "macs": {"before": before[0], "after": after[0]},
            "parameters": {"before": before[1], "after": after[1]},
            "class": type(self.model).__name__,
            "notes": list(self.notes),
            "edits": [[edit.kind, *edit.row()] for edit in self.plan.edits],
        }

    def __str__(self) -> str:
        before, after = costs(self.original), costs(self.trainable or self.network)
        lines = [
            f"{what} {was:,} → {now:,} ({now / max(was, 1):.1%})"
            for what, was, now in zip(("MACs", "parameters"), before, after, strict=True)
        ]
        return "\n".join([*lines, *self.notes, str(self.plan)])


def costs(network: Network) -> tuple[int, int]:
    """MACs at batch 1 and the number of parameters of a float network."""
    traced = network.traced
    parameters = sum(parameter.numel() for parameter in network.module.parameters())
    return sum(macs(traced, channel_groups(traced)).values()), parameters


def network_of(model: Any, example: Example | None = None, data: Any = None) -> Network:
    """The network of whatever a step was given."""
    if isinstance(model, Smaller):
        return model.network
    if isinstance(model, Network):
        return model
    return load_source(model, example) if data is None else load_for(model, example, data)


def since(model: Any, network: Network, plan: Plan) -> tuple[Network, Plan]:
    """The original of what a step was given, and the plan from there: this step's, behind those before it."""
    if not isinstance(model, Smaller):
        return network, plan
    return model.original, joined(model.original, model.plan, plan)


def examples_of(data: Any, network: Network) -> Examples:
    """The examples of whatever a step was given as data."""
    if isinstance(data, Examples):
        return data
    return read(data, network.example, tokenizer_folder=network.folder)
