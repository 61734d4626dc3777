"""Which groups keep the same width so that every layer of a kind stays alike and the result is a standard checkpoint."""

import re
from collections.abc import Sequence
from typing import Any

from tinier.edits.config import HEAD_DIM, NEURONS, QUERY_HEADS, WIDTH, first_number, parts
from tinier.graph.axes import size
from tinier.graph.groups import Channels, Group
from tinier.network import Network

Bundle = tuple[tuple[Group, int], ...]
PLAIN = ("channel", "neuron", "hidden", "normalised")


def bundles(network: Network, channels: Channels, groups: Sequence[Group]) -> list[Bundle]:
    """Groups that change in step, so that one number says how wide they are.

    A class with a Hugging Face config is built from numbers: all groups as wide as one of them change with it, and groups whose
    width is none of them stay. Where a config derives the size of heads from width and number of heads, both
    shrink alike. In other classes those groups go together that have the same name but for its numbers, the same kind and the same size.

    Args:
        network: whose ``config`` is looked at, where its module has one.
        channels: of the network.
        groups: that may be cut.

    Returns:
        Tuples of (group, unit): of count n the group keeps n · unit channels.
    """
    config: Any = getattr(network.module, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        alike: dict[tuple[object, ...], list[Group]] = {}
        for group in groups:
            part = re.sub(r"\d+", "*", group.name)
            alike.setdefault((part, group.kind, group.size, group.minimum), []).append(group)
        return [_bundle(found) for found in alike.values()]
    numbers = {
        value
        for part in parts(config)
        for name in (*WIDTH, *NEURONS)
        if type(value := getattr(part, name, None)) is int
    }
    numbers |= {4 * n for n in numbers if any(getattr(config, k, 0) is None for k in NEURONS)}
    by_number: dict[tuple[object, ...], list[Group]] = {}
    for group in groups:
        if group.kind not in PLAIN:
            repeated = "repeated" in group.atom.roles
            key: tuple[object, ...] = (group.kind, repeated, group.size)
        elif group.size in numbers:
            key = ("width", group.size)
        else:
            continue
        by_number.setdefault(key, []).append(group)
    # A number holds for all its groups: where one of them must stay, so must the others.
    free = {id(group) for group in groups}
    for key in list(by_number):
        if key[0] == "width" and not _all_free(channels, int(str(key[1])), free):
            del by_number[key]
    return _with_derived(config, channels, by_number)


def must_divide(network: Network, bundle: Bundle) -> int:
    """The width that the number of heads must divide, by the rules of Hugging Face configs; 0 for other bundles and classes."""
    config: Any = getattr(network.module, "config", None)
    heads_alone = all(group.kind == "head" for group, _ in bundle)
    if not heads_alone or config is None or not hasattr(config, "to_dict"):
        return 0
    return first_number(config, WIDTH) or 0


def _bundle(groups: Sequence[Group]) -> Bundle:
    return tuple((group, 1) for group in groups)


def _all_free(channels: Channels, number: int, free: set[int]) -> bool:
    """Whether no group of this width is left out, for then its config's number has to stay."""
    return all(
        id(group) in free
        for group in channels.groups
        if group.kind in PLAIN and group.size == number
    )


def _with_derived(
    config: Any, channels: Channels, by_number: dict[tuple[object, ...], list[Group]]
) -> list[Bundle]:
    heads, width = first_number(config, QUERY_HEADS), first_number(config, WIDTH)
    derived = channels.heads and first_number(config, HEAD_DIM) is None
    if not derived or not heads or not width or width % heads:
        return [_bundle(found) for found in by_number.values()]
    of_width = by_number.pop(("width", width), [])
    of_heads = by_number.pop(("head", False, heads), [])
    result = [
        _bundle(found) for key, found in by_number.items() if key[0] not in ("head", "head_dim")
    ]
    counts = {size(queries) for queries, _ in channels.heads.values()}
    if of_width and of_heads and counts == {heads}:
        step = width // heads
        result.append((*_bundle(of_heads), *((group, step) for group in of_width)))
    return result
