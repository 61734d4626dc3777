"""The parity gate: an artifact on its runtime against the network that it was made from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from tinier.errors import ParityError
from tinier.network import Network
from tinier.targets.base import Session, is_quantized

# Float32 kernels differ by the order of their sums: 1e-7 to 1e-5 of the output's range in networks of up to a hundred
# layers, 1e-4 with Winograd convolutions. Float16 and bfloat16 in their place give 3e-3 and more.
FLOAT_TOLERANCE = 1e-3
# Two honest runtimes round at different places: ONNX Runtime flips ties (its difference is 0.15 to 0.3 of what quantizing itself
# changes, measured on the demo's ResNet-20), OpenVINO leaves out roundings between fused operators (0.95; it is nearer to the
# network without rounding than the simulation is); independent rounding would give the square root of 2. Saturating, scaled and
# exchanged results give 3 and far more.
NOISE_FACTOR = 2.0
PEAK_FACTOR = 3.0
# If quantizing itself ruined the output, its noise would excuse anything.
NOISE_CAP = 0.05
SAME_DIMENSIONS = ("view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "permute")


@dataclass(frozen=True)
class ParityRow:
    """One output at one batch size.

    Attributes:
        batch: examples in the batch.
        output: its name.
        difference: largest absolute difference between artifact and network.
        relative: the same, as a share of the output's range over all batches.
        steps: the same in quantization steps of the output; None where the output is not quantized.
        noise: root mean square of the difference as a multiple of what quantizing the activations changes; None for float
            networks.
        agreement: share of the examples whose largest value is at the same place; None without such a dimension.
        passed: the difference is what rounding explains.
        reason: why it did not pass, or why it was skipped.
        skipped: this batch size could not be run.
    """

    batch: int
    output: str
    difference: float = 0.0
    relative: float = 0.0
    steps: float | None = None
    noise: float | None = None
    agreement: float | None = None
    passed: bool = True
    reason: str = ""
    skipped: bool = False


@dataclass(frozen=True)
class Parity:
    """What comparing an artifact with its network found.

    Attributes:
        rows: one for each output and batch.
        passed: every row that was run passed, and at least one was run.
        reason: of the first row that did not pass; empty otherwise.
    """

    rows: tuple[ParityRow, ...]
    passed: bool
    reason: str

    def demand(self, artifact: str) -> "Parity":
        """Itself, if it passed.

        Raises:
            ParityError: it did not.
        """
        if not self.passed:
            raise ParityError(f"{artifact} computes something else than its network: {self.reason}")
        return self


def parity(network: Network, session: Session, batches: Sequence[dict[str, Tensor]]) -> Parity:
    """Compare an artifact with its network on batches, such as one of size 1 and a larger one.

    Float networks must agree to 1e-3 of each output's range. For quantized networks, with simulation q, artifact a and the
    network without rounding of activations f, each output must have

        rms(a − q) ≤ 2 rms(f − q)    and    max |a − q| ≤ 3 max |f − q|

    where f also rounds the inputs of products with integer weights that stand alone to eight bits, as runtimes do by themselves (they
    quantize activations dynamically, which is faster). The right sides are taken over all batches, are at least 1e-3 of the output's
    range and one quantization step of the
    output, and at most 10 % and 60 % of the range. Integer outputs must agree but for 1 %, at least one value.

    Args:
        network: what the artifact was made from.
        session: the artifact, opened.
        batches: input name → tensor.

    Returns:
        The figures; sizes that the network cannot take are rows marked as skipped.

    Cost:
        Two runs of the network in torch and one of the artifact for each batch.
    """
    runnable, rows = [], []
    for batch in batches:
        reason = _fixed(network, session, batch)
        if reason:
            rows.append(ParityRow(_size(batch), "", reason=reason, skipped=True))
        else:
            runnable.append(batch)
    references = [_arrays(network(batch)) for batch in runnable]
    names = network.traced.outputs
    ranges = [_range([outputs[i] for outputs in references]) for i in range(len(names))]
    rounding: Sequence[_Rounding | None] = [None] * len(names)
    if runnable and is_quantized(network):
        unrounded = [_arrays(_unrounded(network, batch)) for batch in runnable]
        rounding = [
            _Rounding.of(
                [outputs[i] for outputs in references], [outputs[i] for outputs in unrounded], step
            )
            for i, step in enumerate(_steps(network))
        ]
    for batch, reference in zip(runnable, references, strict=True):
        actual = session.run({name: tensor.numpy() for name, tensor in batch.items()})
        if len(actual) != len(reference):
            reason = f"it has {len(actual)} outputs, the network {len(reference)}"
            rows.append(ParityRow(_size(batch), "", passed=False, reason=reason))
            continue
        for i, name in enumerate(names):
            case = _Case(_size(batch), name, reference[i], ranges[i], rounding[i])
            rows.append(case.row(np.asarray(actual[i])))
    failed = [row for row in rows if not row.passed]
    if failed:
        first = failed[0]
        where = f"batch {first.batch}" + (f", {first.output}" if first.output else "")
        return Parity(tuple(rows), False, f"{where}: {first.reason}")
    if not runnable:
        reason = rows[0].reason if rows else "there was nothing to run"
        return Parity(tuple(rows), False, reason)
    return Parity(tuple(rows), True, "")


@dataclass(frozen=True)
class _Rounding:
    """What quantizing the activations changes in one output, over all batches: root mean square, largest; the output's step."""

    rms: float
    peak: float
    share: float  # of the values, where the output is discrete
    step: float | None

    @staticmethod
    def of(
        rounded: list[np.ndarray], unrounded: list[np.ndarray], step: float | None
    ) -> "_Rounding":
        a, b = (np.concatenate([x.ravel() for x in xs]) for xs in (rounded, unrounded))
        finite = np.isfinite(a) & np.isfinite(b)
        distance = _distance(a[finite], b[finite])
        return _Rounding(
            _rms(distance), float(distance.max(initial=0.0)), float(np.mean(a != b)), step
        )


