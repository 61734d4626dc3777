"""Weights that are held at zero while everything else trains: a parametrization of torch, and how to take it off again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize


class Masked(nn.Module):
    """ŵ = w where the mask is True, else 0; no gradient reaches the w behind a zero.

    Args:
        mask: bool, of the weight's shape.
    """

    mask: Tensor  # bool, of the weight's shape

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight; NaN and infinity behind the mask become zeros, too."""
        return torch.where(self.mask, weight, weight.new_zeros(()))


def hold(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Hold weights at zero, in place; tied parameters are held under every name, and masks add to those that are held already.

    Args:
        module: changed; a copy of the caller's own.
        masks: parameter name → bool mask of its shape.

    Raises:
        KeyError: no such parameter.
        ValueError: another shape; the parameter carries another parametrization, as weight norm; it lies at the root of a traced graph.
    """
    named = {plain_name(name): p for name, p in module.named_parameters(remove_duplicate=False)}
    wanted: dict[int, Tensor] = {}
    for name, mask in masks.items():
        parameter = named[name]
        if parameter.shape != mask.shape:
            raise ValueError(f"it has shape {tuple(parameter.shape)}, the mask {tuple(mask.shape)}")
        mask = mask.to(parameter.device)
        wanted[id(parameter)] = wanted.get(id(parameter), torch.ones_like(mask)) & mask
    held: dict[int, Masked] = {}
    for name, parameter in named.items():
        if id(parameter) not in wanted:
            continue
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        present = _held(owner, leaf)
        if present is not None:
            if id(present) not in {id(one) for one in held.values()}:
                present.mask = present.mask & wanted[id(parameter)]
            held.setdefault(id(parameter), present)
        else:
            if isinstance(owner, fx.GraphModule):
                raise ValueError("it lies at the root of a traced graph, whose copies lose masks")
            if parametrize.is_parametrized(owner, leaf):
                raise ValueError("it carries another parametrization, as weight norm; remove that")
            one = held.setdefault(id(parameter), Masked(wanted[id(parameter)]))
            _own_class(owner)
            parametrize.register_parametrization(owner, leaf, one)
            if isinstance(owner, nn.RNNBase) and _refresh not in owner._forward_pre_hooks.values():
                owner.register_forward_pre_hook(_refresh)
                owner.register_forward_hook(_release)


def masks_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameter name → mask, of every weight that is held; tied ones under each name."""
    found = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        for leaf in list(owner.parametrizations) if parametrize.is_parametrized(owner) else ():  # type: ignore[arg-type]
            held = _held(owner, leaf)
            if held is not None:
                found[f"{path}.{leaf}" if path else leaf] = held.mask
    return found


def release(module: nn.Module) -> None:
    """Make every held zero an ordinary zero, in place; classes and parameter names are the user's own again."""
    for owner in list(module.modules()):
        leaves = [
            leaf
            for leaf in getattr(owner, "parametrizations", ())
            if _held(owner, leaf) is not None
        ]
        if not leaves:
            continue
        lists: Any = owner.parametrizations
        originals = {leaf: lists[leaf].original for leaf in leaves}
        for leaf, original in originals.items():
            with torch.no_grad():
                original.data = lists[leaf]().detach()
        _own_class(owner, without=leaves)
        for leaf, original in originals.items():
            del lists[leaf]
            setattr(owner, leaf, original)
        if not lists:
            del owner.parametrizations
            owner.__class__ = type(owner).__bases__[0]
        if isinstance(owner, nn.RNNBase):
            for hooks in (owner._forward_pre_hooks, owner._forward_hooks):
                for key in [key for key, hook in hooks.items() if hook in (_refresh, _release)]:
                    del hooks[key]


def plain_name(name: str) -> str:
    """The name that a parameter, or the mask over it, has without the parametrization."""
    if "parametrizations." not in name:
        return name
    path, _, rest = name.rpartition("parametrizations.")
    leaf, _, inside = rest.partition(".")
    return path + leaf if inside in ("original", "0.mask") else name


def _held(owner: nn.Module, leaf: str) -> Masked | None:
    if not parametrize.is_parametrized(owner, leaf):
        return None
    steps: Any = owner.parametrizations[leaf]  # type: ignore[index]
    return steps[0] if len(steps) == 1 and isinstance(steps[0], Masked) else None


def _own_class(owner: nn.Module, without: list[str] | None = None) -> None:
    """Give a parametrized module a class of its own: copies share theirs, and torch keeps the properties there."""
    if parametrize.is_parametrized(owner):
        kind = type(owner)
        body = {k: v for k, v in vars(kind).items() if k not in (without or ())}
        for name in ("__dict__", "__weakref__"):
            body.pop(name, None)
        owner.__class__ = type(kind.__name__, kind.__bases__, body)


def _refresh(layer: Any, _: Any) -> None:
    """Recurrent layers of torch read their weights from a list of their own: it gets the masked ones."""
    layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]


def _release(layer: Any, *_: Any) -> None:
    """The list gets the parameters back: results of operators cannot be copied with the module."""
    named = {plain_name(name): p for name, p in layer.named_parameters(remove_duplicate=False)}
    layer._flat_weights = [named[name] for name in layer._flat_weights_names]
