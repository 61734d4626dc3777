"""Tracing: one graph for every way of writing a network, a fixed line of the model for what has none."""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from networks import NETWORKS, build
from tinier.errors import ModelError
from tinier.graph import trace as tracing
from tinier.graph.capture import DependsOnData, capture
from tinier.graph.groups import channel_groups
from tinier.graph.trace import Traced, call, trace
from tinier.methods.channel_pruning import ChannelPruning
from tinier.network import Network, name_inputs
from tinier.sources.module import ModuleSource

WIDTH = 12


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Any:
        return self.b(F.relu(self.a(x)))


class KeywordArguments(Base):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return super().forward(kwargs["x"])


class Dictionary(Base):
    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.a(x))
        return {"logits": self.b(y), "hidden": [y.sum(1), y.mean(1)], "none": None}


@dataclasses.dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


torch.utils._pytree.register_dataclass(Answer)


class Dataclass(Base):
    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.a(x))
        return Answer(self.b(y), y.sum(1))


class Contexts(Base):
    """Contexts that change how gradients and types are handled inside."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.a(x)
        with torch.autocast("cpu", enabled=False):
            return self.b(F.relu(y))


class InPlace(Base):
    """Writes to its input, and to what it computed."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        y = self.a(x)
        y.relu_()
        return self.b(y)


class Counter(Base):
    """A buffer that every call changes."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x) + self.calls


class Twice(nn.Module):
    """One module in two roles: its outputs feed two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.shared(x))
        return self.b(self.shared(F.relu(self.a(y))))


class Normed(nn.Module):
    """Parametrizations: the weight is computed from others on each call."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.a, self.b = norm(nn.Linear(6, WIDTH)), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class NotInExport(Base):
    """A number of a buffer: torch.export does not know its value, a run does."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        for _ in range(int(self.steps)):
            y = F.relu(y) + 0.5
        return self.b(y).view(len(x), 2, 2)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(WIDTH), nn.ReLU(), nn.LazyLinear(4))


def hooked() -> nn.Module:
    module = Base()
    module.a.register_forward_hook(lambda _, __, output: output * 0.5)
    module.b.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,))
    return module


class LazilyHooked(Base):
    """Puts a hook on a part of itself at its first call and notes that it has, as transformers does to capture hidden states."""

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "_hooked", False):
            self.a.register_forward_hook(lambda _, __, output: self.seen.append(output))
            self._hooked = True
        self.seen: list[Tensor] = []
        result = super().forward(x)
        return result + self.seen[0].mean()


def batch_norm() -> nn.Module:
    """In training mode when it is handed over, with dropout and statistics that are not the start's."""
    module = nn.Sequential(
        nn.Linear(6, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), nn.ReLU(), nn.Linear(WIDTH, 4)
    )
    module.train()
    for _ in range(3):
        module(torch.randn(8, 6))
    return module


WAYS: dict[str, Callable[[], nn.Module]] = {
    "keyword_arguments": KeywordArguments,
    "dictionary": Dictionary,
    "dataclass": Dataclass,
    "contexts": Contexts,
    "in_place": InPlace,
    "counter": Counter,
    "twice": Twice,
    "weight_norm": lambda: Normed(torch.nn.utils.parametrizations.weight_norm),
    "spectral_norm": lambda: Normed(torch.nn.utils.parametrizations.spectral_norm),
    "not_in_export": NotInExport,
    "lazy": lazy,
    "hooked": hooked,
    "batch_norm": batch_norm,
}


def network(module: nn.Module, batch: int = 3) -> Network:
    torch.manual_seed(1)
    x = torch.randn(batch, 6)
    names = ("x",) if isinstance(module, KeywordArguments) else tuple(name_inputs(module, x))
    return Network(module, dict.fromkeys(names, x), type(module).__name__)


def state(module: nn.Module) -> dict[str, Any]:
    """All that a user could see of a module."""
    return {
        "values": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "modes": {name: part.training for name, part in module.named_modules()},
        "trainable": {name: p.requires_grad for name, p in module.named_parameters()},
        "gradients": {name: p.grad for name, p in module.named_parameters()},
        "objects": {name: id(p) for name, p in module.named_parameters()},
        "hooks": {
            name: (len(part._forward_hooks), len(part._forward_pre_hooks))
            for name, part in module.named_modules()
        },
    }


