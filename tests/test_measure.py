"""Measurements against oracles: sessions whose time, memory and errors are known."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn

from tinier.errors import InputError, ParityError
from tinier.measure import machine as facts
from tinier.measure.files import measure_files
from tinier.measure.latency import Latency, interleaved, ratio
from tinier.measure.machine import default_threads, machine
from tinier.measure.memory import peak_memory
from tinier.measure.parity import Parity, parity
from tinier.network import Network
from tinier.targets.base import Session, targets_for

pairs = torch.ops.quantized_decomposed
X = {"x": np.zeros((1, 3), np.float32)}


# Latency --------------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when a session says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(Session):
    """Takes the times of an iterator in turn, and remembers when it ran."""

    def __init__(self, clock: Clock, times: Iterator[float], log: list[str], name: str) -> None:
        self.clock, self.times, self.log, self.name = clock, times, log, name
        self.threads = 3

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        self.clock.now += next(self.times)
        self.log.append(self.name)
        return []


def steady(seconds: float, spread: float = 0.0, seed: int = 0) -> Iterator[float]:
    rng = np.random.default_rng(seed)
    while True:
        yield float(seconds * np.exp(spread * rng.standard_normal()))


def timed(
    seconds: float = 3.0, seed: int = 0, **times: Iterator[float]
) -> tuple[dict[str, Latency], list[str]]:
    clock, log = Clock(), []  # type: ignore[var-annotated]
    sessions = {name: Timed(clock, values, log, name) for name, values in times.items()}
    return interleaved(sessions, X, seconds=seconds, seed=seed, clock=clock), log


def test_known_latencies_come_out() -> None:
    found, _ = timed(a=steady(0.004), b=steady(0.001))
    assert found["a"].median == pytest.approx(4.0)
    assert found["b"].median == pytest.approx(1.0)
    assert found["b"].p95 == pytest.approx(1.0)
    assert found["a"].threads == 3
    times = ratio(found["a"], found["b"])
    assert times.value == pytest.approx(4.0) and times.low == pytest.approx(times.high)


def test_real_sleeps_within_a_fifth(tmp_path: Path) -> None:
    target = targets_for("null")[0]
    sessions = {
        name: target.open(null_file(tmp_path, seconds), 1)
        for name, seconds in {"a": 0.04, "b": 0.01}.items()
    }
    found = interleaved(sessions, X, seconds=1.5)
    assert ratio(found["a"], found["b"]).value == pytest.approx(4.0, rel=0.2)


def test_the_interval_of_the_median_covers_it() -> None:
    covered = 0
    for seed in range(24):
        found, _ = timed(a=steady(0.003, 0.3, seed), seconds=1.0)
        assert found["a"].low <= found["a"].median <= found["a"].high
        # Bursts of three or four runs have medians with the median of the runs.
        covered += found["a"].low <= 3.0 <= found["a"].high
    assert covered >= 19  # 23 expected; 18 or fewer has a probability under 0.1 %


def test_what_slows_the_whole_machine_leaves_the_ratio() -> None:
    clock = Clock()

    def drifting(seconds: float) -> Iterator[float]:
        while True:
            yield seconds * (1 + 3 * clock.now)

    log: list[str] = []
    sessions = {
        "a": Timed(clock, drifting(0.002), log, "a"),
        "b": Timed(clock, drifting(0.001), log, "b"),
    }
    found = interleaved(sessions, X, seconds=2.0, clock=clock)
    assert found["a"].high > 2 * found["a"].low or found["a"].p95 > 2 * found["a"].rounds[0]
    assert ratio(found["a"], found["b"]).value == pytest.approx(2.0, rel=0.05)


def test_turns_alternate_and_orders_are_seeded() -> None:
    _, log = timed(a=steady(0.002), b=steady(0.002), c=steady(0.002))
    turns = [name for i, name in enumerate(log) if i == 0 or log[i - 1] != name]
    longest = max(turns[i : i + 4].count(name) for i in range(len(turns)) for name in "abc")
    assert longest <= 2
    assert log == timed(a=steady(0.002), b=steady(0.002), c=steady(0.002))[1]
    assert log != timed(a=steady(0.002), b=steady(0.002), c=steady(0.002), seed=1)[1]


def test_a_slow_session_does_not_starve_the_others() -> None:
    found, _ = timed(slow=steady(1.0), quick=steady(0.001), seconds=4.0)
    assert len(found["slow"].rounds) == 5 == len(found["quick"].rounds)
    assert found["quick"].runs >= 1000
    assert found["slow"].median == pytest.approx(1000.0)


def test_a_slow_first_run_is_warm_up() -> None:
    def first() -> Iterator[float]:
        yield 1.0
        yield 0.5
        yield from steady(0.001)

    found, _ = timed(a=first())
    assert found["a"].p95 == pytest.approx(1.0)


def test_time_spent_is_the_time_given() -> None:
    clock, log, seen = Clock(), [], []  # type: ignore[var-annotated]
    sessions = {"a": Timed(clock, steady(0.002), log, "a")}
    interleaved(sessions, X, seconds=2.0, clock=clock, progress=seen.append)
    assert clock.now == pytest.approx(2.0, rel=0.05)
    assert seen == sorted(seen) and seen[-1] == pytest.approx(2.0, rel=0.05)


def test_latency_needs_sessions_and_time() -> None:
    with pytest.raises(InputError, match="nothing to measure"):
        interleaved({}, X, seconds=1)
    with pytest.raises(InputError, match="seconds is 0"):
        timed(a=steady(0.001), seconds=0)
    one, _ = timed(a=steady(0.001), seconds=1)
    other, _ = timed(a=steady(0.001), seconds=2)
    with pytest.raises(InputError, match="one call"):
        ratio(one["a"], other["a"])


# Parity ---------------------------------------------------------------------------------------------------------------


def quantize(x: Tensor, step: float, zero: int = 128) -> Tensor:
    q = pairs.quantize_per_tensor(x, step, zero, 0, 255, torch.uint8)
    return pairs.dequantize_per_tensor(q, step, zero, 0, 255, torch.uint8)


class IntegerMLP(nn.Module):
    """Two layers with int8 weights and uint8 activations, as static quantization makes them."""

    def __init__(self) -> None:
        super().__init__()
        seeded = torch.Generator().manual_seed(0)
        self.w1 = nn.Buffer(torch.randint(-127, 128, (32, 64), generator=seeded).float() / 127)
        self.w2 = nn.Buffer(torch.randint(-127, 128, (10, 32), generator=seeded).float() / 127)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = quantize((quantize(x, 1 / 255, 0) @ self.w1.T).relu(), 0.05, 0)
        logits = hidden @ self.w2.T
        return logits, quantize(logits, 0.25)


class FloatMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.body(x)
        return logits, logits.argmax(-1)


def pixels(batch: int) -> dict[str, Tensor]:
    return {"x": torch.rand(batch, 64, generator=torch.Generator().manual_seed(batch))}


BATCHES = [pixels(1), pixels(16)]


class Altered(Session):
    """A network's own outputs, changed."""

    def __init__(self, network: Network, change: Any) -> None:
        self.network, self.change = network, change

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        outputs = self.network({name: torch.from_numpy(x) for name, x in inputs.items()})
        return self.change([output.numpy().copy() for output in outputs])


