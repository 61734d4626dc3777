"""The graph of a network from a few recordings without values, in a fraction of the time of torch.export."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from tinier.graph.record import Recording, Runner
from tinier.graph.recorded import Builder, other_size


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
        Three runs without values, and one more for each further free size: milliseconds for a hundred operators.
    """
    run = Runner(module, example)
    base = run({})
    sizes = _free_sizes(run, base, example, free)
    recordings = [base, *(other for _, other in sizes)]
    groups = [dims for dims, _ in sizes]
    sizes_far: list[int] = []
    if groups:
        moved = {place: other_size(example, place, 3) for dims in groups for place in dims}
        recordings.append(run(moved))
        # Branches on a size show only where the size is another one by much; the batch may grow without end, a length may not.
        far = {place: other_size(example, place, 9 if place[1] else 61) for place in moved}
        try:
            recordings.append(run(far))
        except Exception:  # the user's code, at a length that it does not take
            far = {place: size if place[1] == 0 else moved[place] for place, size in far.items()}
            recordings.append(run(far))
        sizes_far = [far[dims[0]] for dims in groups]
    return Builder(run, groups, recordings, sizes_far).build(), base.result


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