def assert_unchanged(before: dict[str, Any], module: nn.Module) -> None:
    after = state(module)
    for key in ("modes", "trainable", "objects", "hooks"):
        assert before[key] == after[key], key
    assert before["gradients"].keys() == after["gradients"].keys()
    assert all(before["gradients"][k] is v for k, v in after["gradients"].items())
    assert before["values"].keys() == after["values"].keys()
    for key, value in after["values"].items():
        assert torch.equal(before["values"][key], value), key


@pytest.mark.parametrize("way", WAYS)
def test_the_graph_computes_what_the_module_does(way: str) -> None:
    torch.manual_seed(0)
    module = WAYS[way]()
    if way == "lazy":
        module(torch.zeros(1, 6))
    original = network(module)
    before = state(module)
    example = {name: tensor.clone() for name, tensor in original.example.items()}
    traced = original.traced
    assert_unchanged(before, module)
    for size in (2, 5):
        inputs = original.batch(size)
        wanted = original(inputs)
        with torch.no_grad():
            found = copy.deepcopy(traced.module)(**{n: t.clone() for n, t in inputs.items()})
        assert len(found) == len(wanted) == len(traced.outputs)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
    assert traced.batched
    assert_unchanged(before, module)
    for name, tensor in example.items():  # what a network writes to its inputs is its own
        assert torch.equal(tensor, original.example[name])


@pytest.mark.parametrize("way", WAYS)
def test_pruned_or_refused_with_a_reason_and_the_module_unchanged(way: str) -> None:
    torch.manual_seed(0)
    module = WAYS[way]()
    if way == "lazy":
        module(torch.zeros(1, 6))
    original = network(module)
    before = state(module)
    pruned = ChannelPruning(keep=0.7, round_to=1).plan(original).apply(original)
    assert_unchanged(before, module)
    count = sum(p.numel() for p in pruned.module.parameters())
    assert count < sum(p.numel() for p in module.parameters())
    assert [t.shape for t in pruned(original.batch(5))] == [
        t.shape for t in original(original.batch(5))
    ]
    assert {n: p.requires_grad for n, p in pruned.module.named_parameters()} == before["trainable"]
    names = set(pruned.module.state_dict())
    assert names <= set(before["values"]) or way == "not_in_export"


def test_output_names_come_without_a_run() -> None:
    assert trace(Dictionary(), {"x": torch.randn(2, 6)}).outputs == ("logits", "hidden_0", "hidden_1")  # fmt: skip
    assert trace(Dataclass(), {"x": torch.randn(2, 6)}).outputs == ("output_0", "output_1")
    assert trace(Base(), {"x": torch.randn(2, 6)}).outputs == ("output",)
    for way in ("dictionary", "dataclass", "not_in_export"):
        original = network(WAYS[way]())
        with tracing.evaluating(original.module), torch.no_grad():
            ran = tracing.isolated(original.module, original.example)
        names = tracing._names(ran)
        assert original.traced.outputs == names


