"""A quantized network delivered: its artifact for a runtime, run there and compared with the simulation before anything is written."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tinier.edits.quantize import Quantize, QuantizeDynamically, QuantizeWeight
from tinier.errors import InputError
from tinier.measure.attribution import Attribution, attribute
from tinier.measure.parity import Parity
from tinier.methods.sampled import spread
from tinier.output import check_output, whole
from tinier.report.quantization import quantization_html
from tinier.targets.base import Artifact, targets_for
from tinier.units import is_whole
from tinier.verbs.calibration import batches_of, calibration
from tinier.verbs.disk import OURS, write_parts
from tinier.verbs.float_parts import float_operators, integer_macs
from tinier.verbs.gate import lowered, packed_bytes, takers
from tinier.verbs.smaller import Smaller

RECORD = "quantization.json"
PAGE = "report.html"
FEW = 32  # examples that the loss is attributed on


@dataclass(frozen=True)
class Delivered:
    """What was written, and what was measured of it.

    Attributes:
        folder: where.
        artifacts: runtime → its files.
        packed: runtime → bytes of what its file has as ``tinier.pack`` stores it; None where that was left out for time.
        parity: runtime → artifact against simulation.
        float_bytes: of the original's parameters and buffers, by runtime.
        attribution: the loss by layer and cause, if it was asked for.
    """

    folder: Path
    artifacts: dict[str, Artifact]
    packed: dict[str, int | None]
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
                    "packed_bytes": self.packed[name],
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
            "float": [list(row) for row in float_operators(smaller)],
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
    if not is_whole(threads) or threads < 1:
        raise InputError(f"threads={threads!r}: a whole number, at least 1, is needed")
    runtimes = takers(target, smaller.network)
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
        checked, sizes, packed = {}, {}, {}
        for runtime in runtimes:
            # One export serves every runtime that reads ONNX.
            written = [f for a in artifacts.values() for f in a.files if f.suffix == ".onnx"]
            name, ready = runtime.name, next(iter(written), None)
            found_here = lowered(runtime, smaller.network, made, batches[0], threads, ready)
            artifacts[name], checked[name] = found_here
            sizes[name] = _float_bytes(smaller)
            packed[name] = packed_bytes(smaller.network, artifacts[name])
        delivered = Delivered(path, artifacts, packed, checked, sizes, found)
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


def check_delivery(
    folder: str | Path,
    target: str,
    weights: Collection[int],
    activations: Collection[int] = (),
    dynamic: bool = False,
) -> Path:
    """The folder as an absolute path, once it is known that it can be written and that a runtime takes the bits.

    Args:
        folder: of ``deliver``.
        target: of ``deliver``.
        weights: bits of the weights that will be integers.
        activations: bits of activations that will be rounded to fixed ranges.
        dynamic: whether some will be rounded in the range of each run.

    Raises:
        OutputError: the folder exists and was not made by tinier, or cannot be written.
        InputError: an unknown runtime, or one that takes other bits; the message lists them.
    """
    path = check_output(folder, lambda found: {p.name for p in found.iterdir()} <= OURS)
    refusals = {
        runtime.name: runtime.precision.refuses(weights, activations, dynamic)
        for runtime in targets_for(target)
    }
    if all(refusals.values()) or (target != "cpu" and any(refusals.values())):
        said = "; ".join(f"{name} cannot take {why}" for name, why in refusals.items() if why)
        raise InputError(said or "no runtime is installed: pip install 'tinier[onnxruntime]'")
    return path


def _activation_bits(edit: Quantize | QuantizeDynamically) -> int:
    return (edit.high - edit.low).bit_length() if isinstance(edit, Quantize) else 8


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
