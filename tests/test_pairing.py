"""Which layers of two networks are paired, and values inside a module while it runs."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tinier
from networks import NETWORKS, build
from tinier.data.base import Arrays, Examples
from tinier.errors import InputError
from tinier.modules.observed import capturing
from tinier.network import Network
from tinier.recovery.hints import Hints
from tinier.recovery.loop import recover
from tinier.recovery.pairing import pair_layers


class Deep(nn.Module):
    """Blocks of a width."""

    def __init__(self, depth: int, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(12, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        found: Tensor = self.head(x)
        return found


def network(module: nn.Module) -> Network:
    return Network(
        module.eval(), {"x": torch.randn(2, 12, generator=torch.Generator().manual_seed(0))}
    )


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_network_and_its_copy_have_the_same_places(name: str) -> None:
    one = build(name)
    pairing = pair_layers(one, one.copy())
    assert len(pairing) and all(pair.student == pair.teacher for pair in pairing)
    assert {pair.why for pair in pairing} == {"same place"}
    assert all(pair.student in str(pairing) for pair in pairing)


def test_what_pruning_left_is_paired_with_the_same_places() -> None:
    teacher = build("residual_cnn")
    pruned = tinier.prune(teacher, keep=0.5)
    pairing = pair_layers(pruned.network, teacher)
    assert all(pair.student == pair.teacher for pair in pairing)
    assert any(pair.student_shape != pair.teacher_shape for pair in pairing)


def test_half_as_many_blocks_take_every_second() -> None:
    pairing = pair_layers(network(Deep(3)), network(Deep(6)))
    names = [(pair.student, pair.teacher) for pair in pairing]
    assert names == [(f"blocks.{i}", f"blocks.{2 * i + 1}") for i in range(3)]
    assert "depth 33% and 33%" in str(pairing)


def test_a_graph_without_modules_has_places_too() -> None:
    one = build("residual_cnn")
    graph = Network(one.traced.module, dict(one.example))
    pairing = pair_layers(graph, graph.copy())
    assert len(pairing) > 2
    with capturing(graph.module, [pairing[0].student]) as found:
        values = graph(graph.example)
    (value,) = found.values()
    assert tuple(value.shape) == pairing[0].student_shape
    again = graph(graph.example)
    assert all(torch.equal(a, b) for a, b in zip(values, again, strict=True)) and len(found) == 1


def test_given_pairs_are_checked() -> None:
    student, teacher = network(Deep(2)), network(Deep(6))
    pairing = pair_layers(student, teacher, {"blocks.1": "blocks.4"})
    assert [(p.student, p.teacher, p.why) for p in pairing] == [("blocks.1", "blocks.4", "given")]
    with pytest.raises(InputError, match=r"no part 'blocks\.9'; there are"):
        pair_layers(student, teacher, {"blocks.1": "blocks.9"})


def test_nothing_stays_behind() -> None:
    module = Deep(2)
    before = copy.deepcopy(module.state_dict())

    def run() -> None:
        with capturing(module, ["blocks.0"]) as found:
            module(torch.randn(3, 12)).sum().backward()
            assert found["blocks.0"].grad_fn is not None
            raise KeyError("as if something went wrong")

    with pytest.raises(KeyError):
        run()
    assert not any(part._forward_hooks for part in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("graph", [False, True])
def test_features_are_learned_with_the_student(graph: bool) -> None:
    teacher = network(Deep(4, 16, seed=1))
    module = Deep(2, 8, seed=2)
    student = network(module)
    if graph:
        student = Network(student.traced.module, student.example)
    x = torch.randn(128, 12, generator=torch.Generator().manual_seed(3))
    data = Examples(Arrays({"x": x}))

    def run(**more: Any) -> Any:
        return recover(student, teacher, data, losses=[Hints()], epochs=40, batch=32, **more)

    pairs = {"linear_1": "blocks.1"} if graph else None
    done = run(pairs=pairs)
    assert done.history[-1] < 0.6 * done.history[0]


def test_projections_go_on_with_a_killed_training(tmp_path: Any) -> None:
    teacher, student = network(Deep(4, 16, seed=1)), network(Deep(2, 8, seed=2))
    x = torch.randn(128, 12, generator=torch.Generator().manual_seed(3))
    data, count = Examples(Arrays({"x": x})), 0

    def stop(_: float, __: float) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt

    arguments: dict[str, Any] = {"losses": [Hints()], "epochs": 3, "batch": 32}
    whole = recover(student, teacher, data, **arguments)
    arguments |= {"checkpoint": tmp_path, "every": 1e-9}
    with pytest.raises(KeyboardInterrupt):
        recover(student, teacher, data, progress=stop, **arguments)
    done = recover(student, teacher, data, **arguments)
    assert whole.history == done.history
    for one, two in zip(
        whole.network.module.parameters(), done.network.module.parameters(), strict=True
    ):
        assert torch.equal(one, two)
