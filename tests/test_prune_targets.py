"""What pruning can be asked for: shares, numbers, rates, thresholds, rankings, uniform widths, rounds, measured time."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tinier
from networks import build
from tinier.data.read import read
from tinier.edits.config import standard
from tinier.edits.follow import follow
from tinier.edits.slice import Slice
from tinier.errors import InputError, RefusedError
from tinier.graph.groups import channel_groups
from tinier.graph.macs import COSTS, Cost
from tinier.measure.latency import Latency
from tinier.measure.machine import machine
from tinier.methods.allocation import Knob, allocate
from tinier.methods.channel_pruning import ChannelPruning
from tinier.network import Network
from tinier.progress import Silent
from tinier.search import for_latency
from tinier.search.for_latency import plan_for_latency
from tinier.search.workshop import Workshop
from tinier.targets.null import NullTarget
from tinier.verbs import load, prune, save
from tinier.verbs.asked import shares


def cost(network: Network, of: str) -> float:
    channels = channel_groups(network.traced)
    return Cost(COSTS[of](network.traced, channels)).at({})


class Wide(nn.Module):
    """Two layers of different scale: the first one's weights are a hundred times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        with torch.no_grad():
            self.first.weight *= 100

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


@pytest.fixture(scope="module")
def wide() -> Network:
    torch.manual_seed(0)
    return Network(Wide(), {"x": torch.randn(2, 8)})


@pytest.mark.parametrize("of", ["macs", "parameters", "bytes"])
def test_the_cost_is_met_and_nearly_used(wide: Network, of: str) -> None:
    pruned = ChannelPruning(keep=0.5, of=of, round_to=1).plan(wide).apply(wide)
    assert 0.4 < cost(pruned, of) / cost(wide, of) <= 0.5


def test_a_number_is_the_same_as_its_share(wide: Network) -> None:
    whole = cost(wide, "parameters")
    asked = ChannelPruning(of="parameters", at_most=0.4 * whole).plan(wide)
    assert asked == ChannelPruning(of="parameters", keep=0.4).plan(wide)
    assert ChannelPruning(of="bytes", at_most=8 * whole).plan(wide).edits == ()


def test_bytes_count_the_type() -> None:
    half = Network(
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).half(), {"input": torch.ones(2, 4).half()}
    )
    assert cost(half, "bytes") == 2 * cost(half, "parameters")


def test_channels_are_a_share_of_each_group(wide: Network) -> None:
    widths = {
        e.row()[0]: len(e.kept)
        for e in ChannelPruning(keep=0.25, of="channels").plan(wide).edits
        if isinstance(e, Slice)
    }
    assert widths == {"first": 8, "second": 8}


def test_a_local_ranking_takes_the_same_share_of_each_group(wide: Network) -> None:
    plan = ChannelPruning(keep=0.5, ranking="local", round_to=1).plan(wide)
    shares = [len(e.kept) / e.size for e in plan.edits if isinstance(e, Slice)]
    assert len(shares) == 2 and max(shares) - min(shares) <= 1.01 / 32


def test_a_ranking_by_kind_takes_the_same_share_of_each_kind() -> None:
    network = build("vit")
    plan = ChannelPruning(keep=0.6, ranking="kind", round_to=1).plan(network)
    kinds: dict[str, list[tuple[int, int]]] = {}
    channels = channel_groups(network.traced)
    for edit in plan.edits:
        assert isinstance(edit, Slice)
        group = channels.group(edit.group)
        assert group is not None
        kinds.setdefault(group.kind, []).append((len(edit.kept), edit.size))
    assert "head" in kinds and "neuron" in kinds


def test_rates_and_exclusions_are_kept_to(wide: Network) -> None:
    plan = ChannelPruning(rates=(("first", 0.75),), keep=1.0).plan(wide)
    assert [(e.row()[0], len(e.kept)) for e in plan.edits if isinstance(e, Slice)] == [
        ("first", 24)
    ]
    plan = ChannelPruning(keep=0.7, exclude=("first",), round_to=1).plan(wide)
    assert [e.row()[0] for e in plan.edits] == ["second"]
    with pytest.raises(
        InputError, match=r"rates: no channel group is called nothing\*; there are first, second"
    ):
        ChannelPruning(rates=(("nothing*", 0.5),)).plan(wide)
    with pytest.raises(RefusedError, match="no channel can be cut"):
        ChannelPruning(exclude=("*",)).plan(wide)