@pytest.fixture(scope="module")
def integer() -> Network:
    return Network(IntegerMLP(), pixels(2), "integer")


@pytest.fixture(scope="module")
def real() -> Network:
    torch.manual_seed(0)
    return Network(FloatMLP(), pixels(2), "real")


def compare(network: Network, change: Any) -> Parity:
    return parity(network, Altered(network, change), BATCHES)


def same(outputs: list[np.ndarray]) -> list[np.ndarray]:
    return outputs


def flips(outputs: list[np.ndarray]) -> list[np.ndarray]:
    """One value in fifty of the quantized output is a step off, as where ties are rounded the other way."""
    rng = np.random.default_rng(0)
    logits, rounded = outputs
    return [logits, rounded + np.float32(0.25) * (rng.random(rounded.shape) < 0.02)]


WRONG = {
    "scaled": lambda out: [1.2 * out[0], out[1]],
    "swapped columns": lambda out: [out[0][:, ::-1], out[1]],
    "one column": lambda out: [np.where(np.arange(10) == 3, 0, out[0]), out[1]],
    "shifted by two steps": lambda out: [out[0], out[1] + np.float32(0.5)],
    "not a number": lambda out: [np.where(out[0] > out[0].mean(), np.nan, out[0]), out[1]],
    "another example's": lambda out: [np.roll(out[0], 1, axis=0) + (len(out[0]) == 1), out[1]],
    "shape": lambda out: [out[0][:, :5], out[1]],
    "one output": lambda out: out[:1],
}


