"""Masks: their maths against brute force, and networks whose weights are held at zero while they train."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import tinier
from networks import NETWORKS, build
from tinier.edits.base import Plan
from tinier.edits.mask import Mask, sparsity, unmask
from tinier.edits.slice import Slice
from tinier.errors import InputError, RefusedError
from tinier.graph.groups import channel_groups
from tinier.graph.trace import call
from tinier.graph.weights import weights
from tinier.methods.channel_pruning import ChannelPruning
from tinier.methods.weight_pruning import WeightPruning
from tinier.modules.masked import masks_of
from tinier.network import Network
from tinier.report.folder import save_weights
from tinier.targets.onnx_file import write_onnx
from tinier.tensors.masks import (
    blocks,
    largest,
    largest_of_all,
    largest_of_rows,
    n_of_m,
    of_blocks,
    pack,
    unpack,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masked_plan(network: Network, share: float = 0.5, seed: int = 0) -> Plan:
    """Random masks of every parameter of two or more dimensions."""
    generator = torch.Generator().manual_seed(seed)
    return Plan(
        tuple(
            Mask.of(name, torch.rand(p.shape, generator=generator) < share)
            for name, p in network.module.named_parameters()
            if p.ndim > 1
        )
    )


def zeroed(network: Network, plan: Plan) -> Network:
    """The oracle: the user's own module with zeros written into its weights."""
    module = copy.deepcopy(network.module)
    named = dict(module.named_parameters())
    with torch.no_grad():
        for edit in plan.edits:
            assert isinstance(edit, Mask)
            named[edit.parameter].mul_(edit.mask)
    return replace(network, module=module)


