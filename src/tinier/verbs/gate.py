"""The gate that every quantized artifact passes: it is run, and computes what its network does, or it is not written."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tinier.errors import InputError
from tinier.measure.parity import Parity, parity
from tinier.network import Network
from tinier.targets.base import Artifact, Target, targets_for
from tinier.verbs.storage import pack

BATCHES = (1, 16)
MOST_PACKED = (
    2**25
)  # bytes of an artifact that is packed to know its size, at half a second for each MB


def takers(target: str, network: Network) -> list[Target]:
    """The runtimes that were asked for, once it is known that they take the network.

    Args:
        target: a name, or "cpu" for all that are installed, of which those are left out that do not take it.
        network: what is to be written.

    Raises:
        InputError: an unknown name, or a runtime that cannot take the network; the message says why, and what it takes.
        MissingError: it is not installed.
    """
    runtimes = targets_for(target)
    refusals = {runtime.name: runtime.refuses(network) for runtime in runtimes}
    fine = [runtime for runtime in runtimes if not refusals[runtime.name]]
    if not fine or (target != "cpu" and len(fine) < len(runtimes)):
        said = "; ".join(f"{name} cannot take the network: {why}" for name, why in refusals.items() if why)  # fmt: skip
        raise InputError(said or "no runtime is installed: pip install 'tinier[onnxruntime]'")
    return fine


def lowered(
    runtime: Target,
    network: Network,
    folder: Path,
    batch: Mapping[str, Tensor],
    threads: int,
    onnx_file: Path | None = None,
) -> tuple[Artifact, Parity]:
    """The artifact, once it was run at batch 1 and 16.

    Args:
        runtime: the target.
        network: a quantized network.
        folder: an existing folder.
        batch: input name → tensor, of real examples as far as there are some.
        threads: of the session.
        onnx_file: the network as an ONNX file, if there is one already.

    Raises:
        ParityError: it computes something else.
        RefusedError: the runtime cannot take the network.
    """
    written = () if onnx_file is None else (onnx_file,)
    artifact = runtime.lower(network, folder, *written)
    session = runtime.open(artifact.files[0], threads)
    compared = parity(network, session, examples(network, batch))
    return artifact, compared.demand(f"the artifact for {runtime.name}")


def examples(network: Network, batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Batches of 1 and 16 where the batch size is free, of real examples as far as there are some."""
    have = len(next(iter(batch.values())))
    if not network.traced.batched:
        return [dict(batch)]
    return [
        {
            name: value.repeat(-(-size // have), *[1] * (value.ndim - 1))[:size]
            for name, value in batch.items()
        }
        for size in BATCHES
    ]


def packed_bytes(network: Network, artifact: Artifact) -> int | None:
    """Bytes of an artifact as ``tinier.pack`` stores it: its ONNX file, or where it is none the network's tensors; None for large ones."""
    if artifact.size > MOST_PACKED:
        return None
    first = artifact.files[0]
    with tempfile.TemporaryDirectory(prefix="tinier-") as folder:
        file = Path(folder) / "packed"
        pack(first if first.suffix == ".onnx" else network, file)
        return file.stat().st_size
