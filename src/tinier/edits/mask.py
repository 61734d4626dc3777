"""Mask: single weights become zero and stay zero, while the network keeps its shapes and trains on."""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tinier.edits.base import Edit
from tinier.errors import RefusedError
from tinier.modules.masked import hold, masks_of, plain_name, release
from tinier.network import Network
from tinier.tensors.masks import pack, unpack


@dataclass(frozen=True)
class Mask(Edit):
    """Hold some weights of one parameter at zero.

    Attributes:
        parameter: its name; tied parameters are masked under every name.
        shape: of the parameter.
        bits: which weights stay, as `tinier.tensors.masks.pack` writes them.
    """

    kind: ClassVar[str] = "mask"

    parameter: str
    shape: tuple[int, ...]
    bits: str

    @staticmethod
    def of(parameter: str, mask: Tensor) -> "Mask":
        """The edit of a bool tensor, True where the weight stays."""
        return Mask(parameter, tuple(mask.shape), pack(mask))

    @property
    def mask(self) -> Tensor:
        """Which weights stay: bool, of the parameter's shape."""
        return unpack(self.bits, self.shape)

    def row(self) -> tuple[str, str]:
        """The parameter, and how many of its weights stay."""
        mask = self.mask
        kept = int(mask.sum())
        return self.parameter, f"{mask.numel():,} → {kept:,} ({kept / max(mask.numel(), 1):.1%})"

    @classmethod
    def apply_all(cls, edits: list[Edit], network: Network) -> Network:
        """A network with the same class whose masked weights are zero and stay so while it trains.

        The mask is a parametrization of torch: ``layer.weight`` is the masked weight, ``parametrizations.weight.original`` what trains.
        Traces and exports have plain zeros, under the plain name. Masks of several edits, and masks that are held already, add up.

        Raises:
            RefusedError: the network has no such parameter, or it cannot be masked.

        Cost:
            One copy of the network; a bool for each masked weight.
        """
        module = copy.deepcopy(network.module)
        known = {plain_name(n): p for n, p in module.named_parameters(remove_duplicate=False)}
        for edit in edits:
            if not isinstance(edit, Mask):
                continue
            if edit.parameter not in known:
                raise RefusedError(
                    f"mask {edit.parameter}: {network.name} has no such parameter; is the plan of another network?"
                )
            try:
                mask = edit.mask
                if not mask.all():
                    hold(module, {edit.parameter: mask})
            except ValueError as error:
                raise RefusedError(f"mask {edit.parameter}: {error}") from error
        return replace(network, module=module)


def unmask(network: Network) -> Network:
    """A copy whose held zeros are ordinary weights: the user's own class and names, free to change again.

    Args:
        network: with or without masks; left as it is.

    Cost:
        One copy of the network.
    """
    module = copy.deepcopy(network.module)
    release(module)
    return replace(network, module=module)


def sparsity(network: Network) -> dict[str, float]:
    """Masked parameter → share of its weights that is held at zero, in [0, 1]."""
    return {name: 1 - float(mask.float().mean()) for name, mask in masks_of(network.module).items()}