class Branch(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.sum() > 0:  # the line that stops it
            y = y * 2
        return self.b(y)


class Number(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        scale = float(y.max())  # the line that stops it
        return self.b(y / scale if scale > 1 else y)


class Shape(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        chosen = y[y[:, 0] > 0]  # the line that stops it
        return self.b(chosen).view(len(chosen), -1) if len(chosen) > 2 else self.b(y)


class LeavesTorch(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.from_numpy(np.tanh(y.detach().numpy())))  # the line that stops it


@pytest.mark.parametrize("kind", [Branch, Number, Shape, LeavesTorch])
def test_a_refusal_names_the_line_of_the_model(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = kind().train()
    module.a.weight.grad = torch.ones(WIDTH, 6)  # type: ignore[union-attr]
    before = state(module)
    with pytest.raises(ModelError) as caught:
        trace(module, {"x": torch.randn(3, 6)})
    message = str(caught.value)
    assert "test_tracing.py:" in message
    assert "the line that stops it" in message or (kind is Shape and "chosen" in message)
    assert_unchanged(before, module)


def test_script_modules_are_refused_with_a_way_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(Base())
    with pytest.raises(ModelError, match="TorchScript"):
        trace(scripted, {"x": torch.randn(2, 6)})


def test_modules_that_were_never_run_are_refused_with_a_way_out() -> None:
    with pytest.raises(ModelError, match="run it once"):
        trace(lazy(), {"input": torch.randn(2, 6)})


def test_a_recorded_run_is_the_same_graph_as_the_exported_one() -> None:
    """Where both exist, they are the same operators on the same tensors: the one judges the other."""
    for way in ("dictionary", "in_place", "weight_norm", "batch_norm"):
        original = network(WAYS[way]().eval())
        (name,) = original.example
        captured, _ = capture(original.module.eval(), original.example, [{name: 0}])
        recorded = trace(captured, original.example)
        assert operators(recorded) == operators(original.traced), way
        assert recorded.batched
        a, b = (sorted(g.size for g in channel_groups(t).groups) for t in (recorded, original.traced))  # fmt: skip
        assert a == b


def operators(traced: Traced) -> list[str]:
    nothing = ("aten.alias.default", "aten.detach.default", "aten.detach_.default")
    found = [str(node.target) for node in traced.module.graph.nodes if node.op == "call_function"]
    return [name for name in found if not name.startswith(nothing) and "sym_size" not in name]


class Positions(nn.Module):
    """Sizes in Python: views and slices that follow the batch and the length; a buffer's number is read, so export fails."""

    heads: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(16, 8)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)
        self.register_buffer("heads", torch.tensor(4))

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        y = self.words(ids) + self.places.weight[:length]
        heads = int(self.heads)
        y = self.a(y).view(batch, length, heads, 16 // heads).transpose(1, 2)
        y = y.reshape(batch * heads, length, 16 // heads).softmax(1)
        y = y.view(batch, heads, length, 16 // heads).transpose(1, 2).reshape(batch, length, 16)
        return self.b(y)


def test_batch_and_length_stay_free_in_a_recorded_run() -> None:
    torch.manual_seed(0)
    module = Positions().eval()
    example = {"ids": torch.randint(0, 20, (2, 6))}
    traced = trace(module, example)
    assert traced.batched
    for shape in ((2, 6), (5, 9), (3, 4)):
        ids = torch.randint(0, 20, shape)
        with torch.no_grad():
            torch.testing.assert_close(traced.module(ids=ids)[0], module(ids))


def test_sizes_that_are_equal_by_chance_stay_apart() -> None:
    """A batch of 6 with 6 features and a width of 6: only the batch is free."""
    module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval()
    traced = trace(module, {"input": torch.randn(6, 6)})
    assert traced.batched
    (value,) = [n.meta["val"] for n in traced.module.graph.find_nodes(op="placeholder")]
    assert not isinstance(value.shape[0], int) and value.shape[1] == 6
    assert traced.module(input=torch.randn(2, 6))[0].shape == (2, 6)
    assert [g.size for g in channel_groups(traced).groups] == [6]


def test_a_batch_of_one_is_fixed_and_said_so() -> None:
    assert not trace(Base(), {"x": torch.randn(1, 6)}).batched
    assert ModuleSource().load(Base(), torch.randn(1, 6)).traced.batched


def test_the_trace_has_gradients_of_its_own() -> None:
    module = Base()
    traced = trace(module, {"x": torch.randn(2, 6)})
    traced.module(x=torch.randn(2, 6))[0].sum().backward()
    assert all(p.grad is None for p in module.parameters())
    for p in traced.module.parameters():
        p.requires_grad_(False)
    assert all(p.requires_grad for p in module.parameters())
    tensors = zip(module.parameters(), traced.module.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in tensors)  # no second copy in memory


def test_a_network_that_changes_its_buffers_answers_the_same_every_time() -> None:
    original = network(Counter())
    first, second = original(original.example), original(original.example)
    assert torch.equal(first[0], second[0])
    assert call(original.module, original.example)[0].allclose(first[0])
    assert original.module.get_buffer("calls") == 1  # the module itself counts on


def test_data_dependence_is_an_error_of_its_own() -> None:
    with pytest.raises(DependsOnData):
        capture(Number().eval(), {"x": torch.randn(3, 6)}, [])


def skeleton(traced: Traced) -> list[str]:
    """The operators but for slices of everything and checks of types, which only torch.export writes."""
    nothing = ("aten.slice", "aten._assert_tensor_metadata", "aten.contiguous", "<built-in")
    return [name for name in operators(traced) if not name.startswith(nothing)]


@pytest.mark.parametrize("name", NETWORKS)
def test_recordings_without_values_give_the_graph_of_the_export(name: str) -> None:
    original = build(name)
    recorded = trace(original.module, original.example)
    assert not recorded.by_export
    with tracing.evaluating(original.module):
        exported = tracing.by_export(original.module, original.example)
    assert exported.by_export and skeleton(recorded) == skeleton(exported)
    assert recorded.outputs == exported.outputs and recorded.batched == exported.batched
    a, b = (sorted((g.name, g.size) for g in channel_groups(t).groups) for t in (recorded, exported))  # fmt: skip
    assert a == b
    with torch.no_grad():
        inputs = original.batch(5)
        found, wanted = (t.module(**inputs) for t in (recorded, exported))
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right)


class Remembers(Base):
    """Keeps tensors of a run in attributes, as caches of positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self.seen: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.last = self.seen[len(x)] = y
        return self.b(y)


def test_a_recording_leaves_nothing_in_the_module() -> None:
    module = Remembers()
    assert not trace(module, {"x": torch.randn(3, 6)}).by_export
    assert module.last is None and module.seen == {}


class Floors(Base):
    """Half of the batch, rounded down: no multiple of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + y[: x.shape[0] // 2].sum(0)


@pytest.mark.parametrize("kind", [Counter, InPlace, Floors])
def test_what_recordings_leave_unclear_is_exported(kind: type[nn.Module]) -> None:
    module = kind().eval()
    traced = trace(module, {"x": torch.randn(4, 6)})
    assert traced.by_export
    x = torch.randn(7, 6)
    with torch.no_grad():
        wanted = copy.deepcopy(module)(x.clone())
        torch.testing.assert_close(traced.module(x=x.clone())[0], wanted)


class Liar(nn.Module):
    """Computes something else where it sees no values, and has a width written into it, so that only its graph can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu().view(-1, 16)
        return self.second(hidden) * (3.0 if x.is_meta else 1.0)


def test_a_wrong_recording_is_noticed_where_the_graph_takes_the_place_of_the_class() -> None:
    torch.manual_seed(0)
    network = Network(Liar(), {"x": torch.randn(2, 8)})
    assert not network.traced.by_export
    plan = ChannelPruning(keep=0.5, round_to=1).plan(network)
    pruned = plan.apply(network)
    assert isinstance(pruned.module, fx.GraphModule)
    module: Any = network.module
    kept = torch.tensor(next(iter(plan.edits)).kept)  # type: ignore[attr-defined]
    x = torch.randn(5, 8)
    with torch.no_grad():
        wanted = (
            module.first(x).relu()[:, kept] @ module.second.weight[:, kept].T + module.second.bias
        )
    torch.testing.assert_close(pruned({"x": x})[0], wanted)


class LargeBatches(nn.Module):
    """Takes another way for large batches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.runs = nn.Linear(8, 16), nn.Linear(16, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        hidden = self.first(x).relu()
        if x.shape[0] > 8:
            hidden = hidden * 2
        return self.second(hidden)


def test_a_branch_on_the_batch_is_not_passed_over() -> None:
    torch.manual_seed(0)
    network = Network(LargeBatches(), {"x": torch.randn(2, 8)})
    assert network.traced.by_export and not network.traced.batched
    assert network.module.runs == 0  # what a forward counts is put back


def test_hooks_that_a_first_call_puts_on_are_there_in_every_recording() -> None:
    torch.manual_seed(0)
    module = LazilyHooked().eval()
    before = state(module)
    traced = network(module).traced
    assert_unchanged(before, module)
    assert not hasattr(module, "_hooked")
    for size in (2, 5):
        x = torch.randn(size, 6)
        torch.testing.assert_close(traced.module(x=x)[0], module(x))


class Accumulating(nn.Module):
    """Adds up in a tensor of ``zeros_like``, which hands out another tensor than the one it made; the branch is for a run alone."""

    times: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)
        self.register_buffer("times", torch.tensor(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        total = torch.zeros_like(y).float()
        for _ in range(int(self.times)):
            total += y
        return self.b(total)


class Remembering(Accumulating):
    """Writes into a tensor that hangs on the module and is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        for _ in range(int(self.times)):
            y = y + self.total.add_(1.0)
        return self.b(y)


def test_what_a_recorded_run_adds_up_starts_at_zero_each_time() -> None:
    torch.manual_seed(0)
    module = Accumulating().eval()
    traced = network(module).traced
    for size in (3, 5, 5):
        x = torch.randn(size, 6)
        torch.testing.assert_close(traced.module(x=x)[0], module(x))
    with pytest.raises(ModelError):
        _ = network(Remembering().eval()).traced


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)[0])


class Summed(nn.Module):
    """A length that another float input shares."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return (self.a(x) * weights[..., None]).sum(1)


LENGTHS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]], dict[str, int]]] = {
    "convolution": (
        lambda: nn.Sequential(nn.Conv1d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 3, 1)),
        {"input": (2, 6, 9)},
        {"input": 2},
    ),
    "recurrent": (Recurrent, {"x": (2, 5, 6)}, {"x": 1}),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False
        ),
        {"src": (2, 5, 8)},
        {"src": 1},
    ),
    "shared": (Summed, {"x": (2, 5, 6), "weights": (2, 5)}, {"x": 1, "weights": 1}),
}


@pytest.mark.parametrize("way", LENGTHS)
def test_the_length_of_float_sequences_is_free(way: str) -> None:
    torch.manual_seed(0)
    make, shapes, dims = LENGTHS[way]
    module = make().eval()
    example = {name: torch.randn(shape) for name, shape in shapes.items()}
    traced = Network(module, example).traced
    assert not traced.by_export
    for length in (3, 16):
        inputs = {}
        for name, shape in shapes.items():
            size = list(shape)
            size[0], size[dims[name]] = 4, length
            inputs[name] = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(traced.module(**inputs)[0], module(**inputs))


def test_widths_and_lengths_that_shrink_by_steps_stay_fixed() -> None:
    strided = nn.Sequential(nn.Conv1d(6, 8, 3, 2), nn.ReLU(), nn.Conv1d(8, 3, 1)).eval()
    for module, shape in ((strided, (2, 6, 9)), (Base().eval(), (2, 6))):
        name = "x" if isinstance(module, Base) else "input"
        traced = Network(module, {name: torch.randn(shape)}).traced
        (node,) = traced.module.graph.find_nodes(op="placeholder")
        assert tuple(node.meta["val"].shape[1:]) == shape[1:]
        assert traced.batched


class ByDevice(Base):
    """Another way on another device, as experts of transformers count their tokens."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = (
            y.relu()
            if y.device.type == "cpu" and y.is_cpu and not (y.is_cuda or y.is_meta)
            else y.sigmoid()
        )
        return self.b(y) + torch.arange(4, device=x.device)


@pytest.mark.parametrize("batch", [1, 3])
def test_branches_on_the_device_are_those_of_the_network(batch: int) -> None:
    torch.manual_seed(0)
    module = ByDevice().eval()
    traced = network(module, batch).traced
    assert not traced.by_export and traced.batched == (batch > 1)
    x = torch.randn(batch, 6)
    torch.testing.assert_close(traced.module(x=x)[0], module(x))
    assert not {"device", "is_cpu", "is_cuda", "is_meta"} & set(vars(Tensor))
    assert torch.empty(1, device="meta").device.type == "meta"
    assert any(
        isinstance(n.meta.get("val"), Tensor) and n.meta["val"].device.type == "cpu"
        for n in traced.module.graph.nodes
    )


class Pooled(nn.Module):
    """The mean over what a stride leaves of a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 32, stride=32), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.b(y.sum(-1) / y.shape[-1])


