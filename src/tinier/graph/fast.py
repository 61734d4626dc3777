"""The graph of a network from a few recordings without values, in a fraction of the time of torch.export."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from tinier.graph.record import Recording, Runner
from tinier.graph.recorded import Builder, Unconfirmed, other_size


def record(
    module: nn.Module,
    example: Mapping[str, Tensor],
    free: Callable[[Tensor], range],
) -> tuple[fx.GraphModule, Any]:
    """The graph of a network from runs without values.

    Args:
        module: in evaluation mode; left as it is.
        example: input name → tensor.
        free: the dimensions of an input whose size should stay free.

    Returns:
        A module that takes inputs by name and returns a flat tuple, with the parameters of ``module`` under their names (in the same
        memory) and copies of its buffers; and what the network returned, without values.

    Raises:
        Unclear: the recordings differ in more than sizes, or it writes to inputs or buffers.
        Exception: whatever the network raises where it needs values.

    Cost:
        Two runs without values, and one more for each free size but a lone batch: milliseconds for a hundred operators.
    """
    run = Runner(module, example)
    base = run({})
    places = [
        (n, dim) for n, tensor in example.items() for dim in free(tensor) if tensor.shape[dim] > 1
    ]
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
    if (
        not any(dim for _, dim in places)
        and len({example[name].shape[0] for name, _ in places}) == 1
    ):
        try:  # Numbers in proportion to the batch at two sizes so far apart are so at all.
            return Builder(run, [tuple(places)], [base, last], far).build(), base.result
        except Unconfirmed:
            pass
    sizes = _free_sizes(run, base, example, free)
    recordings = [base, *(other for _, other in sizes), last]
    return Builder(run, [dims for dims, _ in sizes], recordings, far).build(), base.result


def _free_sizes(
    run: Runner, base: Recording, example: Mapping[str, Tensor], free: Callable[[Tensor], range]
) -> list[tuple[tuple[tuple[str, int], ...], Recording]]:
    """Places (input, dimension) that have one free size, and the recording with that size changed."""
    ties: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for name, tensor in example.items():
        for dim in free(tensor):
            if tensor.shape[dim] > 1:
                ties.setdefault((dim, tensor.shape[dim]), []).append((name, dim))
    result: list[tuple[tuple[tuple[str, int], ...], Recording]] = []
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