def test_equal_outputs_pass(integer: Network, real: Network) -> None:
    for network in (integer, real):
        found = compare(network, same)
        assert found.passed and not found.reason and len(found.rows) == 4
        assert all(row.difference == 0 for row in found.rows)
        assert {row.batch for row in found.rows} == {1, 16}
        assert found.demand("it") is found


def test_flipped_ties_pass(integer: Network) -> None:
    found = compare(integer, flips)
    assert found.passed, found.reason
    row = found.rows[-1]
    assert row.steps == pytest.approx(1.0, rel=1e-3) and row.noise is not None and row.noise < 2


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_caught(name: str, integer: Network) -> None:
    found = compare(integer, WRONG[name])
    assert not found.passed
    assert "batch" in found.reason
    with pytest.raises(ParityError, match="it computes something else"):
        found.demand("it")


def saturating(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The first layer as x86 without VNNI computes it: pairs of u8 × s8 products summed in 16 bits."""
    module = IntegerMLP()
    x = np.round(inputs["x"] * 255).astype(np.int64)
    w1, w2 = (np.round(w.numpy() * 127).astype(np.int64) for w in (module.w1, module.w2))
    products = x[:, None, :] * w1[None]
    sums = np.clip(products.reshape(*products.shape[:2], -1, 2).sum(-1), -32768, 32767).sum(-1)
    hidden = np.clip(np.round(np.maximum(sums / 255 / 127, 0) / 0.05), 0, 255)
    logits = torch.from_numpy((hidden @ w2.T) * 0.05 / 127).float()
    return [logits.numpy(), quantize(logits, 0.25).numpy()]


def test_saturating_kernels_are_caught_and_exact_ones_are_not(
    integer: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kernel(Session):
        def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            return saturating(inputs)

    assert not parity(integer, Kernel(), BATCHES).passed
    monkeypatch.setattr(np, "clip", lambda x, low, high: x)  # 32-bit sums do not saturate
    exact = parity(integer, Kernel(), BATCHES)
    assert exact.passed, exact.reason


def test_float_networks_must_be_float(real: Network) -> None:
    def rounded(bits: int) -> Any:
        def change(out: list[np.ndarray]) -> list[np.ndarray]:
            noise = np.random.default_rng(0).uniform(-1, 1, out[0].shape) * 2.0**-bits
            return [(out[0] * (1 + noise)).astype(np.float32), out[1]]

        return change

    assert compare(real, rounded(20)).passed
    assert not compare(real, rounded(7)).passed  # bfloat16
    exchanged = compare(real, lambda out: [out[0], (out[1] + 1) % 10])
    assert "16 of 16 values differ" in [row.reason for row in exchanged.rows][-1]


def test_fixed_batches_are_skipped_and_said(integer: Network) -> None:
    torch.manual_seed(0)
    fixed = Network(FloatMLP(), pixels(1), "fixed")
    found = parity(fixed, Altered(fixed, same), BATCHES)
    assert found.passed
    assert [row.skipped for row in found.rows] == [True, False, False]
    assert found.rows[0].batch == 16 and "batch is fixed at 1" in found.rows[0].reason
    nothing = parity(fixed, Altered(fixed, same), BATCHES[1:])
    assert not nothing.passed and "fixed at 1" in nothing.reason
    assert "nothing to run" in parity(integer, Altered(integer, same), []).reason


# Memory ---------------------------------------------------------------------------------------------------------------


def null_file(folder: Path, seconds: float = 0.0, memory: int = 0, name: str = "x") -> Path:
    file = folder / f"{seconds:g}-{memory}.null.json"
    port = '{"shape": [null, 3], "dtype": "float32"}'
    file.write_text(
        f'{{"seconds": {seconds}, "memory": {memory}, '
        f'"inputs": {{"{name}": {port}}}, "outputs": {{"y": {port}}}}}',
        encoding="utf-8",
    )
    return file


def test_peak_memory_grows_by_what_is_allocated(tmp_path: Path) -> None:
    size = 150_000_000
    small = peak_memory("null", null_file(tmp_path), X, 1)
    large = peak_memory("null", null_file(tmp_path, memory=size), {"file": X["x"]}, 1)
    assert large.peak - small.peak == pytest.approx(size, rel=0.05)
    assert large.added == pytest.approx(size, rel=0.1)
    assert large.baseline == pytest.approx(small.baseline, rel=0.1)
    assert small.baseline < 120_000_000  # numpy alone; torch is not imported


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"broken\.null\.json.*exit code 1.*JSONDecodeError"):
        broken = tmp_path / "broken.null.json"
        broken.write_text("{", encoding="utf-8")
        peak_memory("null", broken, X, 1)


def test_a_process_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"took more than 0\.01 s"):
        peak_memory("null", null_file(tmp_path), X, 1, limit=0.01)


# Machine --------------------------------------------------------------------------------------------------------------


def test_facts_of_this_machine() -> None:
    here = machine()
    assert here.cpu and here.architecture
    assert 1 <= here.cores <= here.logical
    assert here.memory > 2**28
    assert set(here.flags) <= set(facts.INSTRUCTIONS)
    assert {"onnxruntime", "openvino", "torch"} <= set(here.runtimes)
    assert here.runtimes["torch"].version == torch.__version__


@pytest.mark.parametrize(
    ("architecture", "cpuinfo", "flags", "vnni"),
    [
        ("x86_64", "flags\t\t: sse2 avx2", ("avx2",), False),
        (
            "x86_64",
            "flags : avx2 avx512f avx512_vnni amx_int8",
            ("avx512_vnni", "amx_int8", "avx2", "avx512f"),
            True,
        ),
        ("aarch64", "Features\t: fp asimd asimddp i8mm", ("asimddp", "i8mm"), True),
        ("aarch64", "Features\t: fp asimd", (), True),
    ],
)
def test_flags_of_other_machines(
    architecture: str,
    cpuinfo: str,
    flags: tuple[str, ...],
    vnni: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = facts._read
    monkeypatch.setattr(facts, "_read", lambda f: cpuinfo if f == "/proc/cpuinfo" else read(f))
    monkeypatch.setattr(facts.platform, "machine", lambda: architecture)
    found = machine.__wrapped__()
    assert found.flags == flags and found.vnni is vnni


def test_threads_respect_affinity_quota_and_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/sys/fs/cgroup/cpu.max": "max 100000"}
    for core in range(8):
        name = f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
        files[name] = f"{core % 4},{core % 4 + 4}"
    monkeypatch.setattr(facts, "_read", lambda file: files.get(file, ""))
    monkeypatch.setattr(facts.psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
    allowed = frozenset(range(8))
    monkeypatch.setattr(facts, "_affinity", lambda: allowed)
    assert default_threads() == 4
    allowed = frozenset({0, 4, 1})
    assert default_threads() == 2
    files["/sys/fs/cgroup/cpu.max"] = "150000 100000"
    allowed = frozenset(range(8))
    assert default_threads() == 2
    files["/sys/fs/cgroup/cpu.max"] = "50000 100000"
    assert default_threads() == 1


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small model in three forms."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    network = Network(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), {"input": torch.randn(2, 6)})
    onnx_file = None
    for target in targets_for(["onnxruntime", "openvino", "torch"]):
        artifact = target.lower(network, folder, onnx_file)
        onnx_file = onnx_file or artifact.files[0]
    return folder


def test_files_are_measured_together(models: Path) -> None:
    paths: list[str | Path] = [
        models / "model.onnx",
        f"openvino:{models / 'model.onnx'}",
        models / "model.pt2",
    ]
    rows = measure_files(paths, batch=3, threads=1, seconds=0.4, memory=False)
    assert [row.target for row in rows] == ["onnxruntime", "openvino", "torch"]
    assert [row.ratio is None for row in rows] == [True, False, False]
    assert all(row.latency.median > 0 and row.latency.threads == 1 for row in rows)
    assert rows[0].size == rows[1].size == (models / "model.onnx").stat().st_size


def test_memory_of_every_kind_of_file(models: Path) -> None:
    (row,) = measure_files([models / "openvino_model.xml"], threads=1, seconds=0.1)
    assert row.memory is not None and row.memory.peak > row.memory.baseline > 2**24
    assert row.size > (models / "openvino_model.bin").stat().st_size
    (row,) = measure_files([models / "model.onnx"], threads=1, seconds=0.1)
    assert row.memory is not None and row.memory.peak > row.memory.baseline > 2**24


def test_folders_hold_one_model(models: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes((models / "model.onnx").read_bytes())
    (row,) = measure_files([tmp_path], threads=1, seconds=0.1, memory=False)
    assert row.path == tmp_path / "model.onnx"
    with pytest.raises(InputError, match=r"holds 3 models: model\.onnx, model\.pt2"):
        measure_files([models])


def test_inputs_are_made_for_free_dimensions(tmp_path: Path) -> None:
    file = null_file(tmp_path)
    text = file.read_text(encoding="utf-8").replace("[null, 3]", "[null, null]")
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"\(\?, \?\), with free dimensions.*x=1x128"):
        measure_files([file], memory=False)
    (row,) = measure_files([file], shapes={"x": (1, 5)}, seconds=0.1, memory=False)
    assert row.target == "null"
    with pytest.raises(InputError, match="no input z; it has x"):
        measure_files([file], shapes={"z": (1, 5)})
    with pytest.raises(InputError, match="2 dimensions; got 1"):
        measure_files([file], shapes={"x": (1,)})


def test_files_that_cannot_be_measured_are_named(models: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    cases: dict[str, str] = {
        "missing.onnx": "no such file",
        "missing.bin": "no such file",
        "empty.onnx": "is empty",
        "notes.txt": "no runtime is known.*txt.*give .onnx",
        "folder": "holds no model",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=f"{name}.*{message}"):
            measure_files([tmp_path / name])
    with pytest.raises(InputError, match="no files"):
        measure_files([])
    with pytest.raises(InputError, match="batch is 0"):
        measure_files([models / "model.onnx"], batch=0)
    with pytest.raises(InputError, match="must take the same inputs"):
        measure_files([models / "model.onnx", null_file(tmp_path)], memory=False)


def test_the_probe_is_a_program_of_its_own() -> None:
    assert "tinier.measure.probe" not in sys.modules
    source = Path(facts.__file__).with_name("probe.py").read_text(encoding="utf-8")
    assert "import tinier" not in source and "from tinier" not in source
