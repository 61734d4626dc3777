"""Tensors that a network takes apart along a dimension and puts together again whole, as one operator of any size.

``torch.cat(list(x))`` has as many operands as the batch has rows, which no one graph has; it is ``x.flatten(0, 1)``.
"""

from dataclasses import replace
from typing import Any

import torch

from tinier.graph.record import Recording, Ref, Shape, Step, map_refs, refs_in
from tinier.graph.shapes import META

aten = torch.ops.aten


def rejoined(recording: Recording) -> Recording:
    """The recording without the steps that only take apart what others put together.

    ``cat(unbind(x, d), e)`` becomes ``x.movedim(d, e).flatten(e, e + 1)``, ``stack(unbind(x, d), e)`` becomes ``x.movedim(d, e)``.

    Args:
        recording: left as it is.

    Returns:
        A recording of the same results; the given one where nothing is to be changed.

    Cost:
        Two passes over the steps.
    """
    whole = _whole(recording)
    if not whole:
        return recording
    steps: list[Step] = []
    moved: dict[Ref, Ref] = {}  # where the results are now

    def add(step: Step) -> Ref:
        steps.append(step)
        return Ref(len(steps) - 1, 0)

    for number, step in enumerate(recording.steps):
        if number in whole.values():
            continue
        if number not in whole:
            args, kwargs = map_refs((step.args, step.kwargs), moved)
            place = add(replace(step, args=args, kwargs=kwargs)).step
            for item in range(len(step.results)):
                moved[Ref(number, item)] = Ref(place, item)
            continue
        apart = recording.steps[whole[number]]
        source: Ref = moved.get(apart.args[0], apart.args[0])
        (shape,) = step.results
        piece = apart.results[0]
        assert shape is not None and piece is not None
        start, end = _dim(apart, len(piece.size) + 1), _dim(step, len(shape.size))
        joins = step.func is aten.cat.default
        if start != end or not joins:
            whole_size = [*piece.size[:start], len(apart.results), *piece.size[start:]]
            turned = torch.empty(whole_size, device=META).movedim(start, end)
            between = Shape(tuple(turned.shape), turned.stride(), shape.dtype)
            source = add(_step(step, aten.movedim.int, (source, start, end), between))
        if joins:
            source = add(_step(step, aten.flatten.using_ints, (source, end, end + 1), shape))
        moved[Ref(number, 0)] = source
    outputs = [moved.get(ref, ref) for ref in recording.outputs]
    return replace(recording, steps=steps, outputs=outputs)


def _whole(recording: Recording) -> dict[int, int]:
    """Step that puts together → the step that took apart, where nothing else uses the pieces."""
    users: dict[int, list[int]] = {}
    for number, step in enumerate(recording.steps):
        for ref in refs_in((step.args, step.kwargs)):
            if ref.step >= 0 and recording.steps[ref.step].func is aten.unbind.int:
                users.setdefault(ref.step, []).append(number)
    returned = {ref.step for ref in recording.outputs}
    result = {}
    for apart, numbers in users.items():
        number, count = numbers[0], len(recording.steps[apart].results)
        step = recording.steps[number]
        pieces = [Ref(apart, item) for item in range(count)]
        if (
            apart not in returned
            and set(numbers) == {number}
            and step.func in (aten.cat.default, aten.stack.default)
            and list(step.args[0]) == pieces
        ):
            result[number] = apart
    return result


def _dim(step: Step, dims: int) -> int:
    found: Any = step.args[1] if len(step.args) > 1 else step.kwargs.get("dim", 0)
    return int(found) % dims


def _step(source: Step, func: Any, args: tuple[Any, ...], shape: Shape) -> Step:
    return replace(source, func=func, args=args, kwargs={}, results=[shape], several=False)