@dataclass(frozen=True)
class _Case:
    """One output of one batch: what it should be, and what may excuse a difference."""

    batch: int
    output: str
    reference: np.ndarray
    range: float
    rounding: _Rounding | None

    def row(self, actual: np.ndarray) -> ParityRow:
        if actual.shape != self.reference.shape:
            return self._failed(
                f"its shape is {actual.shape}, the network's {self.reference.shape}"
            )
        if not np.issubdtype(self.reference.dtype, np.floating):
            return self._discrete(actual)
        finite = np.isfinite(self.reference)
        same = np.isfinite(actual) == finite
        same &= finite | (actual == self.reference) | (np.isnan(actual) & np.isnan(self.reference))
        if not same.all():
            wrong = int(np.count_nonzero(~same))
            return self._failed(
                f"{wrong} of {same.size} values are NaN or infinite on one side only"
            )
        distance = _distance(actual[finite], self.reference[finite])
        worst, rms = float(distance.max(initial=0.0)), _rms(distance)
        limit, limit_rms = self._limits()
        passed = worst <= limit and rms <= limit_rms
        reason = (
            f"it differs by up to {worst:.3g}, which is {worst / self.range:.2g} of the range, and by {rms:.3g} in "
            f"root mean square; rounding explains {limit:.3g} and {limit_rms:.3g}"
        )
        rounding = self.rounding
        return ParityRow(
            self.batch,
            self.output,
            difference=worst,
            relative=worst / self.range,
            steps=worst / rounding.step if rounding and rounding.step else None,
            noise=rms / rounding.rms if rounding and rounding.rms else None,
            agreement=_agreement(self.reference, actual),
            passed=passed,
            reason="" if passed else reason,
        )

    def _limits(self) -> tuple[float, float]:
        """The largest difference and root mean square that may be."""
        floor = FLOAT_TOLERANCE * self.range
        if self.rounding is None:
            return floor, floor
        # A flip of one step comes out of float arithmetic as one step and a little.
        floor = max(floor, 1.001 * (self.rounding.step or 0.0))
        peak = min(self.rounding.peak, 4 * NOISE_CAP * self.range)
        rms = min(self.rounding.rms, NOISE_CAP * self.range)
        return max(floor, PEAK_FACTOR * peak), max(floor, NOISE_FACTOR * rms)

    def _discrete(self, actual: np.ndarray) -> ParityRow:
        wrong = int(np.count_nonzero(actual != self.reference))
        allowed = max(1, actual.size // 100)
        if self.rounding is not None:
            share = min(self.rounding.share, NOISE_CAP)
            allowed = max(allowed, int(NOISE_FACTOR * share * actual.size))
        worst = float(_distance(actual, self.reference).max(initial=0.0))
        return ParityRow(
            self.batch,
            self.output,
            difference=worst,
            relative=worst / self.range,
            agreement=1 - wrong / max(actual.size, 1),
            passed=wrong <= allowed,
            reason=f"{wrong} of {actual.size} values differ; {allowed} may" * (wrong > allowed),
        )

    def _failed(self, reason: str) -> ParityRow:
        return ParityRow(self.batch, self.output, passed=False, reason=reason)


class _Unrounded(fx.Interpreter):
    """Runs a quantized graph without quantizing activations; weights stay what they are.

    Products of float activations with integer weights are the other way round: ONNX Runtime and OpenVINO round those activations to
    eight bits by themselves, a range for each block of a row. Here each whole row has one, which rounds at least as much.
    """

    def run_node(self, node: fx.Node) -> Any:
        sources = {s: self.env[s] for s in _multiplied(node)}
        if not sources:
            return super().run_node(node)
        self.env |= {source: _rounded_rows(kept) for source, kept in sources.items()}
        result = super().run_node(node)
        self.env |= {source: kept for source, kept in sources.items() if source in self.env}
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(target, "namespace", "") == "tinier":
            return args[0]
        if getattr(target, "namespace", "") == "quantized_decomposed":
            quantizes = target.__name__.startswith("quantize")
            if quantizes or (isinstance(args[0], Tensor) and args[0].is_floating_point()):
                return args[0]
        return super().call_function(target, args, kwargs)


def _multiplied(node: fx.Node) -> list[fx.Node]:
    """Floats that an operator multiplies with integer weights alone."""
    if node.op != "call_function":
        return []
    name = _operator(node)
    if name in ("linear", "mm", "addmm", "matmul"):
        first = 1 if name == "addmm" else 0
        pairs = [node.args[first : first + 2]]
    elif name.endswith("_cell"):
        state = node.args[1]
        hidden = state[0] if isinstance(state, list | tuple) else state
        pairs = [(node.args[0], node.args[2]), (hidden, node.args[3])]
    else:
        return []
    return [x for x, w in pairs if isinstance(x, fx.Node) and _stored(w) and not _stored(x)]


def _stored(node: Any) -> bool:
    """Whether a value comes from integers."""
    while isinstance(node, fx.Node) and _operator(node) in ("t", "transpose", "permute"):
        node = node.args[0]
    return isinstance(node, fx.Node) and _operator(node).startswith(("dequantize", "round_"))


def _rounded_rows(x: Tensor) -> Tensor:
    """Each row rounded to 8 bits: −127 … 127, the largest of it at the end."""
    step = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return (x / step).round() * step


def _unrounded(network: Network, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    traced = network.traced
    with torch.no_grad():
        return _Unrounded(traced.module).run(*[batch[name] for name in traced.inputs])


def _steps(network: Network) -> list[float | None]:
    """The quantization step of each output, where the last thing that happens to it is quantization."""
    (output,) = network.traced.module.graph.find_nodes(op="output")
    steps: list[float | None] = []
    for node in output.args[0]:
        while node.op == "call_function" and _operator(node) in SAME_DIMENSIONS:
            node = node.args[0]
        quantized = _operator(node).startswith("dequantize_per_tensor") and len(node.args) > 1
        scale = node.args[1] if quantized else None
        steps.append(float(scale) if isinstance(scale, int | float) else None)
    return steps


def _operator(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", "")).partition(".")[0]


def _fixed(network: Network, session: Session, batch: dict[str, Tensor]) -> str:
    """Why this batch size cannot be run; empty if it can."""
    size = _size(batch)
    fixed = (
        {len(tensor) for tensor in network.example.values()}
        if not network.traced.batched
        else set()
    )
    fixed |= {port.shape[0] for port in session.inputs if port.shape and port.shape[0] is not None}
    other = sorted(k for k in fixed if k is not None and k != size)
    return f"skipped: batch is fixed at {other[0]}" if other else ""


def _size(batch: dict[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def _arrays(outputs: Sequence[Tensor]) -> list[np.ndarray]:
    return [output.detach().numpy() for output in outputs]


def _range(outputs: list[np.ndarray]) -> float:
    """Largest less smallest value over all batches; where all are equal, their size, and 1 for zeros."""
    values = (
        np.concatenate([x.astype(np.float64).ravel() for x in outputs]) if outputs else np.zeros(0)
    )
    values = values[np.isfinite(values)]
    if not values.size:
        return 1.0
    return float(np.ptp(values)) or float(np.abs(values).max()) or 1.0


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(np.float64) - b.astype(np.float64))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2))) if values.size else 0.0


def _agreement(reference: np.ndarray, actual: np.ndarray) -> float | None:
    """Share of rows with their largest value at the same place along the last dimension."""
    if reference.ndim < 2 or reference.shape[-1] < 2 or not reference.size:
        return None
    return float(np.mean(reference.argmax(-1) == actual.argmax(-1)))
