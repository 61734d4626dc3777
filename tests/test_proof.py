"""What the proof of a cut rests on besides the masked reference: graphs that are one, tensors that are cut once, modes that stay."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tinier.edits.proof import Reference
from tinier.edits.slice import Slice
from tinier.graph.fast import record
from tinier.graph.groups import channel_groups
from tinier.graph.same import same_graph
from tinier.graph.trace import trace
from tinier.methods.channel_pruning import ChannelPruning
from tinier.network import Network


class Scaled(nn.Module):
    """Two layers and a factor that no parameter shows."""

    def __init__(self, factor: float = 2.0, hidden: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.factor, self.first, self.second = (
            factor,
            nn.Linear(8, hidden),
            nn.Linear(hidden, 4),
        )
        self.register_buffer("shift", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu() * self.factor) + self.shift


def example() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 8, generator=torch.Generator().manual_seed(1))}


def test_a_graph_is_the_same_as_its_copy() -> None:
    traced = trace(Scaled(), example())
    assert same_graph(traced.module, copy.deepcopy(traced.module))


@pytest.mark.parametrize("other", ["factor", "whole factor", "width", "buffer", "operator", "more"])
def test_whatever_differs_makes_another_graph(other: str) -> None:
    changed = {
        "factor": Scaled(2.5),
        "whole factor": Scaled(2),
        "width": Scaled(hidden=12),
    }.get(other, Scaled())
    with torch.no_grad():
        if other == "buffer":
            changed.get_buffer("shift")[0] = 1
    second = trace(changed, example()).module
    if other == "operator":
        node = next(n for n in second.graph.nodes if "relu" in n.name)
        node.target = torch.ops.aten.tanh.default
    if other == "more":
        output = next(iter(second.graph.find_nodes(op="output")))
        with second.graph.inserting_before(output):
            second.graph.call_function(torch.ops.aten.neg.default, (output.args[0][0],))
    assert not same_graph(trace(Scaled(), example()).module, second)


def test_the_class_is_compared_with_the_reference_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that computes something else in eager mode than while it is traced is not taken."""

    class TwoFaced(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            result = super().forward(x)
            eager = not torch.compiler.is_exporting() and self.first.out_features < 16
            return result + 1 if eager else result

    network = Network(TwoFaced().eval(), example())
    pruned = ChannelPruning(keep=0.5, round_to=1).plan(network).apply(network)
    assert not isinstance(pruned.module, TwoFaced)
    kept = Network(Scaled().eval(), example())
    assert isinstance(ChannelPruning(keep=0.5).plan(kept).apply(kept).module, Scaled)


def test_the_difference_to_the_reference_shows_a_wrong_weight() -> None:
    network = Network(Scaled().eval(), example())
    plan = ChannelPruning(keep=0.5, round_to=1).plan(network)
    pruned = plan.apply(network)
    channels = channel_groups(network.traced)
    kept = {}
    for edit in plan.edits:
        assert isinstance(edit, Slice)
        group = channels.group(edit.group)
        assert group is not None
        kept[group.atom] = torch.tensor(edit.kept)
    reference = Reference(network, channels, kept, seed=4)
    assert reference.gap(pruned) <= 1e-6
    with torch.no_grad():
        pruned.module.get_parameter("second.bias")[0] += 0.1
    assert reference.gap(pruned) > 1e-3


def test_the_smaller_network_shares_no_memory_with_the_original() -> None:
    module = Scaled().eval()
    network = Network(module, example())
    pruned = ChannelPruning(keep=0.5, round_to=1).plan(network).apply(network)
    own = {t.untyped_storage().data_ptr() for t in module.state_dict().values()}
    assert own.isdisjoint(
        t.untyped_storage().data_ptr() for t in pruned.module.state_dict().values()
    )


def test_each_part_keeps_its_mode() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    module.train()
    module[1].eval()  # frozen, as in fine-tuning
    network = Network(module, {"input": torch.randn(2, 8)})
    pruned = ChannelPruning(keep=0.5, round_to=1).plan(network).apply(network)
    assert [part.training for part in pruned.module.children()] == [True, False, True, True]


def test_spectral_norms_stay_the_class_in_training_mode() -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 16))
    network = Network(
        nn.Sequential(layer, nn.ReLU(), nn.Linear(16, 4)), {"input": torch.randn(2, 8)}
    )
    assert network.module.training
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    pruned = ChannelPruning(keep=0.5, round_to=1).plan(network).apply(network)
    assert isinstance(pruned.module, nn.Sequential)
    for name, tensor in network.module.state_dict().items():
        assert torch.equal(before[name], tensor)


class OneMore(nn.Module):
    """A number that follows the batch, but not in proportion: 2 n + 1."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x, x[:1]]).reshape(2 * len(x) + 1, 4)


class Rounded(nn.Module):
    """A number that follows the batch by no line: n rounded down to even."""

    def forward(self, x: Tensor) -> Tensor:
        return x[: len(x) // 2 * 2] * 2.0


def _batch(tensor: Tensor) -> range:
    return range(1)


def test_a_batch_that_is_followed_out_of_proportion_is_recorded_a_third_time() -> None:
    graph, _ = record(OneMore().eval(), {"x": torch.randn(2, 4)}, _batch)
    for size in (2, 3, 7):
        x = torch.randn(size, 4)
        assert torch.equal(graph(x=x)[0], OneMore()(x))
    with pytest.raises(Exception, match=r"proportion|follows"):
        record(Rounded().eval(), {"x": torch.randn(2, 4)}, _batch)


class Rooted(nn.Module):
    """Takes roots, and computes something else in eager mode once it is narrow."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.sqrt()).relu()
        if not torch.compiler.is_compiling():
            h = h * (h.shape[-1] / 16)
        return self.second(h)


def test_roots_are_proved_on_numbers_that_have_one() -> None:
    network = Network(Rooted().eval(), {"x": torch.rand(2, 8)})
    pruned = ChannelPruning(keep=0.5, round_to=1).plan(network).apply(network)
    assert not isinstance(pruned.module, Rooted)