class Clipped(nn.Module):
    """Of a longer sequence the first part counts."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)[:, :64]
        return y.sum(1) / y.shape[1]


@pytest.mark.parametrize("length", [50, 100])
def test_lengths_that_strides_and_clips_follow_are_fixed(length: int) -> None:
    for module, shape in ((Pooled(), (2, 3, 10 * length)), (Clipped(), (2, length, 6))):
        traced = Network(module.eval(), {"x": torch.randn(shape)}).traced
        (node,) = traced.module.graph.find_nodes(op="placeholder")
        assert tuple(node.meta["val"].shape[1:]) == shape[1:]


class Odd(Base):
    """train() returns nothing and forgets; a tensor hangs on the module; an output is made of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.constant, self.memory = torch.ones(6), torch.ones(4)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode:
            self.memory = torch.zeros(4)

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x + self.constant) + self.memory
        return y, torch.zeros_like(y)


@functools.lru_cache
def _positions(count: int) -> Tensor:
    return torch.arange(count).float() / count


_REMEMBERED: dict[int, Tensor] = {}


class Caching(Base):
    """Caches outside of the module: of a function, and a dict of the file."""

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[1]
        if count not in _REMEMBERED:
            _REMEMBERED[count] = torch.ones(count).cumsum(0)
        return super().forward(x * _positions(count) + _REMEMBERED[count])


