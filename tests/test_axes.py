"""The algebra of axes, against index arithmetic on small tensors, and the groups and pins that come of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinier.graph.axes import (
    UNIT,
    Atom,
    Axis,
    Mismatch,
    Pin,
    atoms,
    concat,
    coordinates,
    cut,
    fresh,
    halves,
    kept_size,
    pin,
    places,
    positions,
    product,
    regroup,
    resolve,
    size,
    unify,
)
from tinier.graph.groups import channel_groups
from tinier.network import Network, name_inputs


def everything(atom: Atom) -> Tensor:
    return torch.arange(atom.size)


def test_sizes_and_normal_forms() -> None:
    a, b, c = fresh(2), fresh(3), fresh(5)
    assert fresh(1) == UNIT and size(UNIT) == 1
    assert product(a, product(b, UNIT, c)) == product(a, b, c)
    assert concat(a, concat(b, c)) == concat(a, b, c)
    assert size(product(a, b, c)) == 30 and size(concat(a, b, c)) == 10
    assert product(a) is a and concat(fresh(0), a) is a


def test_a_view_refines_an_axis_wherever_it_is() -> None:
    width = fresh(12)
    heads, head = regroup([width], [3, 4])
    assert resolve(width) == product(heads, head)
    assert regroup([heads, head], [12]) == [resolve(width)]


def test_views_that_cut_through_groups_have_no_form() -> None:
    with pytest.raises(Mismatch):
        regroup([fresh(6), fresh(4)], [8, 3])


@pytest.mark.parametrize(
    ("left", "right"), [((6, 4), (2, 12)), ((2, 3, 4), (6, 4)), ((8,), (2, 2, 2))]
)
def test_products_refine_to_a_common_form(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = product(*map(fresh, left)), product(*map(fresh, right))
    unify(a, b)
    assert resolve(a) == resolve(b)


def test_concatenations_refine_to_a_common_form() -> None:
    a, b = concat(fresh(2), fresh(5)), concat(fresh(4), fresh(3))
    unify(a, b)
    assert resolve(a) == resolve(b)
    assert [atom.size for atom in atoms(resolve(a))] == [2, 2, 3]


def test_a_concatenation_of_groups_is_a_product_of_a_concatenation() -> None:
    inner = fresh(4)
    joined = concat(product(fresh(2), inner), product(fresh(3), fresh(4)))
    whole = product(fresh(5), fresh(4))
    unify(joined, whole)
    assert len({atom for atom in atoms(joined) if atom.size == 4}) == 1
    keep = {atom: torch.tensor([1]) for atom in atoms(joined) if atom.size == 4}
    left = [
        positions(resolve(axis), lambda atom: keep.get(atom, torch.arange(atom.size)))
        for axis in (joined, whole)
    ]
    assert left[0].tolist() == left[1].tolist() == [1, 5, 9, 13, 17]


def test_rotary_halves_become_one_atom() -> None:
    head = fresh(8)
    first, second = cut(head, (4, 4))
    unify(head, concat(second, first))
    assert len(set(atoms(head))) == 1


def test_mismatches_and_divisors() -> None:
    with pytest.raises(Mismatch, match="differ"):
        unify(fresh(3), fresh(4))
    with pytest.raises(Mismatch, match="divide"):
        halves(fresh(7), 2)


def test_pins_and_roles_go_where_the_axis_goes() -> None:
    axis = fresh(12)
    pin(axis, Pin("op", "why"))
    heads, head = regroup([axis], [3, 4])
    for part in (heads, head):
        assert all(atom.pins == [Pin("op", "why")] for atom in atoms(part))


def test_positions_and_coordinates_against_index_arithmetic() -> None:
    a, b, c = (Atom(n) for n in (2, 3, 4))
    axis: Axis = concat(product(a, b), product(c, a))
    labels = [(i, j) for i in range(2) for j in range(3)] + [
        (k, i) for k in range(4) for i in range(2)
    ]
    kept = {a: torch.tensor([1]), b: torch.tensor([0, 2])}
    expected = [
        n
        for n, (first, second) in enumerate(labels)
        if (n < 6 and first == 1 and second in (0, 2)) or (n >= 6 and second == 1)
    ]
    found = positions(axis, lambda atom: kept.get(atom, torch.arange(atom.size)))
    assert found.tolist() == expected
    assert kept_size(axis, {a: 1, b: 2}) == len(expected)
    assert positions(axis, everything).tolist() == list(range(14))
    where = {atom: path for atom, path in places(axis) if atom is b}
    assert coordinates(axis, where[b]).tolist() == [0, 1, 2, 0, 1, 2] + [-1] * 8


def traced(module: nn.Module, *shape: int) -> Network:
    return Network(module.eval(), name_inputs(module, torch.randn(2, *shape)))


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.sort(self.a(x), -1).values)


class Unknown(Sorted):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.linalg.matrix_exp(self.a(x)[:, :, None] * torch.ones(6))[:, :, 0])


@pytest.mark.parametrize(
    ("module", "operator", "reason"),
    [(Sorted, "sort", "position"), (Unknown, "linalg_matrix_exp", "no propagation rule")],
)
def test_what_is_not_known_pins_with_the_operator(
    module: type[nn.Module], operator: str, reason: str
) -> None:
    channels = channel_groups(traced(module(), 4).traced)
    assert channels.groups == ()
    pins = {p.parameter: p for p in channels.pins if (p.parameter, p.dim) == ("a.weight", 0)}
    assert any(why.operator == operator and reason in why.reason for why in pins["a.weight"].pins)
    assert operator in str(channels)


def test_inputs_and_outputs_are_pinned() -> None:
    channels = channel_groups(
        traced(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), 4).traced
    )
    assert [(g.name, g.size, g.kind) for g in channels.groups] == [("0", 6, "neuron")]
    assert {(s.parameter, s.dim) for s in channels.groups[0].slots} == {
        ("0.weight", 0),
        ("0.bias", 0),
        ("2.weight", 1),
    }
    reasons = {(p.parameter, p.dim): p.pins[0].operator for p in channels.pins}
    assert reasons == {("0.weight", 1): "input", ("2.weight", 0): "output", ("2.bias", 0): "output"}


class Fused(nn.Module):
    """Fused gate and up projection, as in many gated feed-forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def test_gate_and_up_leave_together() -> None:
    (group,) = channel_groups(traced(Fused(), 4).traced).groups
    assert group.size == 6
    assert [s.index().tolist() for s in group.slots if s.parameter == "up.weight"] == [
        [*range(6), *[-1] * 6],
        [*[-1] * 6, *range(6)],
    ]


def test_the_cost_grows_with_operators_not_with_channels() -> None:
    def count(width: int) -> int:
        before = Atom(1).number
        channel_groups(
            traced(nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)), 4).traced
        )
        return Atom(1).number - before

    assert count(8) == count(512)
