"""Reconstruction: a stretch of a quantized network is trained to answer as in the float network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, fx

from tinier.modules.fake_quantize import ActivationQuantizer, Step
from tinier.recovery.segments import Runner, Segment, Values, bytes_of
from tinier.recovery.soft_weights import SoftRunner, SoftWeight
from tinier.tensors.dropped_rounding import partly_rounded
from tinier.tensors.rounding import annealed_beta, rounding_penalty

ROUNDING_RATE, STEP_RATE = 3e-2, 1e-3  # Adam's, for V and for the logarithms of steps
PENALTY = 3.0  # λ
SHIFTS = 2**16  # places in the random numbers at which a mask can start


@dataclass(frozen=True)
class Part:
    """Some examples of a stretch.

    Attributes:
        inputs: what it reads in the quantized network, by node.
        targets: what its outputs are in the float network.
    """

    inputs: Values
    targets: list[Tensor]

    @property
    def size(self) -> int | None:
        """How many examples; None where a value has them along another dimension, or is no tensor."""
        values = [*self.inputs.values(), *self.targets]
        sizes = {len(v) if isinstance(v, Tensor) and v.ndim else None for v in values}
        return sizes.pop() if len(sizes) == 1 else None

    @classmethod
    def joined(cls, parts: "Sequence[Part]") -> "Part":
        """All of their examples."""
        inputs = {
            node: torch.cat([part.inputs[node] for part in parts]) for node in parts[0].inputs
        }
        return cls(
            inputs, [torch.cat(rows) for rows in zip(*(p.targets for p in parts), strict=True)]
        )

    def rows(self, index: Tensor | slice) -> "Part":
        """Those examples."""
        inputs = {node: value[index] for node, value in self.inputs.items()}
        return Part(inputs, [target[index] for target in self.targets])


@dataclass(frozen=True)
class Training:
    """How each stretch is trained.

    Attributes:
        steps: at least 1.
        batch: examples in a step.
        drop: probability with which a value of an activation stays float.
        memory: bytes that a step may keep for its gradient; the examples of a step go through one after the other where they need more.
        free: whether dimension 0 is the examples everywhere, so that any of them make a batch.
    """

    steps: int
    batch: int
    drop: float
    memory: int
    free: bool

    def train(
        self,
        module: fx.GraphModule,
        unit: Segment,
        data: Sequence[Part],
        weights: list[SoftWeight],
        steps: list[Step],
        scale: float,
    ) -> None:
        """Train V of the weights and θ of the steps, in place.

        Args:
            module: with quantizers.
            unit: the stretch.
            data: of the stretch.
            weights: of the stretch.
            steps: of activations.
            scale: E₀.
        """
        thetas = [step.theta.requires_grad_() for step in steps]
        groups = [
            {"params": [weight.v for weight in weights], "lr": ROUNDING_RATE},
            {"params": thetas, "lr": STEP_RATE},
        ]
        optimizer = torch.optim.Adam([group for group in groups if group["params"]])
        count = sum(weight.v.numel() for weight in weights)
        energy = energy_of(data)
        runner = self._runner(module, unit, weights)
        for number in range(self.steps):
            optimizer.zero_grad()
            batch = self._batch(data)
            parts = self._parts(unit, batch)
            for part in parts:
                values = runner.run_stretch(unit.nodes, part.inputs, unit.outputs)
                found = [values[node] for node in unit.outputs]
                loss = distance(found, part.targets, energy) / scale
                if len(parts) > 1:
                    loss = loss * (part.size or 0) / (batch.size or 1)
                loss.backward()
            beta = annealed_beta(number, self.steps)
            if beta is not None:
                penalty = torch.stack([rounding_penalty(weight.v, beta) for weight in weights])
                (PENALTY * penalty.sum() / count).backward()
            optimizer.step()
        for theta in thetas:
            theta.requires_grad_(False)

    def _runner(
        self, module: fx.GraphModule, unit: Segment, weights: list[SoftWeight]
    ) -> SoftRunner:
        random = _Random(self.drop)
        instead: dict[fx.Node, Callable[[Tensor], Tensor]] = {w.call: w.soft for w in weights}
        for node in unit.nodes:
            if node.op == "call_module":
                own = module.get_submodule(str(node.target))
                if isinstance(own, ActivationQuantizer):
                    instead[node] = random.rounding(own)
        return SoftRunner(module, instead)

    def _batch(self, data: Sequence[Part]) -> Part:
        """Random examples of a part, or of several small ones; all of a part where it cannot be taken apart."""
        size = data[0].size
        if not self.free or not size:
            return data[int(torch.randint(len(data), ()))]
        chosen = [data[int(n)] for n in torch.randperm(len(data))[: ceil(self.batch / size)]]
        part = chosen[0] if len(chosen) == 1 else Part.joined(chosen)
        count = part.size or 0
        return part if count <= self.batch else part.rows(torch.randperm(count)[: self.batch])

    def _parts(self, unit: Segment, batch: Part) -> list[Part]:
        size = batch.size
        if not self.free or size is None:
            return [batch]
        # Each operator's result, and as much again of what gradients are made of.
        count = min(ceil(2 * bytes_of(unit.nodes) * size / self.memory), size)
        each = ceil(size / max(count, 1))
        if each >= size:
            return [batch]
        return [batch.rows(slice(start, start + each)) for start in range(0, size, each)]


class _Random:
    """Masks of zeros and ones: random numbers that are drawn once, read from a random place on."""

    def __init__(self, drop: float) -> None:
        self.drop = drop
        self.pool = torch.empty(0)  # (n,) float32

    def rounding(self, own: ActivationQuantizer) -> Callable[[Tensor], Tensor]:
        """A quantizer of which each value stays float with the probability."""
        zero_point = int(own.zero_point)

        def forward(x: Tensor) -> Tensor:
            ends = own.integers.low, own.integers.high
            return partly_rounded(x, own.step(), zero_point, *ends, self._mask(x))

        return forward

    def _mask(self, x: Tensor) -> Tensor:
        if len(self.pool) < x.numel() + SHIFTS:
            self.pool = (torch.rand(x.numel() + SHIFTS) >= self.drop).float()
        first = int(torch.randint(SHIFTS, ()))
        part = self.pool[first : first + x.numel()]
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return part.as_strided(x.shape, x.stride(), first)  # in the order of memory
        return part.view(x.shape)


def error_of(runner: Runner, unit: Segment, data: Sequence[Part]) -> float:
    """E ‖y − ŷ‖² / ‖y‖² of a stretch as the graph has it, on average over its outputs."""
    energy = energy_of(data)
    total = 0.0
    with torch.no_grad():
        for part in data:
            values = runner.run_stretch(unit.nodes, part.inputs, unit.outputs)
            total += float(distance([values[n] for n in unit.outputs], part.targets, energy))
    return total / len(data)


def energy_of(data: Sequence[Part]) -> list[float]:
    """Mean square of each output over the data."""
    sums = [
        (float(torch.stack([t.double().square().mean() for t in parts]).mean()))
        for parts in zip(*(part.targets for part in data), strict=True)
    ]
    return [max(value, 1e-30) for value in sums]


def distance(found: list[Any], targets: list[Tensor], energy: list[float]) -> Tensor:
    """Mean squared error of each output, relative to its mean square; their mean."""
    parts = [
        (ours - theirs).square().mean() / size
        for ours, theirs, size in zip(found, targets, energy, strict=True)
        if ours.is_floating_point()
    ]
    return torch.stack(parts).mean() if parts else torch.zeros(())