def close(one: tuple[Tensor, ...], two: tuple[Tensor, ...], tolerance: float = 1e-6) -> None:
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class TestMaths:
    @pytest.mark.parametrize("count", [0, 1, 7, 12])
    def test_largest(self, count: int) -> None:
        scores = random(3, 4)
        mask = largest(scores, count)
        assert int(mask.sum()) == count
        if 0 < count < 12:
            assert scores[mask].min() > scores[~mask].max()

    def test_ties_go_to_the_first(self) -> None:
        assert largest(torch.zeros(2, 3), 4).tolist() == [[True] * 3, [True, False, False]]
        assert n_of_m(torch.zeros(1, 8), 2, 4).flatten().tolist() == [True, True, False, False] * 2
        assert largest_of_rows(torch.ones(2, 4), 0.5).tolist() == [[True, True, False, False]] * 2

    def test_together_is_one_sort(self) -> None:
        parts = [random(4, 5), random(3, 2, seed=1) * 10]
        masks = largest_of_all(parts, 9, [0, 0])
        whole = largest(torch.cat([p.flatten() for p in parts]), 9)
        assert torch.equal(torch.cat([m.flatten() for m in masks]), whole)

    def test_each_tensor_keeps_its_least(self) -> None:
        parts = [random(10).abs() * 1e-6, random(10, seed=1).abs() + 1]
        masks = largest_of_all(parts, 8, [3, 0])
        assert [int(m.sum()) for m in masks] == [3, 5]
        assert torch.equal(masks[0], largest(parts[0], 3))

    def test_rows(self) -> None:
        scores = random(5, 8, 1, 1)
        mask = largest_of_rows(scores, 0.25)
        assert mask.flatten(1).sum(1).tolist() == [2] * 5
        for row, kept in zip(scores.flatten(1), mask.flatten(1), strict=True):
            assert set(row.topk(2).indices.tolist()) == set(kept.nonzero().flatten().tolist())

    @pytest.mark.parametrize(("n", "m", "dim"), [(2, 4, 1), (1, 2, 0), (3, 3, 1), (1, 4, 1)])
    def test_n_of_m_is_the_best_pattern(self, n: int, m: int, dim: int) -> None:
        scores = random(4, 12, 2).abs()
        mask = n_of_m(scores, n, m, dim)
        moved, kept = scores.movedim(dim, -1), mask.movedim(dim, -1)
        for values, chosen in zip(moved.reshape(-1, m), kept.reshape(-1, m), strict=True):
            best = max(
                itertools.combinations(range(m), n), key=lambda c: float(values[list(c)].sum())
            )
            assert set(best) == set(chosen.nonzero().flatten().tolist())

    @pytest.mark.parametrize("shape", [(4, 6), (5, 7), (3, 2, 2, 2)])
    def test_blocks(self, shape: tuple[int, ...]) -> None:
        scores = random(*shape)
        means = blocks(scores, 2, 3)
        matrix = scores.flatten(1)
        for i, j in itertools.product(range(means.shape[0]), range(means.shape[1])):
            block = matrix[2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
            torch.testing.assert_close(float(means[i, j]), float(block.double().mean()))
        mask = of_blocks(means > means.median(), 2, 3, shape)
        assert mask.shape == shape
        assert torch.equal(
            mask.flatten(1)[::2, ::3], (means > means.median())
        )  # a corner of each block

    @pytest.mark.parametrize("shape", [(), (1,), (8,), (3, 5), (2, 3, 4)])
    def test_packing_round_trips(self, shape: tuple[int, ...]) -> None:
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
        assert torch.equal(unpack(pack(mask), shape), mask)

    def test_packing_is_checked(self) -> None:
        with pytest.raises(ValueError, match="24 bits"):
            unpack(pack(torch.ones(8, dtype=torch.bool)), (4, 6))
        with pytest.raises(ValueError, match=r"base64|padding"):
            unpack("%%%", (8,))


class TestMask:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_masked_weights_are_zeros(self, name: str) -> None:
        network = build(name)
        before = copy.deepcopy(network.module.state_dict())
        plan = masked_plan(network)
        assert Plan.from_json(plan.to_json()) == plan
        masked, oracle = Plan.from_json(plan.to_json()).apply(network), zeroed(network, plan)
        close(masked(network.example), oracle(network.example))
        # So they are in the trace, under the names of the user's module.
        with torch.no_grad():
            traced = masked.traced
            close(call(traced.module, network.example), oracle(network.example), 1e-5)
        assert {n for n, _ in traced.module.named_parameters()} <= set(before)
        # Unmasked it is the user's class again, and what was made from it is untouched.
        plain = unmask(masked)
        assert type(plain.module) is type(network.module)
        assert plain.module.state_dict().keys() == before.keys()
        for key, value in oracle.module.state_dict().items():
            assert torch.equal(plain.module.state_dict()[key], value)
        assert masks_of(masked.module) and not masks_of(plain.module)
        assert all(torch.equal(before[k], v) for k, v in network.module.state_dict().items())

    @pytest.mark.parametrize(
        "name", ["mlp", "residual_cnn", "vit_stock_attention", "lstm", "causal_lm"]
    )
    def test_they_stay_zero_while_the_others_learn(self, name: str) -> None:
        network = build(name)
        plan = masked_plan(network, seed=3)
        masked = plan.apply(network)
        module = masked.module
        optimizer = torch.optim.AdamW(module.parameters(), 0.01, weight_decay=0.1)
        start = copy.deepcopy(module.state_dict())
        for _ in range(3):
            optimizer.zero_grad()
            torch.stack(
                [o.float().square().mean() for o in call(module, network.example)]
            ).sum().backward()
            optimizer.step()
        trained = copy.deepcopy(masked.copy())  # copies of trained masked networks can be made
        plain = dict(unmask(trained).module.named_parameters())
        moved = 0
        for edit in plan.edits:
            assert isinstance(edit, Mask)
            weight = plain[edit.parameter]
            assert not weight[~edit.mask].any()
            moved += int((weight[edit.mask] != 0).sum())
        assert moved == sum(int(e.mask.sum()) for e in plan.edits if isinstance(e, Mask))
        changed = [k for k, v in module.state_dict().items() if not torch.equal(v, start[k])]
        assert any("original" in key for key in changed)
        close(trained(network.example), masked(network.example))

    def test_tied_weights_are_masked_together(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Embedding(10, 6)
                self.head = nn.Linear(6, 10, bias=False)
                self.head.weight = self.embed.weight

            def forward(self, ids: Tensor) -> Tensor:
                return self.head(torch.tanh(self.embed(ids)))

        module = Tied().eval()
        network = Network(module, {"ids": torch.arange(6).view(2, 3)})
        mask = random(10, 6) > 0
        masked = Plan((Mask.of("head.weight", mask),)).apply(network)
        assert set(masks_of(masked.module)) == {"embed.weight", "head.weight"}
        assert len(list(masked.module.parameters())) == 1
        close(
            masked(network.example),
            zeroed(network, Plan((Mask.of("embed.weight", mask),)))(network.example),
        )
        plain = unmask(masked).module
        assert plain.get_parameter("embed.weight") is plain.get_parameter("head.weight")
        # An embedding's table is no weight to prune unless it is asked for by name.
        with pytest.raises(RefusedError, match="no weight to prune"):
            WeightPruning().plan(network)
        asked = WeightPruning(include=("head.weight",), keep=0.5).plan(network)
        assert [edit.row()[1] for edit in asked.edits] == ["60 → 30 (50.0%)"]

    def test_masks_add_up(self) -> None:
        network = build("mlp")
        one, two = random(24, 12) > 0, random(24, 12, seed=1) > 0
        first = Plan((Mask.of("fc1.weight", one),)).apply(network)
        both = Plan((Mask.of("fc1.weight", two),)).apply(first)
        assert torch.equal(masks_of(both.module)["fc1.weight"], one & two)
        assert torch.equal(masks_of(first.module)["fc1.weight"], one)
        at_once = Plan((Mask.of("fc1.weight", one), Mask.of("fc1.weight", two))).apply(network)
        assert torch.equal(masks_of(at_once.module)["fc1.weight"], one & two)
        # A parameter that is masked in a copy stays free in the original.
        more = Plan((Mask.of("fc1.bias", torch.zeros(24, dtype=torch.bool)),)).apply(first)
        assert set(masks_of(more.module)) == {"fc1.weight", "fc1.bias"}
        assert first.module.get_parameter("fc1.bias").abs().sum() > 0

    def test_keeping_everything_changes_nothing(self) -> None:
        network = build("mlp")
        plan = Plan((Mask.of("fc1.weight", torch.ones(24, 12, dtype=torch.bool)),))
        same = plan.apply(network)
        assert not masks_of(same.module)
        assert all(
            torch.equal(v, same.module.state_dict()[k])
            for k, v in network.module.state_dict().items()
        )
        assert not WeightPruning(keep=1).plan(network).edits

    def test_twice_gives_equal_bits(self) -> None:
        network = build("vit")
        plan = WeightPruning(keep=0.3, ranking="global").plan(network)
        assert plan == WeightPruning(keep=0.3, ranking="global").plan(network)
        one, two = plan.apply(network).module.state_dict(), plan.apply(network).module.state_dict()
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)

    def test_channels_can_leave_masked_networks(self) -> None:
        network = build("residual_cnn")
        masked = masked_plan(network, 0.7).apply(network)
        smaller = ChannelPruning(keep=0.6).plan(masked).apply(masked)
        assert sum(p.numel() for p in smaller.module.parameters()) < sum(
            p.numel() for p in masked.module.parameters()
        )
        for name, mask in masks_of(smaller.module).items():
            path, _, leaf = name.rpartition(".")
            weight = getattr(smaller.module.get_submodule(path), leaf)
            assert weight.shape == mask.shape and not weight[~mask].any()
        # Masking and cutting commute.
        group = channel_groups(network.traced).groups[1]
        cut = Plan((Slice.of(group, range(3)),))
        cut_first = cut.apply(zeroed(network, masked_plan(network, 0.7)))
        close(cut.apply(masked)(network.example), cut_first(network.example), 1e-5)

    def test_saved_and_rebuilt(self, tmp_path: Path) -> None:
        network = build("vit")
        plan = WeightPruning(pattern="2:4", exclude=("patches.weight",)).plan(network)
        masked = plan.apply(network)
        with torch.no_grad():
            for p in masked.module.parameters():
                p.add_(0.01)  # as if it had been trained
        save_weights(masked, tmp_path / "model.safetensors")
        again = Plan.from_json(plan.to_json()).apply(build("vit", seed=5))
        again.module.load_state_dict(load_file(tmp_path / "model.safetensors"))
        close(again(network.example), masked(network.example), 0)
        assert sparsity(again) == sparsity(masked)

    @pytest.mark.parametrize("name", ["residual_cnn", "lstm"])
    def test_exported_as_plain_zeros(self, name: str, tmp_path: Path) -> None:
        network = build(name)
        masked = masked_plan(network).apply(network)
        file = tmp_path / "model.onnx"
        write_onnx(masked, file)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        found = session.run(None, {"x": network.example["x"].numpy()})
        torch.testing.assert_close(
            torch.from_numpy(found[0]), masked(network.example)[0], rtol=1e-4, atol=1e-5
        )

    def test_refusals_name_the_parameter(self) -> None:
        network = build("mlp")
        with pytest.raises(RefusedError, match=r"fc9.weight: mlp has no such parameter"):
            Plan((Mask.of("fc9.weight", torch.zeros(2, 2, dtype=torch.bool)),)).apply(network)
        with pytest.raises(RefusedError, match=r"fc1.weight: it has shape \(24, 12\)"):
            Plan((Mask.of("fc1.weight", torch.zeros(2, 2, dtype=torch.bool)),)).apply(network)
        normed = copy.deepcopy(network.module)
        nn.utils.parametrizations.weight_norm(normed.get_submodule("fc1"))
        with pytest.raises(RefusedError, match=r"no such parameter|another parametrization"):
            Plan((Mask.of("fc1.weight", torch.zeros(24, 12, dtype=torch.bool)),)).apply(
                replace(network, module=normed)
            )


class TestWeightPruning:
    def test_magnitude_local_is_torch_prune(self) -> None:
        network = build("mlp")
        plan = WeightPruning(keep=0.3).plan(network)
        for edit in plan.edits:
            assert isinstance(edit, Mask)
            layer: Any = copy.deepcopy(
                network.module.get_submodule(edit.parameter.removesuffix(".weight"))
            )
            nn.utils.prune.l1_unstructured(layer, "weight", 0.7)
            assert torch.equal(edit.mask, layer.weight_mask.bool())

    def test_magnitude_global_is_torch_prune(self) -> None:
        network = build("residual_cnn")
        plan = WeightPruning(keep=0.25, ranking="global", min_keep=0).plan(network)
        module = copy.deepcopy(network.module)
        layers = [
            (part, "weight") for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear)
        ]
        nn.utils.prune.global_unstructured(layers, nn.utils.prune.L1Unstructured, amount=0.75)
        found = {e.parameter: e.mask for e in plan.edits if isinstance(e, Mask)}
        for path, part in module.named_modules():
            if hasattr(part, "weight_mask"):
                assert torch.equal(found[f"{path}.weight"], part.weight_mask.bool()), path

    @pytest.mark.parametrize("name", [n for n in NETWORKS if n != "encoder"])
    def test_every_network(self, name: str) -> None:
        network = build(name)
        known = {n: w for n, w in weights(network.traced).items() if w.kind != "recurrent"}
        plan = WeightPruning(keep=0.5).plan(network)
        assert {e.parameter for e in plan.edits if isinstance(e, Mask)} == set(known)
        for edit in plan.edits:
            assert isinstance(edit, Mask)
            assert int(edit.mask.sum()) == round(edit.mask.numel() / 2)
        close(plan.apply(network)(network.example), zeroed(network, plan)(network.example))

    def test_two_of_four_along_the_inputs(self) -> None:
        network = build("unet")
        plan = WeightPruning(pattern="1:3", exclude=("up.weight",)).plan(network)
        for edit in plan.edits:
            assert isinstance(edit, Mask)
            groups = edit.mask.movedim(1, -1).reshape(-1, 3)
            assert (groups.sum(1) == 1).all()
        transposed = WeightPruning(pattern="1:2", include=("up.weight",)).plan(network).edits[0]
        assert isinstance(transposed, Mask)
        assert (transposed.mask.movedim(0, -1).reshape(-1, 2).sum(1) == 1).all()

    def test_m_must_divide(self) -> None:
        network = build("residual_cnn")
        why = r"conv.weight: 4 does not divide 3 inputs; exclude it"
        for name in ("conv.weight", "c*v.weight"):  # named, or nothing else is left
            with pytest.raises(RefusedError, match=why):
                WeightPruning(pattern="2:4", include=(name,)).plan(network)
        with pytest.raises(RefusedError, match=r"5 does not divide .*; and \d+ more"):
            WeightPruning(pattern="1:5", exclude=("fc",)).plan(network)
        with pytest.raises(
            RefusedError, match=r"fc1.weight: 8 does not divide 12 inputs; use 1:2 or 2:4"
        ):
            WeightPruning(pattern="4:8", include=("fc1.weight",)).plan(build("mlp"))

    def test_blocks_stay_or_leave_whole(self) -> None:
        network = build("mlp")
        plan = WeightPruning(keep=0.5, pattern="4x2", include=("fc1.weight",)).plan(network)
        edit = plan.edits[0]
        assert isinstance(edit, Mask)
        tiles = edit.mask.view(6, 4, 6, 2).float().mean((1, 3))
        assert set(tiles.flatten().tolist()) == {0.0, 1.0}
        assert tiles.mean() == 0.5
        magnitude = (
            network.module.get_parameter("fc1.weight").detach().abs().view(6, 4, 6, 2).mean((1, 3))
        )
        assert magnitude[tiles == 1].min() > magnitude[tiles == 0].max()

    def test_rows_and_threshold(self) -> None:
        network = build("mlp")
        plan = WeightPruning(keep=0.25, ranking="row").plan(network)
        for edit in plan.edits:
            assert isinstance(edit, Mask)
            assert set(edit.mask.sum(1).tolist()) == {edit.shape[1] // 4}
        plan = WeightPruning(threshold=0.1, min_keep=0).plan(network)
        for edit in plan.edits:
            assert isinstance(edit, Mask)
            weight = network.module.get_parameter(edit.parameter)
            assert torch.equal(edit.mask, weight.abs() >= 0.1)

    def test_kinds_and_least(self) -> None:
        network = build("residual_cnn")
        plan = WeightPruning(keep=0.2, ranking="kind").plan(network)
        masks = {e.parameter: e.mask for e in plan.edits if isinstance(e, Mask)}
        assert int(masks["fc.weight"].sum()) == round(0.2 * masks["fc.weight"].numel())
        with torch.no_grad():
            network.module.get_parameter("conv.weight").mul_(1e-6)
        plan = WeightPruning(keep=0.2, ranking="global", min_keep=0.05).plan(replace(network))
        masks = {e.parameter: e.mask for e in plan.edits if isinstance(e, Mask)}
        assert int(masks["conv.weight"].sum()) == round(0.05 * masks["conv.weight"].numel())

    def test_what_is_held_goes_first(self) -> None:
        network = build("mlp")
        first = WeightPruning(keep=0.6).plan(network)
        masked = first.apply(network)
        second = WeightPruning(keep=0.4).plan(masked)
        for one, two in zip(first.edits, second.edits, strict=True):
            assert isinstance(one, Mask) and isinstance(two, Mask)
            assert not (two.mask & ~one.mask).any()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"keep": 0.0}, r"keep=0.0: a share in \(0, 1\]"),
            ({"pattern": "4:2"}, "1 ≤ n ≤ m"),
            ({"pattern": "half"}, "'2:4', or blocks as '4x1'"),
            ({"ranking": "best"}, "local, global, kind, row"),
            ({"ranking": "row", "pattern": "2x2"}, "unstructured"),
            ({"pattern": "2:4", "threshold": 0.1}, "needs no threshold"),
            ({"min_keep": 2.0}, "min_keep=2.0"),
        ],
    )
    def test_settings_are_checked(self, settings: dict, message: str) -> None:
        with pytest.raises(InputError, match=message):
            WeightPruning(**settings)

    def test_nan_scores(self) -> None:
        network = build("mlp")
        with torch.no_grad():
            network.module.get_parameter("fc2.weight")[0, 0] = torch.nan
        with pytest.raises(RefusedError, match=r"fc2\.weight"):
            WeightPruning().plan(network)

    def test_unknown_names(self) -> None:
        with pytest.raises(InputError, match=r"no parameter fc9\.weight"):
            WeightPruning(include=("fc9.weight",)).plan(build("mlp"))


