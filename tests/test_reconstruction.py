"""Training of single stretches: how much of the data is kept, and steps that are taken in parts."""

import pytest
import torch
from torch import Tensor, fx, nn

from test_quantization import Inverted, own
from tinier.edits.assign import Fold
from tinier.edits.base import Plan
from tinier.edits.fake_quantize import trainable
from tinier.graph.fold import fold
from tinier.methods.quantization import Quantization
from tinier.modules.fake_quantize import WeightQuantizer
from tinier.network import Network
from tinier.recovery.reconstruction import Part, Training
from tinier.recovery.rounding import learn_rounding
from tinier.recovery.segments import Cuts, Runner
from tinier.recovery.soft_weights import SoftWeight
from tinier.statistics import collect


class Tower(nn.Module):
    """Residual blocks of inverted bottlenecks, one after the other, all of the same shape."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3, 12, 1), nn.ReLU6(), nn.Conv2d(12, 12, 3, 1, 1, groups=12), nn.ReLU6(), nn.Conv2d(12, 3, 1)
            )
            for _ in range(depth)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def planned(network: Network, data: list[dict[str, Tensor]]) -> tuple[Network, Plan]:
    network = Plan((Fold(),)).apply(network)
    return network, Quantization(bits=3).plan(network, collect(network, data))


def tower(depth: int) -> tuple[Network, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    data = [{"x": torch.randn(64, 3, 8, 8)}]
    return Network(Tower(depth).eval(), {"x": data[0]["x"][:2]}), data


@pytest.mark.parametrize("blocks", [True, False])
def test_what_is_kept_does_not_grow_with_the_depth(blocks: bool) -> None:
    sizes = []
    for depth in (2, 6):
        network, data = tower(depth)
        folded, plan = planned(network, data)
        learned = learn_rounding(folded, plan, data, blocks=blocks, steps=1)
        assert len(learned.errors) == depth * (1 if blocks else 3)
        sizes.append(learned.cached)
    assert sizes[0] == sizes[1]
    # A block reads 3 channels of 64 positions of both networks, and gives them.
    images = 64 * 3 * 64 * 4
    if blocks:
        assert sizes[0] == 3 * images
    else:  # the middle layer's inputs and outputs have 12 channels
        assert sizes[0] == 2 * images + 2 * 4 * images


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("memory", [400_000, 100_000])
def test_what_is_kept_is_bounded(blocks: bool, memory: int) -> None:
    network, data = tower(3)
    folded, plan = planned(network, data)
    learned = learn_rounding(folded, plan, data, blocks=blocks, steps=1, memory=memory)
    assert 0 < learned.cached <= memory
    assert any("rounding was learned on" in note for note in learned.notes) == (memory == 100_000)


def test_values_that_were_read_last_are_let_go() -> None:
    network, data = own(Inverted, 3, 12, 12)
    module = fold(network.traced.module)
    nodes = [n for n in module.graph.nodes if n.op == "call_function"]
    (x,) = module.graph.find_nodes(op="placeholder")
    runner = Runner(module)
    whole = runner.run_stretch(nodes, {x: data[0]["x"]})
    found = runner.run_stretch(nodes, {x: data[0]["x"]}, nodes[-1:])
    assert not set(nodes[:-1]) & set(found)
    assert torch.equal(found[nodes[-1]], whole[nodes[-1]])


def stretch(module: fx.GraphModule) -> tuple[list[SoftWeight], list[Part], Cuts]:
    calls = module.graph.find_nodes(op="call_module")
    owns = {n: module.get_submodule(str(n.target)) for n in calls}
    weights = [n for n in calls if isinstance(owns[n], WeightQuantizer)]
    soft = [SoftWeight.of(module, n, owns[n], False) for n in weights]
    (x,) = module.graph.find_nodes(op="placeholder")
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(24, 3, 8, 8, generator=generator)
    targets = [torch.randn(24, 3, 8, 8, generator=generator)]
    cuts = Cuts(module, weights)
    return (
        soft,
        [Part({x: inputs[:9]}, [targets[0][:9]]), Part({x: inputs[9:]}, [targets[0][9:]])],
        cuts,
    )


def test_a_step_in_parts_is_the_same_step() -> None:
    """Nothing is dropped, so that masks do not differ: only the order of sums does."""
    network, data = tower(1)
    folded, plan = planned(network, data)
    found = []
    for memory in (2**30, 1):
        module = trainable(folded, plan).module
        assert isinstance(module, fx.GraphModule)
        module.requires_grad_(False)
        weights, parts, cuts = stretch(module)
        (segment,) = cuts.segments(4)
        torch.manual_seed(0)
        training = Training(steps=1, batch=12, drop=0.0, memory=memory, free=True)
        assert len(training._parts(segment, parts[1].rows(slice(0, 12)))) == (
            1 if memory > 1 else 12
        )
        training.train(module, segment, parts, weights, [], 1.0)
        found.append([weight.v.grad for weight in weights])
    for whole, apart in zip(*found, strict=True):
        assert whole is not None
        assert apart is not None
        assert float(whole.abs().max()) > 0
        assert torch.allclose(whole, apart, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))


def test_batches_are_joined_from_small_parts() -> None:
    network, data = tower(1)
    folded, plan = planned(network, data)
    module = trainable(folded, plan).module
    assert isinstance(module, fx.GraphModule)
    _, parts, _ = stretch(module)
    small = [parts[0].rows(slice(n, n + 3)) for n in range(0, 9, 3)]
    training = Training(steps=1, batch=8, drop=0.0, memory=1, free=True)
    batch = training._batch(small)
    assert batch.size == 8
    (given,), (whole,) = batch.inputs.values(), parts[0].inputs.values()
    for row, target in zip(given, batch.targets[0], strict=True):
        (place,) = [n for n in range(9) if torch.equal(whole[n], row)]
        assert torch.equal(parts[0].targets[0][place], target)
