"""Networks that are odd or wrong: pruned right, or refused with a reason, and left as they were."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import build
from test_tracing import assert_unchanged, state
from tinier.criteria.random import Random
from tinier.edits.base import Plan
from tinier.edits.proof import NOT_PROVED
from tinier.edits.rewrite import sliced_graph
from tinier.edits.slice import Slice, prove
from tinier.errors import InputError, ModelError, RefusedError
from tinier.graph.groups import channel_groups
from tinier.graph.macs import macs
from tinier.graph.masked import masked_outputs
from tinier.graph.single import HALF, recast_inputs, recast_traced
from tinier.methods.channel_pruning import ChannelPruning
from tinier.network import Network
from tinier.sources.load import load

SIZES: dict[str, Any] = {"keep": 0.6, "round_to": 1}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.b, self.c = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(self.norm(self.a(x)))))


def untyped(value: Any) -> Any:
    """``nn.Module`` attributes are tensors or modules to a type checker."""
    return value


def small(kind: Callable[[], nn.Module] = Small, dtype: torch.dtype = torch.float32) -> Network:
    torch.manual_seed(0)
    return load(kind().to(dtype), torch.randn(3, 6).to(dtype))


def pruned(original: Network, **options: Any) -> tuple[Plan, Network]:
    plan = ChannelPruning(**(SIZES | options)).plan(original)
    return plan, plan.apply(original)


def test_frozen_parameters_stay_frozen() -> None:
    original = small()
    module = untyped(original.module)
    module.a.weight.requires_grad_(False)
    module.norm.requires_grad_(False)
    module.c.weight.grad = torch.ones_like(module.c.weight)
    before = state(module)
    _, smaller = pruned(original, normalised=True)
    assert_unchanged(before, module)
    assert {n: p.requires_grad for n, p in smaller.module.named_parameters()} == before["trainable"]
    assert untyped(smaller.module).a.weight.shape[0] < 16
    assert all(p.grad is None for p in smaller.module.parameters())


def test_a_wholly_frozen_network_is_pruned() -> None:
    original = small()
    original.module.requires_grad_(False)
    _, smaller = pruned(original)
    assert not any(p.requires_grad for p in smaller.module.parameters())


class Tied(nn.Module):
    """The same table embeds and predicts, and one bias serves two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)
        self.d = nn.Linear(8, 12)
        self.out.weight = self.words.weight
        self.d.bias = self.a.bias

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return self.out(x + self.b(F.relu(self.a(x)) + self.d(x)))


def test_tied_parameters_stay_tied() -> None:
    torch.manual_seed(0)
    original = load(Tied(), torch.randint(0, 11, (2, 5)))
    plan = ChannelPruning(keep=0.5, round_to=1, of="parameters", normalised=True).plan(original)
    module = untyped(plan.apply(original).module)
    assert module.out.weight is module.words.weight and module.d.bias is module.a.bias
    assert module.a.weight.shape[0] == len(module.a.bias) < 12
    names = [name for name, _ in module.named_parameters()]
    assert names == [name for name, _ in original.module.named_parameters()]


def flat() -> nn.Module:
    """All parameters are views of one buffer, as some optimizers and data-parallel wrappers make them."""
    module = Small()
    whole = torch.randn(sum(p.numel() for p in module.parameters())) * 0.3
    offset = 0
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                piece = whole[offset : offset + parameter.numel()].view(parameter.shape)
                part._parameters[name] = nn.Parameter(piece)
                offset += parameter.numel()
    return module


def test_parameters_that_share_storage_are_cut_as_copies() -> None:
    original = small(flat)
    assert len({p.untyped_storage().data_ptr() for p in original.module.parameters()}) == 1
    before = state(original.module)
    plan, smaller = pruned(original)
    assert prove(original, smaller, plan, seed=5) <= 1e-5
    storages = [p.untyped_storage() for p in smaller.module.parameters()]
    assert len({s.data_ptr() for s in storages}) == len(storages)
    assert all(
        s.nbytes() == p.numel() * 4
        for s, p in zip(storages, smaller.module.parameters(), strict=True)
    )
    with torch.no_grad():
        for p in smaller.module.parameters():
            p.zero_()
    assert_unchanged(before, original.module)