@pytest.mark.parametrize("make", [Odd, Caching])
def test_what_the_user_has_is_as_before(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = make()
    module.eval()
    _positions.cache_clear()
    original = network(module)
    assert not original.traced.by_export
    for width in (5, 6, 7):
        assert not _positions(width).is_meta
        assert not _REMEMBERED.get(width, torch.ones(1)).is_meta
    plan = ChannelPruning(keep=0.5, round_to=1).plan(original)
    assert type(plan.apply(original).module) is make
    assert bool((getattr(module, "memory", torch.ones(4)) == 1).all())
    x = torch.randn(3, 6)
    found = original.traced.module(x=x)[0]
    wanted = module(x)
    torch.testing.assert_close(found, wanted[0] if isinstance(wanted, tuple) else wanted)


class Adding(Base):
    """Writes into a buffer by ``out=``."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        torch.add(self.total, y.detach(), out=self.total)
        return self.b(y.relu() + self.total)


def test_the_proof_leaves_buffers_as_they_are() -> None:
    torch.manual_seed(0)
    original = network(Adding().eval())
    plan = ChannelPruning(keep=0.5, round_to=1).plan(original)
    for _ in range(2):
        plan.apply(original)
        assert not original.traced.module.get_buffer("total").any()
        assert not original.module.get_buffer("total").any()


class Measuring(Base):
    """Keeps the length of its last input, which torch.export makes a symbol of."""

    a: Any
    length: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.length = x.shape[1]
        return super().forward(x) * self.length


def test_an_export_leaves_nothing_in_the_module() -> None:
    """Symbols hold the whole export with its tensors without values, which nothing can copy."""
    module = Measuring().eval()
    module.a = nn.Embedding(6, WIDTH)  # of integers, whose length is free in an export
    example = {"x": torch.arange(27).view(3, 9) % 6}
    traced = tracing.by_export(module, example)
    assert module.length is None
    wanted = copy.deepcopy(module)(**example)
    torch.testing.assert_close(traced.module(**example)[0], wanted)


class Apart(Base):
    """Rows and positions one by one, put together again: as many operands as the batch has rows."""

    def __init__(self, start: int, end: int, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.start, self.end, self.function = start, end, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(list(super().forward(x).unbind(self.start)), dim=self.end) * 2


@pytest.mark.parametrize("function", [torch.cat, torch.stack])
@pytest.mark.parametrize(("start", "end"), [(0, 0), (0, 1), (1, 0), (0, -1), (2, -2)])
def test_what_is_taken_apart_and_put_together_is_free(
    start: int, end: int, function: Callable[..., Tensor]
) -> None:
    module = Apart(start, end, function).eval()
    traced = trace(module, {"x": torch.randn(3, 5, 6)})
    assert traced.batched and not traced.by_export
    x = torch.randn(4, 5, 6)
    with torch.no_grad():
        (found,) = traced.module(x=x)
        torch.testing.assert_close(found, module(x))
        # What the graph says of its result has its shape.
        (node,) = traced.module.graph.find_nodes(op="output")
        assert len(node.args[0][0].meta["val"].shape) == found.ndim


class Checking(Base):
    """Looks at values for a check and its message alone."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.abs().sum()
        message = f"the sum is {total}"
        torch._check_tensor_all(total > 0, lambda: message)
        return super().forward(x)


class CheckingTwoFaced(Checking):
    """Computes something else where it is told that it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if torch.compiler.is_exporting() else 3.0)


def test_checks_of_values_do_not_stop_a_recording() -> None:
    format_, check_ = Tensor.__format__, torch._check_tensor_all_with
    module, x = Checking().eval(), torch.randn(5, 6)
    traced = trace(module, {"x": torch.randn(3, 6)})
    assert traced.batched and not traced.by_export
    with torch.no_grad():
        torch.testing.assert_close(traced.module(x=x)[0], module(x))
    assert (Tensor.__format__, torch._check_tensor_all_with) == (format_, check_)
    with pytest.raises(RuntimeError, match="the sum is 0"):
        module(torch.zeros(3, 6))


def test_a_network_with_two_faces_is_traced_as_it_runs() -> None:
    module, x = CheckingTwoFaced().eval(), torch.randn(5, 6)
    traced = trace(module, {"x": torch.randn(3, 6)})
    assert traced.batched
    with torch.no_grad():
        torch.testing.assert_close(traced.module(x=x)[0], module(x))


class Whole(Base):
    """Makes a number of the batch size, which fixes it for torch.export."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.new_ones(int(x.shape[0]), 4)


def test_what_is_free_in_the_graph_is_free_in_the_export() -> None:
    module, x = Whole().eval(), torch.randn(5, 6)
    traced = trace(module, {"x": torch.randn(3, 6)})
    assert traced.batched and not traced.by_export
    with torch.no_grad():
        (found,) = pytree.tree_leaves(traced.exported.module()(x=x))
        torch.testing.assert_close(found, module(x))
