"""Two rounds of slices as one: what the second cut out of the first's result, in the numbering of the original."""

from tinier.edits.base import Edit, Plan
from tinier.edits.slice import Slice
from tinier.errors import RefusedError
from tinier.graph.groups import Channels, channel_groups
from tinier.network import Network


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


def joined(original: Network, first: Plan, then: Plan) -> Plan:
    """One plan for two, the second of which was made for what the first makes of ``original``.

    Slices that meet become slices of what the edits before them give; all other edits follow each other as they are.
    """
    before, after = list(first.edits), list(then.edits)
    last: list[Edit] = []
    head: list[Edit] = []
    while before and isinstance(before[-1], Slice):
        last.insert(0, before.pop())
    while after and isinstance(after[0], Slice):
        head.append(after.pop(0))
    if not last or not head:
        return first + then
    base = Plan(tuple(before)).apply(original)
    middle = follow(Plan(tuple(last)), Plan(tuple(head)), channel_groups(base.traced))
    return Plan(tuple(before)) + middle + Plan(tuple(after))


def _kept(plan: Plan) -> dict[str, tuple[int, tuple[int, ...]]]:
    result: dict[str, tuple[int, tuple[int, ...]]] = {}
    for edit in plan.edits:
        if not isinstance(edit, Slice):
            raise RefusedError(f"{edit.kind}: only slices can follow each other as one plan")
        result[edit.group] = (edit.size, edit.kept)
    return result
