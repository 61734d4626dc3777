"""A quantized network delivered: its artifact for a runtime, run there and compared with the simulation before anything is written."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from tinier.edits.quantize import Quantize, QuantizeDynamically, QuantizeWeight
from tinier.errors import InputError
from tinier.graph.dynamic import ROUND, ROUND_TOKENS
from tinier.graph.fold import fold
from tinier.graph.macs import macs
from tinier.graph.placement import place
from tinier.graph.rules import operator_name
from tinier.measure.attribution import Attribution, attribute
from tinier.measure.parity import Parity, parity
from tinier.methods.sampled import spread
from tinier.network import Network
from tinier.output import check_output, whole
from tinier.report.quantization import quantization_html
from tinier.targets.base import Artifact, targets_for
from tinier.verbs.calibration import batches_of, calibration
from tinier.verbs.disk import OURS, write_parts
from tinier.verbs.smaller import Smaller

RECORD = "quantization.json"
PAGE = "report.html"
BATCHES = (1, 16)  # of the parity gate
FEW = 32  # examples that the loss is attributed on


@dataclass(frozen=True)
class Delivered:
    """What was written, and what was measured of it.

    Attributes:
        folder: where.
        artifacts: runtime → its files.
        parity: runtime → artifact against simulation.
        float_bytes: of the original's parameters and buffers, by runtime.
        attribution: the loss by layer and cause, if it was asked for.
    """

    folder: Path
    artifacts: dict[str, Artifact]
    parity: dict[str, Parity]
    float_bytes: dict[str, int]
    attribution: Attribution | None

    def as_dict(self, smaller: Smaller) -> dict[str, Any]:
        """JSON-able: sizes, parity, bits, MACs, what stayed float and why, attribution."""
        integer, all_macs = integer_macs(smaller)
        pairs = [e for e in smaller.plan.edits if isinstance(e, Quantize | QuantizeDynamically)]
        weights = [e for e in smaller.plan.edits if isinstance(e, QuantizeWeight)]
        return {
            "name": smaller.original.name,
            "artifacts": {
                name: {
                    "files": [file.name for file in artifact.files],
                    "bytes": artifact.size,
                    "float_bytes": self.float_bytes[name],
                    "parity": [asdict(row) for row in self.parity[name].rows],
                }
                for name, artifact in self.artifacts.items()
            },
            "weights": {e.tensor: (e.high - e.low).bit_length() for e in weights},
            "activations": len(pairs),
            "activation_bits": {e.tensor: _activation_bits(e) for e in pairs},
            "dynamic": sum(isinstance(e, QuantizeDynamically) for e in pairs),
            "macs": {"integer": integer, "all": all_macs},
            "float": [list(row) for row in _float_operators(smaller)],
            "attribution": None if self.attribution is None else self.attribution.as_dict(),
            "notes": list(smaller.notes),
        }


def deliver(
    smaller: Smaller,
    folder: str | Path,
    *,
    data: Any = None,
    target: str = "onnxruntime",
    threads: int = 1,
    attribution: bool = False,
) -> Delivered:
    """Write a quantized network for a runtime, after it was run there: at batch 1 and 16 it must compute what the simulation does.

    Args:
        smaller: what ``quantize`` gave.
        folder: to make: the artifact, float weights to train on (safetensors), the plan, a record and the same as a page
            (``report.html``), how to run it.
        data: examples to compare on and to attribute the loss with; None for the example inputs.
        target: a runtime, or "cpu" for every one that is installed.
        threads: of the sessions.
        attribution: whether the loss is split by layer and cause.

    Raises:
        InputError: the network is not quantized, or the runtime cannot take it.
        ParityError: the artifact computes something else; nothing is written.
        OutputError: the folder exists and was not made by tinier, or cannot be written.
    """
    if not any(isinstance(edit, Quantize | QuantizeWeight) for edit in smaller.plan.edits):
        raise InputError(f"{smaller.original.name} is not quantized; export writes float networks")
    runtimes = targets_for(target)
    for runtime in runtimes:
        refusal = runtime.refuses(smaller.network)
        if refusal and target != "cpu":
            raise InputError(f"{runtime.name} cannot take the network: {refusal}")
    path = check_output(folder, lambda found: {p.name for p in found.iterdir()} <= OURS)
    batches = [dict(smaller.network.example)]
    if data is not None:
        batches = batches_of(calibration(data, smaller.network), smaller.network)
    found = None
    if attribution:
        assert smaller.trainable is not None
        few = spread(smaller.original, batches, FEW)
        found = attribute(smaller.original, smaller.plan, few)
    with whole(path) as made:
        artifacts: dict[str, Artifact] = {}
        checked, sizes = {}, {}
        for runtime in runtimes:
            if runtime.refuses(smaller.network):
                continue
            # One export serves every runtime that reads ONNX.
            written = [f for a in artifacts.values() for f in a.files if f.suffix == ".onnx"]
            artifact = runtime.lower(smaller.network, made, *written[:1])
            artifacts[runtime.name] = artifact
            session = runtime.open(artifact.files[0], threads)
            compared = parity(smaller.network, session, _examples(smaller.network, batches[0]))
            checked[runtime.name] = compared.demand(f"the artifact for {runtime.name}")
            sizes[runtime.name] = _float_bytes(smaller)
        delivered = Delivered(path, artifacts, checked, sizes, found)
        write_parts(smaller, made)
        facts = delivered.as_dict(smaller)
        (made / RECORD).write_text(json.dumps(facts, indent=1, default=str) + "\n")
        (made / PAGE).write_text(quantization_html(facts), encoding="utf-8")
        (made / "README.md").write_text(_readme(smaller, artifacts), encoding="utf-8")
    return replace(
        delivered,
        artifacts={
            name: replace(a, files=tuple(path / file.name for file in a.files))
            for name, a in artifacts.items()
        },
    )


def _activation_bits(edit: Quantize | QuantizeDynamically) -> int:
    return (edit.high - edit.low).bit_length() if isinstance(edit, Quantize) else 8


def integer_macs(smaller: Smaller) -> tuple[int, int]:
    """Multiply-accumulates at batch 1 of which both factors are integers, as quantize/dequantize pairs say; and all."""
    counts = macs((smaller.trainable or smaller.network).traced)
    nodes = {node.name: node for node in smaller.network.traced.module.graph.nodes}
    integer = sum(
        count for name, count in counts.items() if name in nodes and _of_integers(nodes[name])
    )
    return integer, sum(counts.values())


def _of_integers(node: fx.Node) -> bool:
    first = 1 if operator_name(node) in ("addmm", "baddbmm", "addmv") else 0
    return all(_dequantized(source) for source in node.args[first : first + 2])


def _dequantized(source: Any) -> bool:
    while isinstance(source, fx.Node) and operator_name(source) in ("t", "transpose", "permute"):
        source = source.args[0]
    if not isinstance(source, fx.Node):
        return False
    return source.target in (ROUND, ROUND_TOKENS) or operator_name(source).startswith("dequantize")


def _float_operators(smaller: Smaller) -> list[tuple[str, str, str]]:
    """(node, operator, reason) of those that stayed float where activations are quantized."""
    pairs = any(isinstance(edit, Quantize) for edit in smaller.plan.edits)
    if not pairs or smaller.trainable is None:
        return []
    integers = {e.tensor for e in smaller.plan.edits if isinstance(e, QuantizeWeight)}
    module = fold(smaller.trainable.traced.module)
    return place(module, lambda name: name not in integers).skipped


def _examples(network: Network, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Batches of 1 and 16 where the batch size is free, of real examples as far as there are some."""
    have = len(next(iter(batch.values())))
    if not network.traced.batched:
        return [batch]
    return [
        {
            name: value.repeat(-(-size // have), *[1] * (value.ndim - 1))[:size]
            for name, value in batch.items()
        }
        for size in BATCHES
    ]


def _float_bytes(smaller: Smaller) -> int:
    """Bytes of the float network's parameters and buffers: what its file has, beside the graph."""
    network = smaller.original
    tensors = {id(t): t for t in (*network.module.parameters(), *network.module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _readme(smaller: Smaller, artifacts: dict[str, Artifact]) -> str:
    parts = [f"# {smaller.original.name}, quantized by tinier", f"```text\n{smaller}\n```"]
    for name, artifact in artifacts.items():
        (runtime,) = targets_for(name)
        parts.append(f"## {name}\n\n```python\n{runtime.usage(artifact, smaller.network)}\n```")
    parts.append(
        f"`model.safetensors` has the float weights, to train on, and `plan.json` every decision; `{RECORD}` what was measured, which "
        f"`{PAGE}` shows."
    )
    return "\n\n".join(parts) + "\n"