def test_masked_networks_still_compute_their_loss() -> None:
    """Held weights get no gradient, the others that of the masked network."""
    network = build("mlp")
    plan = masked_plan(network)
    masked, oracle = plan.apply(network), zeroed(network, plan)
    for one in (masked, oracle):
        F.cross_entropy(call(one.module, network.example)[0], torch.tensor([0, 1, 2])).backward()
    wanted = {n: p.grad for n, p in oracle.module.named_parameters()}
    for edit in plan.edits:
        assert isinstance(edit, Mask)
        path = edit.parameter.removesuffix(".weight")
        grad = masked.module.get_parameter(f"{path}.parametrizations.weight.original").grad
        reference = wanted[edit.parameter]
        assert grad is not None and reference is not None
        torch.testing.assert_close(grad, reference * edit.mask)


@pytest.mark.parametrize("exclude", ["4", "4.weight", "[4]"])
def test_a_module_is_excluded_by_its_name(exclude: str) -> None:
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    masked = tinier.prune(model, torch.randn(2, 8), pattern="unstructured", exclude=exclude)
    assert [edit.row()[0] for edit in masked.plan.edits] == ["0.weight", "2.weight"]
    with pytest.raises(InputError, match="nothing is called 5"):
        tinier.prune(model, torch.randn(2, 8), pattern="unstructured", exclude="5")


def test_a_layer_of_three_inputs_is_left_and_said() -> None:
    network = build("residual_cnn")
    masked = tinier.prune(network, pattern="2:4")
    names = [edit.row()[0] for edit in masked.plan.edits]
    others = [w.name for w in weights(network.traced).values() if w.name != "conv.weight"]
    assert sorted(names) == sorted(others)
    assert "conv.weight keeps all its weights: 4 does not divide 3 inputs" in masked.notes
    assert not tinier.prune(network, pattern="2:4", exclude="conv").notes