class Views(nn.Module):
    """Two parameters that overlap: the second layer's weight is the first's, seen the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(12, 6) * 0.4)
        self.down = nn.Parameter(self.up.data.T)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.up)), self.down)


def test_parameters_that_overlap_are_cut_as_copies() -> None:
    original = small(Views)
    plan, smaller = pruned(original)
    assert prove(original, smaller, plan, seed=3) <= 1e-5
    module = untyped(smaller.module)
    assert torch.equal(module.up, module.down.T) and len(module.up) < 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["small", "residual_cnn", "vit"])
def test_other_precisions_are_proved_to_the_same_tolerance(name: str, dtype: torch.dtype) -> None:
    network = build("mlp" if name == "small" else name)
    example = {key: value.to(dtype) for key, value in network.example.items()}
    original = Network(network.module.to(dtype), example, name)
    before = state(original.module)
    plan, smaller = pruned(original)
    assert_unchanged(before, original.module)
    assert {p.dtype for p in smaller.module.parameters()} == {dtype}
    assert smaller(original.example)[0].dtype == dtype
    assert prove(original, smaller, plan, seed=4) <= 1e-5


def test_the_proof_in_half_precision_finds_a_small_mistake() -> None:
    """One part in a hundred, which half precision alone would hide."""
    original = small(dtype=torch.bfloat16)
    plan, smaller = pruned(original)
    with torch.no_grad():
        untyped(smaller.module).b.weight[0] *= 1.01
    with pytest.raises(RefusedError, match="masked reference"):
        prove(original, smaller, plan)


def test_the_float32_copy_computes_what_the_half_network_means() -> None:
    original = small(dtype=torch.bfloat16)
    traced, channels = recast_traced(
        original.traced, channel_groups(original.traced), HALF, torch.float32
    )
    (found,) = masked_outputs(
        traced, channels, {}, recast_inputs(original.example, HALF, torch.float32)
    )
    wanted = copy.deepcopy(original.module).float()(original.example["x"].float())
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["mlp", "residual_cnn", "vit", "encoder", "causal_lm"])
def test_on_the_meta_device_the_plan_is_the_same_and_the_proof_is_said_to_be_missing(
    name: str,
) -> None:
    real = build(name)
    method = ChannelPruning(keep=0.5, round_to=1, criterion=Random(3))
    example = {key: value.to("meta") for key, value in real.example.items()}
    meta = load(copy.deepcopy(real.module).to("meta"), example)
    plan = method.plan(meta)
    assert plan == method.plan(real)
    smaller = plan.apply(meta)
    assert all(p.is_meta for p in smaller.module.parameters())
    assert NOT_PROVED in smaller.notes
    proved = plan.apply(real)
    proof, *others = proved.notes
    assert proof.startswith("equals its masked reference to")
    assert [note for note in smaller.notes if note != NOT_PROVED] == []
    # Parts of a class are replaced by what they compute, which has no values here: then the graph stands for the whole.
    whole = torch.fx.GraphModule if others else type(proved.module)
    assert type(smaller.module).__name__ == whole.__name__
    assert bool(others) == (name == "vit")
    shapes = {n: p.shape for n, p in smaller.module.named_parameters()}
    assert shapes == {n: p.shape for n, p in proved.module.named_parameters()}
    assert sum(macs(smaller.traced).values()) == sum(macs(proved.traced).values())


def test_on_the_meta_device_scores_of_weights_are_refused() -> None:
    with torch.device("meta"):
        module, x = Small(), torch.randn(3, 6)
    with pytest.raises(RefusedError, match="meta device"):
        ChannelPruning().plan(load(module, x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    original = small()
    with torch.no_grad():
        untyped(original.module).b.weight[3, 2] = value
    before = {n: t.clone() for n, t in original.module.state_dict().items()}
    with pytest.raises(RefusedError, match="not finite"):
        pruned(original)
    after = original.module.state_dict()
    assert all(torch.equal(before[n].nan_to_num(7), after[n].nan_to_num(7)) for n in before)


def test_parameters_on_several_devices_are_refused() -> None:
    module = Small()
    module.b.to("meta")
    with pytest.raises(ModelError, match="put all of them on one device"):
        load(module, torch.randn(2, 6))


def test_a_fixed_batch_is_noted() -> None:
    class Fixed(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(3, 6))

    network = small(Fixed)
    assert not network.traced.batched
    assert any("batch size is fixed at 3" in note for note in network.notes)


def test_the_module_is_unchanged_after_a_failure() -> None:
    original = small()
    module = original.module.train()
    untyped(module).norm.eval()
    untyped(module).a.register_forward_hook(lambda *_: None)
    before = state(module)
    plan = ChannelPruning(**SIZES).plan(original)
    edit = plan.edits[0]
    assert isinstance(edit, Slice)
    wrong = Slice(edit.group, edit.size, edit.kept[:-1], edit.cuts)
    with pytest.raises(RefusedError, match="cuts are not those"):
        Plan((wrong,)).apply(original)
    with pytest.raises(RefusedError, match="least possible"):
        pruned(original, keep=0.001)
    with pytest.raises(InputError):
        pruned(original, keep=2.0)
    with pytest.raises(ModelError, match="does not run on the example"):
        load(module, torch.randn(2, 7))
    assert_unchanged(before, module)


def test_the_users_example_is_unchanged() -> None:
    class Writes(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.add_(1))

    example = torch.zeros(3, 6)
    pruned(load(Writes(), example))
    assert not example.any()


class Cancelling(nn.Module):
    """The outputs are the small differences of large numbers: float32 has few digits left for them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu())
        return (y + 300.0) - 300.0


def test_rounding_is_told_from_a_wrong_cut_by_more_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = Network(Cancelling(), {"x": torch.randn(2, 16)})
    plan = ChannelPruning(keep=0.5, round_to=1).plan(network)
    monkeypatch.setattr("tinier.edits.proof.TOLERANCE", 1e-9)  # which float32 cannot meet
    plan.apply(network)
    wrong = torch.tensor(1e-5)

    def changed(*arguments: Any) -> Any:
        graph = sliced_graph(*arguments)
        with torch.no_grad():
            graph.get_parameter("second.bias").add_(wrong)
        return graph

    monkeypatch.setattr("tinier.edits.slice.sliced_graph", changed)
    with pytest.raises(RefusedError, match="differs from the masked reference"):
        plan.apply(network)
