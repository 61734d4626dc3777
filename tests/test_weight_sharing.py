"""Weight sharing: the edit and the method keep their laws on every network of the conformance set."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from networks import NETWORKS, build
from tinier.edits.base import Plan
from tinier.edits.mask import Mask
from tinier.edits.share import Share
from tinier.errors import InputError, RefusedError
from tinier.graph.weights import tables, weights
from tinier.methods.weight_pruning import WeightPruning
from tinier.methods.weight_sharing import RULES, WeightSharing
from tinier.modules.masked import masks_of, plain_name
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.tensors.clustering import codebook


@cache
def built(name: str) -> Network:
    return build(name)


def state(network: Network) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.module.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("name", NETWORKS)
class TestEveryNetwork:
    def test_laws(self, name: str) -> None:
        network = built(name)
        before = state(network)
        plan = WeightSharing(bits=3).plan(network)
        assert same(before, state(network))  # neither planning …
        shared = plan.apply(network)
        assert same(before, state(network))  # … nor applying changes it
        assert type(shared.module) is type(network.module)
        assert same(state(shared), state(plan.apply(network)))
        assert Plan.from_json(plan.to_json()) == plan
        assert same(state(shared), state(plan.apply(shared)))  # what is shared is its own nearest
        assert not WeightSharing(bits=3).plan(shared).edits
        parameters = dict(shared.module.named_parameters(remove_duplicate=False))
        for one in (*weights(network.traced), *tables(network.traced)):
            assert len(parameters[one].unique()) <= 8, one
        for out in shared(shared.example):
            assert bool(out.isfinite().all()) or not out.is_floating_point()

    def test_enough_values_change_nothing(self, name: str) -> None:
        network = copy.deepcopy(built(name).module)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_((parameter * 20).round().clamp(-40, 40) / 20)
        few = replace(built(name), module=network)
        assert WeightSharing(bits=8).plan(few) == Plan()


@pytest.mark.parametrize("rule", RULES)
def test_rules_on_a_pruned_network(rule: str) -> None:
    pruned = WeightPruning(keep=0.4).plan(built("residual_cnn")).apply(built("residual_cnn"))
    masks = masks_of(pruned.module)
    shared = WeightSharing(bits=4, rule=rule).plan(pruned).apply(pruned)
    plain = {plain_name(n): p for n, p in shared.module.named_parameters()}
    tensors = dict(shared.traced.module.named_parameters())
    assert masks_of(shared.module).keys() == masks.keys()
    for name, mask in masks.items():
        assert bool((tensors[name][~mask] == 0).all())
        assert len(tensors[name].unique()) <= 16
        assert 0.0 in tensors[name].unique().tolist()
        assert name in plain


def error(network: Network, shared: Network) -> float:
    one, two = dict(network.module.named_parameters()), dict(shared.module.named_parameters())
    return sum(float((one[n] - two[n]).detach().square().sum()) for n in one)


def test_k_means_has_the_least_error() -> None:
    network = built("mlp")
    errors = {
        rule: error(network, WeightSharing(bits=3, rule=rule).plan(network).apply(network))
        for rule in RULES
    }
    assert errors["kmeans"] < min(errors["median"], errors["minmax"])
    finer = WeightSharing(bits=5).plan(network).apply(network)
    assert error(network, finer) < errors["kmeans"] / 4


def test_importance_is_that_of_the_statistics() -> None:
    network = built("mlp")
    name, parameter = next((n, p) for n, p in network.module.named_parameters() if p.ndim == 2)
    squares = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)).double() ** 8
    statistics = Statistics({}, 1, frozenset({"squares"}), squares={name: squares})
    edits = {e.tensor: e for e in WeightSharing(3).plan(network, statistics).edits}  # type: ignore[attr-defined]
    wanted, _ = codebook(parameter, 8, squares + 0.01 * squares.mean())
    assert edits[name].centres == tuple(wanted.double().tolist())  # type: ignore[attr-defined]
    plain = {e.tensor: e for e in WeightSharing(3).plan(network).edits}  # type: ignore[attr-defined]
    assert edits[name] != plain[name]
    assert {n: e for n, e in edits.items() if n != name} == {
        n: e for n, e in plain.items() if n != name
    }


def test_exclude() -> None:
    network = built("mlp")
    every = {e.tensor for e in WeightSharing().plan(network).edits}  # type: ignore[attr-defined]
    some = {e.tensor for e in WeightSharing(exclude=("fc1",)).plan(network).edits}  # type: ignore[attr-defined]
    assert every - some == {"fc1.weight"}
    with pytest.raises(InputError, match="nothing is called fc9"):
        WeightSharing(exclude=("fc9",)).plan(network)
    with pytest.raises(RefusedError, match="leaves none"):
        WeightSharing(exclude=("fc*",)).plan(network)


class Tied(nn.Module):
    """An embedding whose table is the weight of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


def test_tied_tensors_are_shared_once_and_stay_tied() -> None:
    network = Network(Tied().eval(), {"x": torch.randint(0, 20, (2, 3))})
    plan = WeightSharing(bits=2).plan(network)
    assert len(plan.edits) == 1
    shared = plan.apply(network).module
    assert isinstance(shared, Tied) and shared.head.weight is shared.table.weight
    assert len(shared.head.weight.unique()) == 4


def test_the_edit_takes_the_nearest_centre() -> None:
    module = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[-5.0, 0.4, 0.5, 0.6]]))
    network = Network(module, {"input": torch.ones(2, 4)})
    edit = Share("weight", (1.0, 0.0, -1.0))
    assert edit.row() == ("weight", "3 values, 2 bits, -1 … 1")
    found = Plan((edit,)).apply(network).module
    assert found.state_dict()["weight"].tolist() == [
        [-1.0, 0.0, 0.0, 1.0]
    ]  # half-way the lower one
    both = Plan((Mask.of("weight", torch.tensor([[True, True, False, False]])), edit))
    again = Plan.from_json(both.to_json()).apply(network)
    assert again.traced.module.get_parameter("weight").tolist() == [[-1, 0, 0, 0]]


def test_refusals() -> None:
    network = built("mlp")
    for edit, what in (
        (Share("nothing", (1.0,)), "no such parameter"),
        (Share("fc1.weight", ()), "0 centres"),
        (Share("fc1.weight", (float("nan"),)), "1 centres"),
        (Share("fc1.weight", tuple(map(float, range(257)))), "257 centres"),
    ):
        with pytest.raises(RefusedError, match=what):
            Plan((edit,)).apply(network)
    for wrong in ({"bits": 0}, {"bits": 9}, {"bits": True}, {"bits": 1, "rule": "median"}):
        with pytest.raises(InputError, match="are possible"):
            WeightSharing(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="kmeans, median, minmax are known"):
        WeightSharing(rule="huffman")
    broken = copy.deepcopy(network.module)
    with torch.no_grad():
        next(iter(broken.parameters()))[0, 0] = float("nan")
    with pytest.raises(RefusedError, match=r"fc1\.weight: .*finite"):
        WeightSharing().plan(replace(network, module=broken))
