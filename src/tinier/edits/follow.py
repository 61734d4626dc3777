"""Two rounds of slices as one: what the second cut out of the first's result, in the numbering of the original."""

from tinier.edits.base import Plan
from tinier.edits.slice import Slice
from tinier.errors import RefusedError
from tinier.graph.groups import Channels


def follow(first: Plan, then: Plan, channels: Channels) -> Plan:
    """The plan that does at once what two plans of slices do one after the other.

    Args:
        first: slices of the original.
        then: slices of what ``first`` made.
        channels: of the original.

    Returns:
        Slices of the original.

    Raises:
        RefusedError: a group of ``then`` is none of the original's.
    """
    kept = _kept(first)
    for name, (size, positions) in _kept(then).items():
        group = channels.group(name)
        before = kept[name][1] if name in kept else tuple(range(group.size if group else 0))
        if group is None or len(before) != size:
            raise RefusedError(f"{name}: a later round cut a group that the original does not have")
        kept[name] = (group.size, tuple(before[position] for position in positions))
    groups = {group.name: group for group in channels.groups}
    return Plan(tuple(Slice.of(groups[name], positions) for name, (_, positions) in kept.items()))


def _kept(plan: Plan) -> dict[str, tuple[int, tuple[int, ...]]]:
    result: dict[str, tuple[int, tuple[int, ...]]] = {}
    for edit in plan.edits:
        if not isinstance(edit, Slice):
            raise RefusedError(f"{edit.kind}: only slices can follow each other as one plan")
        result[edit.group] = (edit.size, edit.kept)
    return result
