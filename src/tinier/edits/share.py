"""Share: the weights of a tensor take few values, while the network keeps its class, shapes and type."""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tinier.edits.base import Edit
from tinier.errors import RefusedError
from tinier.modules.masked import plain_name
from tinier.network import Network
from tinier.tensors.clustering import MOST_CENTRES, nearest


@dataclass(frozen=True)
class Share(Edit):
    """Give every entry of one parameter the nearest of a few values.

    Attributes:
        tensor: the parameter's name; tied parameters are changed under every name.
        centres: the values, at most 256, finite; which entry has which need not be kept, it is the nearest.
    """

    kind: ClassVar[str] = "share"

    tensor: str
    centres: tuple[float, ...]

    def row(self) -> tuple[str, str]:
        """The parameter, and how many values it takes."""
        count = len(self.centres)
        bits = max(count - 1, 1).bit_length()
        return (
            self.tensor,
            f"{count} values, {bits} bits, {min(self.centres):.3g} … {max(self.centres):.3g}",
        )

    @classmethod
    def apply_all(cls, edits: list[Edit], network: Network) -> Network:
        """A copy of the network, of the same class, whose tensors take the shared values; half-way between two the lower one.

        Raises:
            RefusedError: the network has no such parameter, it is not of floating point or has no values, or the centres are none, too many
                or not finite.

        Cost:
            One copy of the network; O(weights · log centres).
        """
        module = copy.deepcopy(network.module)
        known = {plain_name(n): p for n, p in module.named_parameters(remove_duplicate=False)}
        for edit in edits:
            if not isinstance(edit, Share):
                continue
            parameter = known.get(edit.tensor)
            if parameter is None:
                raise RefusedError(
                    f"share {edit.tensor}: {network.name} has no such parameter; is the plan of another network?"
                )
            if not parameter.is_floating_point() or parameter.is_meta:
                raise RefusedError(
                    f"share {edit.tensor}: {parameter.dtype} on {parameter.device}; floating point values are needed"
                )
            centres = torch.unique(
                torch.tensor(edit.centres, dtype=torch.float64).to(parameter.dtype)
            ).to(parameter.device)
            if not 1 <= len(centres) <= MOST_CENTRES or not bool(centres.isfinite().all()):
                raise RefusedError(
                    f"share {edit.tensor}: {len(edit.centres)} centres; 1 to {MOST_CENTRES} finite ones are needed"
                )
            with torch.no_grad():
                parameter.copy_(centres[nearest(parameter, centres).long()])
        return replace(network, module=module)
