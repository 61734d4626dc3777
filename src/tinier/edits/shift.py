"""Shift: constants that leave with their channels are added to a bias, or taken off the mean that a batch norm subtracts."""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tinier.edits.base import Edit
from tinier.errors import RefusedError
from tinier.graph.groups import named_tensors
from tinier.modules.masked import plain_name
from tinier.network import Network


@dataclass(frozen=True)
class Shift(Edit):
    """Add a number to each entry of a bias or of a running mean.

    Attributes:
        tensor: name of the parameter or buffer, of one dimension.
        values: one number for each entry.
    """

    kind: ClassVar[str] = "shift"

    tensor: str
    values: tuple[float, ...]

    def row(self) -> tuple[str, str]:
        """The bias, and how many of its entries change."""
        changed = sum(value != 0 for value in self.values)
        return self.tensor, f"{changed} of {len(self.values)} entries take up constants"

    @classmethod
    def apply_all(cls, edits: list[Edit], network: Network) -> Network:
        """A copy of the network with shifted biases.

        Raises:
            RefusedError: the network has no such tensor, or of another size.
        """
        module = copy.deepcopy(network.module)
        named = {plain_name(name): tensor for name, tensor in named_tensors(module).items()}
        for edit in edits:
            if isinstance(edit, Shift):
                tensor = named.get(edit.tensor)
                if tensor is None or tuple(tensor.shape) != (len(edit.values),):
                    has = "none" if tensor is None else f"one of shape {tuple(tensor.shape)}"
                    raise RefusedError(
                        f"shift {edit.tensor} of {len(edit.values)} entries: {network.name} has {has}"
                    )
                with torch.no_grad():
                    tensor += torch.tensor(edit.values, dtype=tensor.dtype, device=tensor.device)
        return replace(network, module=module)
