"""The graph of a network from a few recordings without values, in a fraction of the time of torch.export."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, fx, nn

from tinier.graph.capture import has_values, same_values
from tinier.graph.record import Recording, Runner, Unclear
from tinier.graph.recorded import Builder, Unconfirmed, other_size

Place = tuple[str, int]  # an input and one of its dimensions


def record(
    module: nn.Module,
    example: Mapping[str, Tensor],
    free: Callable[[Tensor], range],
    perhaps: Callable[[Tensor], range] | None = None,
) -> tuple[fx.GraphModule, Any]:
    """The graph of a network from runs without values.

    Args:
        module: in evaluation mode; left as it is.
        example: input name → tensor.
        free: the dimensions of an input whose size should stay free.
        perhaps: further dimensions, that are free where the network takes other sizes of them.

    Returns:
        A module that takes inputs by name and returns a flat tuple, with the parameters of ``module`` under their names (in the same
        memory) and copies of its buffers; and what the network returned, without values.

    Raises:
        Unclear: the recordings differ in more than sizes, it writes to inputs or buffers, or it computes something else where the values
            that it checks are not known.
        Exception: whatever the network raises where it needs values.

    Cost:
        Two runs without values, and one more for each free size but a lone batch: milliseconds for a hundred operators. A run of the
        network, and one of the graph, where it asks for values to check them.
    """
    run = Runner(module, example)
    places = _places(example, free)
    more = [p for p in _places(example, perhaps or (lambda _: range(0))) if p not in places]
    try:
        found = _recorded(run, places, more)
    finally:
        run.forget()
    if run.asked and has_values(module, example) and not same_values(module, found[0], example):
        raise Unclear("where it cannot look at values it computes something else")
    return found


def _recorded(run: Runner, places: list[Place], more: list[Place]) -> tuple[fx.GraphModule, Any]:
    base = run({})
    lengths = _taken(run, base, places, more)
    if lengths:
        # Numbers may follow a length by no line: then it is fixed.
        with suppress(Exception):
            return _graph(run, base, [*places, *lengths], lengths)
    return _graph(run, base, places, [])


def _places(example: Mapping[str, Tensor], free: Callable[[Tensor], range]) -> list[Place]:
    return [
        (n, dim) for n, tensor in example.items() for dim in free(tensor) if tensor.shape[dim] > 1
    ]


def _taken(run: Runner, base: Recording, places: list[Place], more: list[Place]) -> list[Place]:
    """Of further dimensions those that may have another size, alone or with all others of their place and size."""
    example = run.example
    result: list[Place] = []
    for name, dim in more:
        size = example[name].shape[dim]
        tied = [p for p in [*places, *more] if p[1] == dim and example[p[0]].shape[dim] == size]
        for moved in ([(name, dim)], tied):
            try:
                other = run({p: other_size(example, p, 1) for p in moved})
            # The user's code, at a size that it does not take.
            except Exception:
                continue
            if [step.func for step in other.steps] == [step.func for step in base.steps]:
                result.append((name, dim))
                break
    return result


def _graph(
    run: Runner, base: Recording, places: list[Place], lengths: list[Place]
) -> tuple[fx.GraphModule, Any]:
    example = run.example
    if not places:
        return Builder(run, [], [base]).build(), base.result
    # Branches on a size show only where the size is another one by much; the batch may grow without end, a length may not.
    far = {place: other_size(example, place, 9 if place[1] else 61) for place in places}
    try:
        last = run(far)
    except Exception:  # the user's code, at a length that it does not take
        near = {place: other_size(example, place, 3) for place in places}
        far = {place: near[place] if place[1] else size for place, size in far.items()}
        last = run(far)
    if not any(dim for _, dim in places) and len({example[n].shape[0] for n, _ in places}) == 1:
        try:  # Numbers in proportion to the batch at two sizes so far apart are so at all.
            return Builder(run, [tuple(places)], [base, last], far).build(), base.result
        except Unconfirmed:
            pass
    sizes = _free_sizes(run, places)
    recordings = [base, *(other for _, other in sizes)]
    # Strides, windows and clips show at lengths of another order only.
    checks = []
    for other in (lambda size: 4 * size + 3, lambda size: size // 2) if lengths else ():
        moved = {p: other(example[p[0]].shape[p[1]]) for p in lengths}
        recordings.append(run(moved))
        checks.append(moved)
    groups = [dims for dims, _ in sizes]
    return Builder(run, groups, [*recordings, last], far, checks).build(), base.result


def _free_sizes(run: Runner, free: list[Place]) -> list[tuple[tuple[Place, ...], Recording]]:
    """Places (input, dimension) that have one free size, and the recording with that size changed."""
    example = run.example
    ties: dict[tuple[int, int], list[Place]] = {}
    for name, dim in free:
        ties.setdefault((dim, example[name].shape[dim]), []).append((name, dim))
    result: list[tuple[tuple[Place, ...], Recording]] = []
    for (dim, _), places in ties.items():
        together = list(places)
        for place in places if dim and len(places) > 1 else ():
            try:
                alone = run({place: other_size(example, place, 1)})
            # The user's code, with an input that does not fit the others: their sizes are one.
            except Exception:
                continue
            together.remove(place)
            result.append(((place,), alone))
        if together:
            moved = {place: other_size(example, place, 1) for place in together}
            result.append((tuple(together), run(moved)))
    return result
