"""What the training loop does beside its steps: parts of a batch, averages, an end by validation, states on disk, processes, precisions."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks import build
from tinier.data.base import Arrays, Examples
from tinier.errors import InputError, OutputError
from tinier.network import Network
from tinier.recovery.averaging import Averaged
from tinier.recovery.l1 import L1
from tinier.recovery.loop import recover
from tinier.recovery.recompute import blocks, recomputed
from tinier.recovery.settings import Recovered

HERE = Path(__file__).resolve().parent


def examples(count: int = 96, shape: tuple[int, ...] = (12,), seed: int = 7) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=generator)
    return Examples(Arrays({"x": x}, torch.randint(0, 5, (count,), generator=generator)))


def weights(network: Network) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.module.state_dict().items()}


def same(one: Recovered, two: Recovered) -> bool:
    first, second = weights(one.network), weights(two.network)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


class Blocks(nn.Module):
    """Blocks with a batch norm each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Tanh()) for _ in range(3)
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        found: Tensor = self.head(x)
        return found


def pair() -> tuple[Network, Network]:
    torch.manual_seed(3)
    return tuple(Network(Blocks(), {"x": torch.randn(2, 12)}) for _ in range(2))  # type: ignore[return-value]


def test_parts_of_a_batch_have_the_gradient_of_the_whole() -> None:
    student, teacher = build("mlp", seed=1), build("mlp", seed=2)
    whole, parts = (
        recover(student, teacher, examples(), epochs=2, batch=16, accumulate=n) for n in (1, 3)
    )
    for one, two in zip(
        weights(whole.network).values(), weights(parts.network).values(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_the_average_of_the_weights() -> None:
    module = nn.Linear(3, 2)
    average = Averaged(module, 0.9)
    expected = module.weight.detach().clone()
    for step in range(1, 120):
        with torch.no_grad():
            module.weight.fill_(float(step))
        average.update(module)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(average.values["weight"], expected)


def test_with_an_average_the_result_is_another() -> None:
    student, teacher = build("mlp", seed=1), build("mlp", seed=2)
    plain, mean = (
        recover(student, teacher, examples(), epochs=2, batch=16, ema=ema) for ema in (None, 0.9)
    )
    assert not same(plain, mean)
    assert plain.history == mean.history


def test_training_ends_where_validation_gets_no_better() -> None:
    """A student of eight examples learns them by heart."""
    student, teacher = build("mlp", seed=1), build("mlp", seed=2)
    done = recover(
        student,
        teacher,
        examples(8),
        valid=examples(64, seed=8),
        epochs=300,
        batch=8,
        lr=0.05,
        patience=4,
    )
    assert done.epochs < 300 and "validation" in done.stopped
    best = done.validation.index(min(done.validation))
    assert len(done.validation) - 1 - best == 4
    # The weights are those of the best epoch.
    again = recover(
        student,
        teacher,
        examples(8),
        valid=examples(64, seed=8),
        epochs=300,
        batch=8,
        lr=0.05,
        patience=4,
    )
    assert same(done, again)
    from_best = recover(
        done.network,
        teacher,
        examples(64, seed=8),
        valid=examples(64, seed=8),
        epochs=1,
        batch=64,
        lr=1e-12,
    )
    assert from_best.validation[0] == pytest.approx(min(done.validation), rel=1e-4)


class Killed(Exception):
    """As a process that is killed leaves off."""


def killed_after(steps: int) -> Callable[[float, float], None]:
    count = 0

    def stop(_: float, __: float) -> None:
        nonlocal count
        count += 1
        if count == steps:
            raise Killed

    return stop


@pytest.mark.parametrize("steps", [4, 9, 14])
@pytest.mark.parametrize("kind", ["adam", "norms, average, validation"])
def test_a_killed_training_goes_on_bit_for_bit(kind: str, steps: int, tmp_path: Path) -> None:
    student, teacher = pair() if "norms" in kind else (build("mlp", seed=1), build("mlp", seed=2))

    def noise(inputs: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        return {"x": inputs["x"] + torch.randn(inputs["x"].shape, generator=generator)}

    arguments: dict[str, Any] = {"epochs": 3, "batch": 16}
    if "norms" in kind:
        arguments |= {"ema": 0.9, "valid": examples(32, seed=8), "augment": noise}
    whole = recover(student, teacher, examples(), **arguments)
    arguments |= {"checkpoint": tmp_path / "state", "every": 1e-9}
    with pytest.raises(Killed):
        recover(student, teacher, examples(), progress=killed_after(steps), **arguments)
    done = recover(student, teacher, examples(), **arguments)
    assert same(whole, done)
    assert (whole.history, whole.validation) == (done.history, done.validation)
    # What is over stays over.
    assert same(done, recover(student, teacher, examples(), **arguments))


def test_states_of_other_trainings_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    student, teacher = build("mlp", seed=1), build("mlp", seed=2)

    def run(checkpoint: Path = tmp_path, **changed: Any) -> Recovered:
        arguments = {"epochs": 1, "batch": 16, "checkpoint": checkpoint, **changed}
        return recover(student, teacher, examples(), **arguments)

    run()
    with pytest.raises(InputError, match="batch was 16 and is 32"):
        run(batch=32)
    with pytest.raises(InputError, match="student was"):
        recover(build("mlp", seed=3), teacher, examples(), epochs=1, batch=16, checkpoint=tmp_path)
    with pytest.raises(InputError, match="penalties count"):
        run(penalties=(L1(1e-3),))
    file = tmp_path / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(InputError, match="damaged"):
        run()
    (tmp_path / "plain").write_text("a file")
    with pytest.raises(OutputError, match="cannot be written"):
        run(checkpoint=tmp_path / "plain" / "deeper")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_comes_near(precision: str) -> None:
    student, teacher = build("mlp", seed=1), build("mlp", seed=2)
    whole, half = (
        recover(student, teacher, examples(), epochs=12, batch=16, precision=p)
        for p in ("float32", precision)
    )
    assert not half.stopped
    assert half.history[-1] == pytest.approx(whole.history[-1], rel=0.1)
    assert half.history[-1] < 0.5 * half.history[0]
    assert all(value.dtype == torch.float32 for value in weights(half.network).values())


def test_recomputed_activations_change_nothing() -> None:
    student, teacher = pair()
    kept, again = (
        recover(student, teacher, examples(), epochs=2, batch=16, recompute=r)
        for r in (False, True)
    )
    assert same(kept, again)  # the statistics of the batch norms, too


def test_less_is_kept_where_it_is_computed_again() -> None:
    module = nn.Sequential(
        *(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Tanh()) for _ in range(6))
    )
    assert len(blocks(module)) == 6

    def kept() -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.nbytes if not isinstance(tensor, nn.Parameter) else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(torch.randn(32, 64))
        return sum(sizes)

    before = kept()
    with recomputed(module):
        during = kept()
    assert during < before / 3 and kept() == before
    assert not any("forward" in vars(part) for part in module.modules())


def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    def start(index: int, count: int, port: int) -> subprocess.Popen[bytes]:
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
        variables |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        if count > 1:
            variables |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count)}
            variables |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
            variables |= {"MASTER_PORT": str(port)}
        command = [
            sys.executable,
            str(HERE / "train_in_processes.py"),
            str(tmp_path / f"{count}{index}"),
        ]
        return subprocess.Popen(command, env=variables, stderr=subprocess.PIPE)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for process in [start(0, 1, port), start(0, 2, port), start(1, 2, port)]:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()
    one, first, second = (json.loads((tmp_path / name).read_text()) for name in ("10", "20", "21"))
    assert len(one["losses"]) == 12 and first == second
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert first["weights"] == pytest.approx(one["weights"], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accumulate": 0}, "accumulate is 0"),
        ({"batch": 2, "accumulate": 3}, "at least 3 examples"),
        ({"precision": "int8"}, "float32, bfloat16, float16"),
        ({"ema": 1.0}, "between 0 and 1"),
        ({"patience": 2}, "not trained on"),
        ({"device": "nowhere"}, "cannot use it here"),
        ({"every": -1.0}, "every is -1.0"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recover(build("mlp", seed=1), build("mlp", seed=2), examples(), epochs=1, **arguments)


def test_a_network_without_blocks_is_refused() -> None:
    network = build("mlp", seed=1)
    graph = Network(network.traced.module, network.example)
    with pytest.raises(InputError, match="no list or sequence of blocks"):
        recover(graph, build("mlp", seed=2), examples(), epochs=1, recompute=True)
