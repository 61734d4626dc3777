"""Numbers that modules keep as attributes: which of them count channels, and what is left of those."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from tinier.edits.rewrite import REWRITES, Rewriter
from tinier.graph.axes import Atom, Axis, Concat, Product, atoms, concat, product, size
from tinier.graph.macs import module_path
from tinier.graph.rules import operator_name

# What a name says about an attribute; numbers of the third kind have nothing to do with channels.
HEADS = re.compile(r"(^|_)(n_?)?heads?$|num_.*heads|nhead")
HEAD_DIM = re.compile(
    r"head_(dim|size|channels|width)|dim_(per_)?head|(^|_)(key|d_k|d_kv|query)_dim$|^d_k"
)
OTHER = re.compile(
    r"kernel|stride|padding|dilation|window|patch|image|img|resolution|shift|depth|version|layer|scale|block|chunk_size|stage|"
    r"_index|^dims?_?\d*$|axis|max_|seq_?len|step|prefix"
)
OUTGOING, INCOMING = re.compile(r"(^|_)out"), re.compile(r"(^|_)(in|input|q|query)(_|$)|^channels$")
MOST_PARTS = 8  # of which adjacent ones may be counted together


@dataclass(frozen=True)
class Size:
    """A size that a module's operators work with: before, after, what it counts, and where it was seen."""

    old: int
    new: int
    role: str  # "head", "head_dim" or ""
    place: str  # "rewritten" in an operator's arguments, "input" or "output" of the module, or "inside"


def set_sizes(module: nn.Module, run: Rewriter, change: bool) -> None:
    """Give attributes that hold sizes the new ones, in place.

    An integer stands for the sizes of the same value in operators of its module. Where those become different ones, its name decides
    (heads, what goes in, what comes out), then where the size is written in an operator's arguments.

    Args:
        module: a copy with smaller parameters; layers of torch.nn are put right elsewhere.
        run: axes of the original and what is kept of them.
        change: whether a number of which nothing tells follows what shrinks, or stays.
    """
    found = sizes_of_modules(run)
    for path, layer in module.named_modules():
        own = type(layer).__module__.startswith("torch.nn.") and not isinstance(layer, nn.Unflatten)
        if own or path not in found:
            continue
        sizes = found[path]
        for name, value in list(vars(layer).items()):
            if name.startswith("_") or name == "training" or OTHER.search(name):
                continue
            new = _renewed(name, value, sizes, change)
            if new is not value:  # values of other kinds come back as they are
                setattr(layer, name, new)


def choices(
    layers: Mapping[str, nn.Module], sizes: Mapping[str, set[Size]], most: int
) -> Iterator[dict[str, dict[str, int]]]:
    """Values for the integers that modules keep, where each may follow any size of its value or stay; the likeliest first.

    Args:
        layers: path → module, with its old numbers.
        sizes: path → those that its operators work with.
        most: how many are given; of integers with names that count no channels, as many stay out as it takes.

    Returns:
        Path → attribute → new value, for those that may change.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for path, layer in layers.items():
        for name, value in vars(layer).items():
            if type(value) is not int or value < 2 or name.startswith("_"):
                continue
            new = {s.new for s in sizes.get(path, ()) if s.old == value} - {value}
            if new:
                found[path, name] = [*sorted(new), value]
    while found and math.prod(len(options) for options in found.values()) > most:
        unlikely = [key for key in found if OTHER.search(key[1])]
        del found[unlikely[0] if unlikely else next(iter(found))]
    for values in itertools.product(*found.values()):
        chosen: dict[str, dict[str, int]] = {path: {} for path in layers}
        for (path, name), number in zip(found, values, strict=True):
            chosen[path][name] = number
        yield chosen


def _renewed(name: str, value: Any, sizes: set[Size], change: bool) -> Any:
    if type(value) is int:
        return _resolve(name, value, sizes, change)
    if type(value) in (tuple, list) and all(type(item) is int for item in value):
        return type(value)(_resolve(name, item, sizes, change) for item in value)
    return value


def _resolve(name: str, value: int, sizes: set[Size], change: bool) -> int:
    same = [s for s in sizes if s.old == value]
    if value < 2 or all(s.new == value for s in same):
        return value
    if HEADS.search(name):
        same = [s for s in same if s.role == "head"] or same
    elif HEAD_DIM.search(name):
        same = [s for s in same if s.role == "head_dim"] or same
    elif OUTGOING.search(name):
        same = [s for s in same if s.place == "output"] or same
    elif INCOMING.search(name):
        same = [s for s in same if s.place == "input"] or same
    if len({s.new for s in same}) > 1:
        same = [s for s in same if s.place == "rewritten"] or same
    options = sorted({s.new for s in same})
    if len(options) == 1:
        return options[0]
    return next(n for n in options if n != value) if change or value not in options else value


def sizes_of_modules(run: Rewriter) -> dict[str, set[Size]]:
    """Path of a module → the sizes that its operators work with."""
    result: dict[str, set[Size]] = {}
    for node in run.channels.axes:
        if not isinstance(node, fx.Node) or node.op != "call_function":
            continue
        path, stack = module_path(node), _stack(node)
        own = result.setdefault(path, set())
        rewritten = operator_name(node) in REWRITES and run.touches(node)
        for item in (node, *node.all_input_nodes):
            own.update(_sizes(item, run, "rewritten" if rewritten else "inside"))
        for source in node.all_input_nodes:
            if source.op != "get_attr":
                for outer in stack - _stack(source):
                    result.setdefault(outer, set()).update(_sizes(source, run, "input"))
        for outer in {path for user in node.users for path in stack - _stack(user)}:
            result.setdefault(outer, set()).update(_sizes(node, run, "output"))
    return result


def _stack(node: fx.Node) -> set[str]:
    return {str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()}


def _sizes(node: fx.Node, run: Rewriter, place: str) -> Iterator[Size]:
    found: Any = run.channels.axes.get(node)
    value: Any = node.meta.get("val")
    pairs = zip(found, value, strict=False) if isinstance(found, tuple) else [(found or [], value)]
    for axes, tensor in pairs:
        shape = getattr(tensor, "shape", ())
        for axis, length in zip(axes, shape, strict=False):
            fixed = isinstance(length, int)
            for part in _parts(axis):
                if fixed or run.changed(part):
                    yield Size(size(part), run.size(part), _role(part), place)


def _parts(axis: Axis) -> Iterator[Axis]:
    """An axis, and whatever adjacent factors or parts of it make up."""
    yield axis
    inner = (
        axis.factors
        if isinstance(axis, Product)
        else axis.parts
        if isinstance(axis, Concat)
        else ()
    )
    join = product if isinstance(axis, Product) else concat
    for start in range(min(len(inner), MOST_PARTS)):
        for stop in range(start + 1, min(len(inner), MOST_PARTS) + 1):
            if stop - start == 1:
                yield from _parts(inner[start])
            elif stop - start < len(inner):
                yield join(*inner[start:stop])


def _role(axis: Axis) -> str:
    roles = (
        {role for atom in atoms(axis) for role in atom.roles}
        if isinstance(axis, Atom | Product)
        else set()
    )
    return next(
        (role for role in ("head", "head_dim") if roles & {"head", "head_dim"} == {role}), ""
    )