def test_a_threshold_cuts_what_ranks_below(wide: Network) -> None:
    plan = ChannelPruning(threshold=1.0, round_to=1).plan(wide)
    scores = ChannelPruning().criterion.scores(wide, channel_groups(wide.traced).groups)
    for edit in plan.edits:
        assert isinstance(edit, Slice)
        ranks = scores[edit.group] / scores[edit.group].mean()
        assert set(edit.kept) == set((ranks > 1).nonzero().flatten().tolist())


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep": 0.0}, {"keep": 1.5}, {"keep": float("nan")}, {"of": "seconds"}, {"at_most": -1.0}, {"at_most": 5.0, "of": "channels"},
        {"ranking": "best"}, {"rates": (("a", 2.0),)}, {"round_to": 0}, {"min_keep": 2.0},
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        ChannelPruning(**wrong)


def test_kinds_of_last_resort_are_cut_only_where_needed() -> None:
    network = build("vit")
    channels = channel_groups(network.traced)
    kinds = lambda plan: {channels.group(e.group).kind for e in plan.edits}  # type: ignore[union-attr]  # noqa: E731
    assert "normalised" not in kinds(ChannelPruning(keep=0.8, round_to=1).plan(network))
    assert "normalised" in kinds(ChannelPruning(keep=0.05, round_to=1).plan(network))
    with pytest.raises(RefusedError, match="the least possible"):
        ChannelPruning(keep=0.05, normalised=False, head_dims=False).plan(network)


def test_the_least_possible_is_possible() -> None:
    network = build("residual_cnn")
    with pytest.raises(
        RefusedError, match=r"the least possible with at least 10% of each group is ([0-9.]+)%"
    ) as refusal:
        ChannelPruning(keep=0.001).plan(network)
    least = float(str(refusal.value).split("each group is ")[1].split("%")[0]) / 100
    pruned = ChannelPruning(keep=least + 0.001).plan(network).apply(network)
    assert cost(pruned, "macs") / cost(network, "macs") <= least + 0.001


def test_allocation_against_all_widths(wide: Network) -> None:
    """With one knob, the widest width that fits is found, whatever the ranks."""
    channels = channel_groups(wide.traced)
    group = channels.groups[0]
    measured = Cost(COSTS["macs"](wide.traced, channels))
    knob = Knob(((group, 1),), torch.rand(32, dtype=torch.float64).sort(descending=True).values, 1)
    for share in (0.2, 0.5, 0.9):
        budget = share * measured.at({})
        fitting = [n for n in range(1, 33) if measured.at({group.atom: n}) <= budget]
        found = allocate([knob], measured, budget, 1)
        assert (found == {group.atom: max(fitting)}) if fitting else found is None


def test_rounds_compose(wide: Network) -> None:
    """Two plans one after the other and their composition give the same weights."""
    first = ChannelPruning(keep=0.6, round_to=1).plan(wide)
    between = first.apply(wide)
    then = ChannelPruning(keep=0.6, round_to=1).plan(between)
    after = then.apply(between)
    at_once = follow(first, then, channel_groups(wide.traced)).apply(wide)
    for (name, a), (other, b) in zip(
        after.module.named_parameters(), at_once.module.named_parameters(), strict=True
    ):
        assert name == other and torch.equal(a, b)
    pruned = prune(wide, keep=0.36, steps=2, round_to=1)
    assert cost(pruned.network, "macs") <= 0.36 * cost(wide, "macs") * 1.0001
    assert set(pruned.kept) == {
        name for name in pruned.kept if name in dict(wide.module.named_parameters())
    }


