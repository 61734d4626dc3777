"""Modules as users have them: lazy, wrapped, compiled, scripted, quantized, made by their own functions; and silence meanwhile."""

import contextlib
import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import tinier
from tinier import cli
from tinier.errors import DataError, ModelError
from tinier.graph.trace import trace
from tinier.sources.load import load

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning"
)  # torch's own use of it

X = torch.randn(4, 8)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)).eval()


@pytest.mark.parametrize("verb", [tinier.prune, tinier.inspect, tinier.shrink])
def test_lazy_layers_are_refused_and_stay_lazy(verb: Any) -> None:
    module = nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, 2))
    with pytest.raises(ModelError, match=r"0\.weight has no shape yet.*run it once"):
        verb(module, X)
    assert isinstance(module[0].weight, nn.UninitializedParameter)
    module(X)
    assert tinier.prune(module, X).kept


class Wrapper(nn.Module):
    """Takes *args, as torch's own wrappers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, *args: Tensor) -> Tensor:
        return self.inner(args[0])


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, lambda module: torch.compile(nn.DataParallel(module))],
)
def test_wrappers_of_torch_are_taken_off(wrap: Any) -> None:
    module = mlp()
    smaller = tinier.prune(wrap(module), X, keep=0.5)
    assert type(smaller.model) is nn.Sequential
    assert smaller.kept == tinier.prune(module, X, keep=0.5).kept


def test_parts_that_are_compiled_are_seen_through() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner: Any = torch.compile(mlp())

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    kept = tinier.prune(Outer(), X, keep=0.5).kept
    assert kept["inner._orig_mod.0.weight"] == tinier.prune(mlp(), X, keep=0.5).kept["0.weight"]


@pytest.mark.parametrize("example", [X, {"x": X}])
def test_inputs_without_names_are_refused_with_a_way_out(example: Any) -> None:
    with pytest.raises(ModelError, match=r"takes \*args, which have no names; name its inputs"):
        tinier.prune(Wrapper(), example)


def test_script_and_quantized_layers_are_refused_and_left_alone() -> None:
    scripted = torch.jit.trace(mlp(), X)
    with pytest.raises(ModelError, match="the network is TorchScript"):
        tinier.prune(scripted, X)
    around = nn.Sequential(nn.Linear(8, 8), scripted)
    before = copy.deepcopy(around.state_dict())
    with pytest.raises(ModelError, match="its module 1 is TorchScript"):
        tinier.prune(around, X)
    assert all(torch.equal(value, before[name]) for name, value in around.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear}, torch.qint8)
    with pytest.raises(ModelError, match=r"module 0 is already quantized.*give the float model"):
        tinier.prune(quantized, X)


def test_vmap_is_traced_below_it() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(8, 8), mlp()

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(self.inner)(self.first(x))

    module = Mapped().eval()
    network = load(module, X)
    with torch.no_grad():
        torch.testing.assert_close(network.traced.module(X)[0], module(X))
    kept = tinier.prune(module, X, keep=0.5).kept
    assert len(kept["inner.0.weight"][0]) < 32 and kept["inner.0.weight"][0] == kept["inner.2.weight"][1]  # fmt: skip


def test_arrays_of_numpy_are_examples() -> None:
    array = np.random.default_rng(0).normal(size=(4, 8))
    for example in (array, array.astype(np.float32), (array,), {"input": array}):
        network = load(mlp(), example)
        assert network.example["input"].dtype == torch.float32
        assert network.example["input"].shape == (4, 8)
    with pytest.raises(ModelError, match="example input input: ndarray, a tensor is needed"):
        load(mlp(), np.array(["a", "b"]))


def test_an_example_without_examples_is_refused() -> None:
    with pytest.raises(ModelError, match=r"is empty, \(0, 8\); give a batch of 2 or more"):
        tinier.prune(mlp(), X[:0])


def test_a_function_that_fails_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_task.py").write_text(
        "def model():\n    return {}['width']\n\ndef data():\n    return 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    line = r"failing_task:model\(\) failed at failing_task.py:2: return {}\['width'\]: KeyError: 'width'"
    with pytest.raises(ModelError, match=line):
        load("failing_task:model")
    with pytest.raises(DataError, match=r"failed at failing_task.py:5: return 1 / 0: ZeroDivision"):
        tinier.prune(mlp(), X, data="failing_task:data")
    shown = CliRunner().invoke(cli.app, ["inspect", "failing_task:model"])
    assert shown.exit_code == 2 and "failing_task.py:2" in shown.output


class Doubtful(nn.Module):
    """Its path depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.sum() > 0:
            y = y * 2
        return y


class Caught(nn.Module):
    """It tries what its tensors cannot do."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if x.device.type == "meta":
            raise ValueError("values are needed")
        with contextlib.suppress(RuntimeError):
            y = y @ torch.empty(3, 3)
        return y


@pytest.mark.parametrize("kind", [Doubtful, Caught])
def test_torch_says_nothing_on_the_terminal(
    kind: type[nn.Module], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    try:
        trace(kind().eval(), {"x": X})
    except ModelError:
        assert kind is Doubtful
    written = capfd.readouterr()
    assert not written.err and not written.out
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
