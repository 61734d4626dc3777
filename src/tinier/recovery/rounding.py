"""Rounding that is learned on data: each weight goes up or down so that a layer or block answers as in the float network."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from tinier.edits.base import Edit, Plan, Values
from tinier.edits.fake_quantize import QUANTIZERS, split, trainable
from tinier.edits.quantize import Quantize, QuantizeWeight
from tinier.errors import DataError, InputError
from tinier.graph.fold import fold
from tinier.graph.states import evaluating
from tinier.modules.fake_quantize import ActivationQuantizer, Step, WeightQuantizer
from tinier.network import Network
from tinier.recovery.reconstruction import Part, Training, error_of
from tinier.recovery.segments import Cuts, Runner, Segment, bytes_of
from tinier.recovery.segments import Values as Found
from tinier.recovery.soft_weights import SoftWeight

STEPS = 400
MEMORY = 2**31
MOST_WEIGHTS = 3  # of layers that are learned together although there is a cut between them
LARGEST_BLOCK = 8  # a stretch with more weights than this is learned layer by layer
LEAST, CHUNK = 8, 64  # examples that run through a network at once


@dataclass(frozen=True)
class Learned:
    """A plan whose integers were learned.

    Attributes:
        plan: as before, with ``integers`` for weights and, where they learned, other scales of activations.
        notes: what there is to say of single layers.
        errors: stretch (its weights) → ‖y − ŷ‖² / ‖y‖² on the data, before and after.
        cached: the most bytes of inputs and outputs that were kept at once.
    """

    plan: Plan
    notes: tuple[str, ...]
    errors: Mapping[str, tuple[float, float]]
    cached: int


def learn_rounding(
    network: Network,
    plan: Plan,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    blocks: bool = False,
    steps: int = STEPS,
    batch: int = 16,
    drop: float = 0.5,
    saturation_free: bool = False,
    memory: int = MEMORY,
    seed: int = 0,
) -> Learned:
    """Choose for each weight whether it is rounded up or down, in the order of the graph.

        min over V, s:  E ‖y − f(x̂; ŵ(V), s)‖² / E₀ + λ Σ (1 − |2 h(V) − 1|^β) / n

    y is what a layer (with its activation function) or block gives in the float network, x̂ what it reads in the network that is
    quantized up to it, E₀ the error at the start, n the number of weights; β falls from 20 to 2. Where activations are quantized, each of
    their values stays float with probability ``drop`` while V is learned, and the steps s of those inside are learned along.

    Args:
        network: the folded float network; left as it is.
        plan: its `Quantize` and `QuantizeWeight` edits, with any integers; the grids of weights stay.
        batches: a few hundred examples: input name → tensor, dimension 0 the batch.
        blocks: all weights between two cuts of the graph together: residual blocks, and neighbouring layers up to three.
        steps: of the training of each layer or block, at least 1.
        batch: examples in a step.
        drop: in [0, 1].
        saturation_free: integers whose pairs would saturate 16-bit sums are moved towards 0.
        memory: bytes of inputs and outputs that are kept at once, whatever the depth: those of both networks at one cut, and those of one
            stretch. Fewer examples are used where more do not fit, 8 at the least. As much again may be used inside of a stretch.
        seed: of the examples in each step and of what is dropped.

    Returns:
        The plan with integers. No layer or block is further from the float network on the data than with the plan's own integers: where
        learning does not help, these stay, and the notes say so. So do weights that more than one layer reads, and embeddings.

    Raises:
        InputError: an argument out of its range.
        DataError: there are no examples.

    Cost:
        For each layer or block ``steps`` forward and backward passes of ``batch`` examples, over one after the other where their values
        would take more than ``memory``; runs of both networks over the data, as many as there are layers between two cuts. Peak memory is
        about twice ``memory``.

    Source:
        Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization"; Li et al. 2021, "BRECQ"; Wei et al. 2022,
        "QDrop".

    Differs:
        Errors are relative and the penalty is a mean, so that one λ does for all layers; blocks are found in the graph, and are
        weighted by their outputs, not by the Fisher information; dropped are values of the quantized network, not of the float one, by
        random numbers that are drawn once for a stretch and read from another place in each step.
    """
    if steps < 1 or batch < 1 or not 0 <= drop <= 1:
        raise InputError(
            f"learned rounding: steps={steps}, batch={batch}, drop={drop}: steps and batch of at least 1, drop in [0, 1] are needed"
        )
    before, _ = split(plan)
    student = trainable(network, plan)
    assert isinstance(student.module, fx.GraphModule)
    teacher = fold(before.apply(network).traced.module)
    with torch.random.fork_rng(devices=[]), evaluating(student.module):
        torch.manual_seed(seed)
        for parameter in student.module.parameters():
            parameter.requires_grad_(False)
        training = Training(steps, batch, drop, memory, network.traced.batched)
        learner = _Learner(student, teacher, training, saturation_free)
        learner.run(_Examples(network, batches, seed), blocks, memory)
    learned = _plan(plan, student.module, learner)
    return Learned(learned, tuple(learner.notes), learner.errors, learner.cached)


class _Learner:
    def __init__(
        self, student: Network, teacher: fx.GraphModule, training: Training, saturation_free: bool
    ) -> None:
        assert isinstance(student.module, fx.GraphModule)
        self.module, self.training = student.module, training
        calls = self.module.graph.find_nodes(op="call_module")
        self.quantizers = {node: self.module.get_submodule(str(node.target)) for node in calls}
        weights = [n for n, q in self.quantizers.items() if isinstance(q, WeightQuantizer)]
        self.cuts = Cuts(self.module, weights)
        self.ours, self.theirs = Runner(self.module), Runner(teacher)
        self.twins = {node.name: node for node in teacher.graph.nodes}
        self.saturation_free = saturation_free
        self.notes: list[str] = []
        self.errors: dict[str, tuple[float, float]] = {}
        self.chosen: dict[str, Tensor] = {}  # parameter → (m, n) integers
        self.sizes: list[int] = []  # of the chunks
        self.pairs: list[tuple[Found, Found]] = []  # at the cut, chunk by chunk, in both networks
        self.cached = 0  # the most bytes

    def run(self, examples: "_Examples", blocks: bool, memory: int) -> None:
        """Learn one stretch after the other, and carry the data through both networks."""
        segments = self.cuts.segments(MOST_WEIGHTS)
        width = max(bytes_of(segment.outputs) for segment in segments)
        # Runs of both networks go through one after the other, each with all that it computes.
        peak = max(self.cuts.peak(segment) for segment in segments)
        chunks = examples.chunks(min(max(memory // max(4 * peak, 1), LEAST), CHUNK))
        if self.cuts.channels_last:
            chunks = [{name: _channels_last(x) for name, x in chunk.items()} for chunk in chunks]
        chunks = self._fitting(chunks, 2 * width, memory // 2)
        self.sizes = [len(next(iter(chunk.values()))) for chunk in chunks]
        inputs = [n for n in self.module.graph.nodes if n.op == "placeholder"]
        self.pairs = [
            (
                {node: chunk[str(node.target)] for node in inputs},
                {self.twins[node.name]: chunk[str(node.target)] for node in inputs},
            )
            for chunk in chunks
        ]
        for segment in segments:
            whole = blocks and len(segment.weights) <= LARGEST_BLOCK
            for unit in [segment] if whole else self.cuts.layers(segment):
                if any(self._can(call) for call in unit.weights):
                    self._learn(unit, self._gathered(unit, segment, memory // 2))
            self._advance(segment)

    def _advance(self, segment: Segment) -> None:
        """Carry the examples to the next cut; of what lies before it only what is read later stays."""
        end = self.cuts.order[segment.nodes[-1]]
        with torch.no_grad():
            for number, (ours, theirs) in enumerate(self.pairs):
                kept = [
                    n
                    for n in dict.fromkeys((*ours, *segment.nodes))
                    if self.cuts.last.get(n, -1) > end and n in self.cuts.order
                ]
                alike = [self.twins[n.name] for n in kept if n.name in self.twins]
                ours = self.ours.run_stretch(segment.nodes, ours, kept)
                theirs = self.theirs.run_stretch(self._twins(segment.nodes), theirs, alike)
                self.pairs[number] = {n: ours[n] for n in kept}, {n: theirs[n] for n in alike}

    def _fitting(
        self, chunks: list[dict[str, Tensor]], width: int, memory: int
    ) -> list[dict[str, Tensor]]:
        sizes = [len(next(iter(chunk.values()))) for chunk in chunks]
        count = 0
        for number, size in enumerate(sizes):
            if count and (count + size) * width > memory:
                self.notes.append(
                    f"rounding was learned on {count} examples; more take over {memory / 2**30:.1f} GB"
                )
                return chunks[:number]
            count += size
        return chunks

    def _twins(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return [self.twins[node.name] for node in nodes if node.name in self.twins]

    def _twin(self, node: fx.Node) -> fx.Node:
        """The value of the float network, before it is rounded."""
        return self.twins[node.name if node.op != "call_module" else node.all_input_nodes[0].name]

    def _gathered(self, unit: Segment, segment: Segment, memory: int) -> list[Part]:
        """Chunk by chunk, what a stretch reads in the quantized network and should give."""
        reads = self.cuts.reads(unit.nodes)
        nodes = [n for n in segment.nodes if n not in unit.nodes]
        first = min(self.cuts.order[node] for node in unit.nodes)
        nodes = [n for n in nodes if self.cuts.order[n] < max(first, *self._ends(unit))]
        last = max(self.cuts.order[node] for node in unit.outputs)
        theirs = [n for n in segment.nodes if self.cuts.order[n] <= last]
        targets = [self._twin(node) for node in unit.outputs]
        # What lies at the cut is there already.
        made = [node for node in reads if not self.pairs or node not in self.pairs[0][0]]
        size = bytes_of(made) + bytes_of(unit.outputs)
        result: list[Part] = []
        used = 0
        with torch.no_grad():
            for (ours, others), count in zip(self.pairs, self.sizes, strict=True):
                used += count * size
                if result and used > memory:
                    break
                found = self.ours.run_stretch(nodes, ours, reads)
                wanted = self.theirs.run_stretch(self._twins(theirs), others, targets)
                part = Part({node: found[node] for node in reads}, [wanted[n] for n in targets])
                result.append(part)
        self.cached = max(self.cached, _bytes(self.pairs, result))
        return result

    def _ends(self, unit: Segment) -> list[int]:
        """Places of what a stretch reads."""
        return [self.cuts.order[node] + 1 for node in self.cuts.reads(unit.nodes)] or [0]

    def _can(self, call: fx.Node) -> bool:
        return all("embedding" not in str(user.target) for user in call.users)

    def _learn(self, unit: Segment, data: list[Part]) -> None:
        weights = [
            SoftWeight.of(self.module, call, self.quantizers[call], self.saturation_free)
            for call in unit.weights
            if self._can(call)
        ]
        steps = self._steps(unit)
        start = [step.theta.clone() for step in steps]
        before = error_of(self.ours, unit, data)
        name = " + ".join(weight.name for weight in weights)
        if before == 0 or not before < torch.inf:
            self.errors[name] = (before, before)
            return
        self.training.train(self.module, unit, data, weights, steps, before)
        for weight in weights:
            weight.take()
        after = error_of(self.ours, unit, data)
        if after >= before:
            for weight in weights:
                weight.give_back()
            for step, theta in zip(steps, start, strict=True):
                step.theta.copy_(theta)
            self.notes.append(f"{name}: learned rounding did not help, the integers stay")
            after = before
        else:
            self.chosen |= {weight.name: weight.integers() for weight in weights}
        self.errors[name] = (before, after)

    def _steps(self, unit: Segment) -> list[Step]:
        """The steps that only activations inside of a stretch have."""
        inside = set(unit.nodes)
        users: dict[Step, set[fx.Node]] = {}
        for node, own in self.quantizers.items():
            if isinstance(own, ActivationQuantizer):
                users.setdefault(own.step, set()).add(node)
        return [step for step, nodes in users.items() if nodes <= inside]


class _Examples:
    """The examples in another order; as they are where the batch size is fixed."""

    def __init__(
        self, network: Network, batches: Iterable[Mapping[str, Tensor]], seed: int
    ) -> None:
        self.given = [dict(batch) for batch in batches]
        if not self.given:
            raise DataError(
                f"{network.name}: no examples to learn rounding from; a few hundred are needed"
            )
        first = self.given[0]
        alike = all(b[name].shape[1:] == first[name].shape[1:] for b in self.given for name in b)
        self.free, self.seed = network.traced.batched and alike, seed

    def chunks(self, size: int) -> list[dict[str, Tensor]]:
        """Of at most so many examples each, where they are free."""
        if not self.free:
            return self.given
        whole = {name: torch.cat([batch[name] for batch in self.given]) for name in self.given[0]}
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(next(iter(whole.values()))), generator=generator)
        return [{n: value[index] for n, value in whole.items()} for index in order.split(size)]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _bytes(pairs: list[tuple[Found, Found]], parts: list[Part]) -> int:
    """Of all tensors, each counted once."""
    values = [value for pair in pairs for side in pair for value in side.values()]
    values += [value for part in parts for value in (*part.inputs.values(), *part.targets)]
    found = {id(v): v.numel() * v.element_size() for v in values if isinstance(v, Tensor)}
    return sum(found.values())


def _plan(plan: Plan, module: nn.Module, learner: _Learner) -> Plan:
    result: list[Edit] = []
    activations = 0
    for edit in plan.edits:
        if isinstance(edit, Quantize):
            own = module.get_submodule(f"{QUANTIZERS}.activation_{activations}")
            assert isinstance(own, ActivationQuantizer)
            activations += 1
            result.append(replace(edit, scale=float(own.step())))
        elif isinstance(edit, QuantizeWeight) and edit.tensor in learner.chosen:
            result.append(replace(edit, integers=Values(learner.chosen[edit.tensor])))
        else:
            result.append(edit)
    return Plan(tuple(result))
