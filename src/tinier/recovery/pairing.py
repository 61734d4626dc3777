"""Which place inside the student learns from which inside the teacher."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from tinier.errors import InputError, RefusedError
from tinier.modules.observed import capturing
from tinier.network import Network
from tinier.recovery.recompute import blocks


@dataclass(frozen=True)
class LayerPair:
    """A place in the student and one in the teacher.

    Attributes:
        student, teacher: names of submodules, or of nodes of a graph.
        student_shape, teacher_shape: of their outputs for the example.
        why: how the pair was found.
    """

    student: str
    teacher: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class Pairing(Sequence[LayerPair]):
    """Pairs in the order of the student; printed, a table."""

    pairs: tuple[LayerPair, ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.pairs[index]

    def __iter__(self) -> Iterator[LayerPair]:
        return iter(self.pairs)

    def __str__(self) -> str:
        rows = [("student", "", "teacher", "", "")]
        rows += [
            (p.student, str(p.student_shape), p.teacher, str(p.teacher_shape), p.why) for p in self
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            "  ".join([*(row[c].ljust(widths[c]) for c in range(4)), row[4]]).rstrip()
            for row in rows
        )


@dataclass(frozen=True)
class _Point:
    name: str
    shape: tuple[int, ...]
    depth: float  # part of the network's points up to it, in (0, 1]


def pair_layers(
    student: Network, teacher: Network, chosen: Mapping[str, str] | None = None
) -> Pairing:
    """Pair places of two networks.

    Points are the outputs of repeated blocks; where there are none, of the layers with weights; of a graph that has no modules, those of
    its operators with weights. Where both networks have the same points, as an original and what pruning left of it, the same names are
    paired. Else each of the student's points is paired with the teacher's of its rank and, where there are some, of its height and
    width, whose relative depth is nearest and not less than that of the pair before.

    Args:
        student, teacher: left as they are.
        chosen: student's name → teacher's name, instead.

    Raises:
        InputError: a chosen name is unknown, or no features of floating point come out there.
        RefusedError: nothing can be paired.

    Cost:
        One run of each on its example.
    """
    if chosen is not None:
        ours, theirs = _shapes(student, list(chosen)), _shapes(teacher, list(chosen.values()))
        return Pairing(
            tuple(LayerPair(a, b, ours[a], theirs[b], "given") for a, b in chosen.items())
        )
    ours_, theirs_ = _points(student), _points(teacher)
    if [p.name for p in ours_] == [p.name for p in theirs_]:
        same = zip(ours_, theirs_, strict=True)
        found = [LayerPair(a.name, b.name, a.shape, b.shape, "same place") for a, b in same]
    else:
        found, least = [], 0.0
        for point in ours_:
            alike = [p for p in theirs_ if len(p.shape) == len(point.shape) and p.depth >= least]
            alike = (
                [p for p in alike if p.shape[2:] == point.shape[2:]] or alike
                if len(point.shape) > 3
                else alike
            )
            if alike:
                best = min(alike, key=lambda p: abs(p.depth - point.depth))
                least = best.depth
                why = f"depth {point.depth:.0%} and {best.depth:.0%}"
                found.append(LayerPair(point.name, best.name, point.shape, best.shape, why))
    if not found:
        raise RefusedError(
            f"{student.name} and {teacher.name} have no places whose features could be compared; "
            "name some: pairs={student's layer: teacher's layer}"
        )
    return Pairing(tuple(found))


def _points(network: Network) -> list[_Point]:
    """Places in the order in which they run."""
    module = network.module
    names = {id(part): name for name, part in module.named_modules()}
    parts = [part for part in blocks(module) if not isinstance(part, nn.Embedding)]
    if len(parts) < 2:
        weighted = nn.Linear | nn.modules.conv._ConvNd | nn.RNNBase
        parts = [part for part in module.modules() if isinstance(part, weighted)]
    chosen = [names[id(part)] for part in parts]
    if not chosen and isinstance(module, fx.GraphModule):
        chosen = [
            node.name
            for node in module.graph.nodes
            if node.op == "call_function"
            and any(arg.op == "get_attr" for arg in node.all_input_nodes)
        ]
    with capturing(module, chosen) as found, torch.no_grad():
        network(network.example)
        ran = [
            (name, tuple(value.shape))
            for name, value in found.items()
            if value.is_floating_point() and value.ndim > 1
        ]
    return [_Point(name, shape, (i + 1) / len(ran)) for i, (name, shape) in enumerate(ran)]


def _shapes(network: Network, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    with capturing(network.module, names) as found, torch.no_grad():
        network(network.example)
        values: dict[str, Tensor] = dict(found)
    for name in names:
        if name not in values or not values[name].is_floating_point():
            raise InputError(f"{network.name}: {name} gives no features of floating point")
    return {name: tuple(values[name].shape) for name in names}
