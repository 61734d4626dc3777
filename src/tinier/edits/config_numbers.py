"""Which dimensions of its parameters each number of a Hugging Face config governs, found by building the class from other numbers."""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tinier.graph.states import quiet, repeatable

Dim = tuple[str, int]  # name in a checkpoint, dimension

# Numbers that are no widths; heads, their sizes and experts are told by their names.
OTHER = re.compile(
    r"vocab|_ids?$|layers?$|^depths?$|position|image|patch|^max_|kernel|stride|depth|dilation|padding|labels|window|version|^num_channels$|heads?$|"
    r"head_dim|head_size|^d_kv$|kv_channels|experts|_rank$|length|^num_stages$|bucket|^n_ctx$|groups|top_k|beams|seed|freq|factor|size_per"
)


@dataclass(frozen=True)
class Number:
    """One number of a config.

    Attributes:
        path: names of the configs inside the config that it is in.
        name: of the attribute.
        index: of its entry, where the attribute is a list.
        value: as it stands.
    """

    path: tuple[str, ...]
    name: str
    index: int | None
    value: int

    def put(self, config: Any, value: int) -> None:
        """Change it in place, in a config or in what ``to_dict`` makes of one."""
        for step in self.path:
            config = config[step] if isinstance(config, dict) else getattr(config, step)
        new: Any = value
        if self.index is not None:
            old = config[self.name] if isinstance(config, dict) else getattr(config, self.name)
            new = type(old)((*old[: self.index], value, *old[self.index + 1 :]))
        if isinstance(config, dict):
            config[self.name] = new
        else:
            setattr(config, self.name, new)


def numbers(written: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Number]:
    """Numbers of a config's ``to_dict`` that may be widths."""
    for name, value in written.items():
        if isinstance(value, dict) and "model_type" in value:
            yield from numbers(value, (*path, name))
        if name.startswith("_") or OTHER.search(name):
            continue
        if type(value) is int and value > 1:
            yield Number(path, name, None, value)
        if type(value) in (list, tuple) and all(type(item) is int for item in value):
            for index, item in enumerate(value):
                yield Number(path, name, index, item)


@dataclass(frozen=True)
class Governed:
    """What the numbers of a config say.

    Attributes:
        dims: number → the dimensions that change when it is doubled; those that change none are left out.
        written: attributes that the config leaves open, with what its class makes of them now.
    """

    dims: Mapping[Number, frozenset[Dim]]
    written: Mapping[str, int]


def governed(module: nn.Module, left_open: Mapping[str, int]) -> Governed:
    """What each number of a module's config governs.

    Args:
        module: its ``config`` is one of transformers; that of anything else, or of weights that it does not make, governs nothing.
        left_open: attributes that the config may leave open, and what its class may make of them.

    Cost:
        For each number that may be a width, the class built once without memory for its weights.
    """
    config: Any = getattr(module, "config", None)
    known = hasattr(config, "to_dict") and hasattr(module, "save_pretrained")
    before = shapes(module, config.to_dict()) if known else None
    if before is None or before != {n: tuple(t.shape) for n, t in module.state_dict().items()}:
        return Governed({}, {})
    base, written = config.to_dict(), {}
    for name, value in left_open.items():
        # The class reads it if the same value changes nothing and another one does.
        if (
            shapes(module, base | {name: value})
            == before
            != shapes(module, base | {name: 2 * value})
        ):
            base, written[name] = base | {name: value}, value
    result = {}
    for number in numbers(base):
        doubled = copy.deepcopy(base)
        number.put(doubled, 2 * number.value)
        after = shapes(module, doubled) or {}
        changed = frozenset(
            (name, dim)
            for name, shape in after.items()
            if len(before.get(name, ())) == len(shape)
            for dim in range(len(shape))
            if shape[dim] != before[name][dim]
        )
        if changed:
            result[number] = changed
    return Governed(result, written)


def shapes(module: nn.Module, written: dict[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Name → shape of what a checkpoint holds, in the class built from what a config writes; None if it cannot be."""
    config: Any = module.config
    try:
        with quiet(), repeatable(), torch.device("meta"):
            built = type(module)(type(config).from_dict(copy.deepcopy(written)))  # type: ignore[call-arg]
    except Exception:  # the class's own checks of sizes that do not go together
        return None
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


def keeps_its_layers(module: nn.Module, changes: Mapping[Number, int]) -> bool:
    """Whether the class built from other numbers still has the same parameters: some leave a projection out between equal widths."""
    config: Any = module.config
    written = copy.deepcopy(config.to_dict())
    before = shapes(module, written)
    for number, value in changes.items():
        number.put(written, value)
    after = shapes(module, written)
    return before is None or after is None or set(before) == set(after)