def test_measured_time_is_met(wide: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, seen = cost(wide, "macs"), dict[str, float]()

    class Timer(NullTarget):
        def lower(self, network: Network, folder: Path, onnx_file: Path | None = None) -> Any:
            seen[folder.name] = 1 + 9 * cost(network, "macs") / whole
            return super().lower(network, folder, onnx_file)

        def open(self, file: Path, threads: int) -> Any:
            return file.parent.name

    def measured(
        sessions: dict[str, str], inputs: dict[str, np.ndarray], *, seconds: float
    ) -> dict[str, Latency]:
        return {
            name: Latency(seen[key], seen[key], seen[key], seen[key], 1, 1, ())
            for name, key in sessions.items()
        }

    monkeypatch.setattr(for_latency, "interleaved", measured)
    method = ChannelPruning(round_to=1)
    found = plan_for_latency(wide, method, None, 5.5, Timer(), threads=1)
    assert 5.0 < found.latency <= 5.5 and found.original == 10
    assert cost(found.plan.apply(wide), "macs") / whole == pytest.approx((found.latency - 1) / 9)
    assert plan_for_latency(wide, method, None, 10.5, Timer(), threads=1).plan.edits == ()
    with pytest.raises(
        RefusedError, match=r"1.01 ms on null was asked for; the original takes 10 ms, the fastest"
    ):
        plan_for_latency(wide, method, None, 1.01, Timer(), threads=1)


def causal(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        use_cache=False, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def encoder() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return BertForSequenceClassification(config).eval()


LOADS = """
import sys, torch, transformers
assert "tinier" not in sys.modules
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1]).eval()
ids = torch.arange(14).view(2, 7) % 40
torch.save(model(input_ids=ids).logits.detach(), sys.argv[3])
assert "tinier" not in sys.modules
"""


@pytest.mark.parametrize("make", [causal, encoder], ids=["causal", "encoder"])
def test_a_uniform_network_is_a_standard_checkpoint(make: Any, tmp_path: Path) -> None:
    model = make()
    ids = torch.arange(14).view(2, 7) % 40
    pruned = prune(model, {"input_ids": ids}, keep=0.5, uniform=True, round_to=4)
    assert standard(pruned.model, pruned.network.example) and type(pruned.model) is type(model)
    assert cost(pruned.network, "macs") <= 0.5 * cost(pruned.original, "macs")
    save(pruned, tmp_path / "out")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            LOADS,
            str(tmp_path / "out"),
            type(model).__name__,
            str(tmp_path / "logits"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "logits", weights_only=True)
    torch.testing.assert_close(found, pruned.model(input_ids=ids).logits.detach())
    again = load(tmp_path / "out", make(), {"input_ids": ids})
    torch.testing.assert_close(
        again.model(input_ids=ids).logits, pruned.model(input_ids=ids).logits
    )


def test_uniform_layers_of_a_plain_module_are_alike() -> None:
    network = build("vit")
    pruned = ChannelPruning(keep=0.5, uniform=True, round_to=1).plan(network)
    widths: dict[tuple[str, int], set[int]] = {}
    for edit in pruned.edits:
        assert isinstance(edit, Slice)
        widths.setdefault((re.sub(r"\d+", "*", edit.group), edit.size), set()).add(len(edit.kept))
    assert widths and all(len(found) == 1 for found in widths.values())


def test_what_prune_cannot_do_without_data(wide: Network) -> None:
    for wrong in ({"compensate": True}, {"epochs": 1.0}):
        with pytest.raises(InputError, match="data is needed"):
            prune(wide, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="steps"):
        prune(wide, steps=0)


def test_steps_after_each_other_load_into_the_first_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Wide(), torch.randn(4, 8)
    twice = prune(prune(module, x, keep=0.6), keep=0.6)
    assert (
        twice.original.module is not twice.model
        and cost(twice.original, "macs") == 8 * 32 + 32 * 32 + 32 * 4
    )
    masked = prune(twice, keep=0.5, pattern="unstructured")
    small = tinier.shrink(masked)
    for number, smaller in enumerate((twice, masked, small)):
        save(smaller, tmp_path / str(number))
        again = load(tmp_path / str(number), into=module, example=x)
        torch.testing.assert_close(again.model(x), smaller.model(x))


@pytest.mark.parametrize(
    "wrong",
    [
        {"pattern": "2:4", "depth": 1}, {"pattern": "2:4", "max_latency": "5ms"}, {"pattern": "2:4", "uniform": True},
        {"max_latency": "5ms", "steps": 2}, {"max_latency": "5ms", "threshold": 1.0}, {"threshold": float("nan")}, {"exclude": ["zzz"]},
        {"exclude": "first_"}, {"threads": 0}, {"rates": {"first": 0.5}, "exclude": "first"},
        {"threshold": 1.0, "keep": 0.5}, {"threshold": 1.0, "at_most": 1e6}, {"at_most": 1e6, "keep": 0.9}, {"max_latency": 5, "keep": 0.9},
        {"pattern": "2:4", "keep": 0.1}, {"pattern": "2:4", "ranking": "global"}, {"threshold": 0.1, "keep": 0.5, "pattern": "4x1"},
        {"pattern": "unstructured", "round_to": 8}, {"target": "foo"}, {"target": "torch", "round_to": 4}, {"threads": 1},
        {"pattern": "unstructured", "target": "torch"}, {"steps": 2, "threshold": 1.0}, {"steps": 2, "rates": {"first": 0.5}},
        {"steps": 2, "of": "channels"}, {"schedule": "cubic"}, {"steps": 2, "schedule": "linear"},
    ],
)  # fmt: skip
def test_options_are_never_passed_over(wide: Network, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        prune(wide, **wrong)


def test_an_excluded_module_may_be_named_alone(wide: Network) -> None:
    assert [edit.row()[0] for edit in prune(wide, keep=0.7, exclude="first").plan.edits] == [
        "second"
    ]


def test_what_contradicts_is_named(wide: Network) -> None:
    with pytest.raises(InputError, match="keep and threshold: each says how much is left"):
        prune(wide, keep=0.5, threshold=1.0)
    with pytest.raises(InputError, match=r"pattern='2:4' says itself what stays; leave out keep"):
        prune(wide, keep=0.5, pattern="2:4")


@pytest.mark.parametrize("schedule", [None, "geometric", "cubic"])
def test_rounds_take_a_number_instead_of_a_share(wide: Network, schedule: str | None) -> None:
    whole = cost(wide, "parameters")
    for asked in ({"at_most": 0.4 * whole}, {"keep": 0.4}):
        pruned = prune(wide, of="parameters", steps=3, schedule=schedule, round_to=1, **asked)  # type: ignore[arg-type]
        assert 0.36 * whole < cost(pruned.network, "parameters") <= 0.4 * whole
        assert "cut in 3 rounds" in pruned.notes
    at_once = prune(wide, of="parameters", at_most=whole, steps=2)
    assert not at_once.plan.edits


def test_schedules() -> None:
    assert shares(0.25, 2, None) == shares(0.25, 2, "geometric") == [0.5, 0.25]
    # Zhu and Gupta, equation 1, with s_i = 0, s_f = 0.8, t_0 = 0, n Δt = 4: s = 0.8 − 0.8 (1 − t / 4)³
    assert shares(0.2, 4, "cubic") == pytest.approx([1 - 0.4625, 1 - 0.7, 1 - 0.7875, 0.2])


def test_rounds_follow_their_schedule(wide: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    plan = ChannelPruning.plan

    def watched(self: ChannelPruning, network: Network, statistics: Any = None) -> Any:
        asked.append((self.at_most or 0.0) / cost(wide, "macs"))
        return plan(self, network, statistics)

    monkeypatch.setattr(ChannelPruning, "plan", watched)
    prune(wide, keep=0.36, steps=3, schedule="cubic", round_to=1)
    assert asked == pytest.approx(shares(0.36, 3, "cubic"))


def test_sizes_are_numbers_of_bytes(wide: Network) -> None:
    half = prune(wide, of="bytes", at_most="3kB", round_to=1)
    assert 2700 < cost(half.network, "bytes") <= 3000
    assert prune(wide, at_most="400").plan == prune(wide, at_most=400).plan
    for wrong in ("3kB", "some"):
        with pytest.raises(InputError, match="at_most"):
            prune(wide, at_most=wrong)


def test_widths_are_rounded_as_the_named_target_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 4)), torch.randn(2, 8)

    def width(target: str | None, flags: tuple[str, ...]) -> int:
        facts = replace(machine(), flags=flags)
        monkeypatch.setattr(sys.modules["tinier.measure.machine"], "machine", lambda: facts)
        (edit,) = prune(model, x, keep=0.49, target=target).plan.edits
        assert isinstance(edit, Slice)
        return len(edit.kept)

    assert width("onnxruntime", ("avx2", "avx512f")) == 240  # 250 units at most
    for target, flags in (
        ("onnxruntime", ("avx2",)),
        ("torch", ("avx512f",)),
        (None, ("avx512f",)),
    ):
        assert width(target, flags) == 248


def test_candidates_of_a_search_have_the_widths_that_it_is_given(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 4))
    network = Network(module, {"input": torch.randn(2, 8)})
    examples = read(torch.randn(8, 8), network.example)
    for width, kept in ((8, 248), (16, 240)):
        shop = Workshop(
            network, examples, None, {}, tmp_path, 1, 1, False, 0, Silent(), width=width
        )
        (edit,) = shop.pruned(0.49)[1].edits
        assert isinstance(edit, Slice) and len(edit.kept) == kept
