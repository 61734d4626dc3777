"""Which layers are faster in integers on this machine: measured layer by layer on the runtime, then confirmed on whole artifacts."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinier.errors import RefusedError
from tinier.measure.latency import interleaved, ratio
from tinier.measure.layer_times import labels, layer_times
from tinier.methods.quantization import Quantization
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.targets.base import Target
from tinier.targets.onnx_file import to_onnx

SECONDS = 2.0  # to time whole artifacts against each other
Times = dict[str, dict[int, float]]


def layer_latencies(
    network: Network,
    method: Quantization,
    statistics: Statistics,
    target: Target,
    threads: int,
    batch: int = 1,
) -> Times:
    """Weight → {0: milliseconds in float, bits: milliseconds in integers}, of what integer operators can compute.

    Args:
        network: the folded float network.
        method: static quantization.
        statistics: what it needs.
        target: the runtime.
        threads: of it.
        batch: examples a run.

    Raises:
        RefusedError: the runtime has no profiler, or the two files have different layers.

    Cost:
        Two exports and 70 runs.
    """
    inputs = _inputs(network, batch)
    plan = method.plan(network, statistics)
    found = []
    names = []
    with tempfile.TemporaryDirectory(prefix="tinier-") as folder:
        for number, one in enumerate((network, plan.apply(network))):
            file = Path(folder) / f"{number}.onnx"
            model = to_onnx(one)
            file.write_bytes(model.SerializeToString())
            names.append(list(labels(model)))
            found.append(layer_times(target, file, inputs, threads))
    if len(names[0]) != len(names[1]):
        raise RefusedError(
            f"{network.name}: {len(names[0])} layers in float and {len(names[1])} in integers; "
            "their times cannot be compared"
        )
    # Constant folding renames weights of the float file; the order of the layers stays.
    return {
        theirs: {0: found[0][ours], method.bits_of(theirs): found[1][theirs]}
        for ours, theirs in zip(names[0], names[1], strict=True)
        if method.bits_of(theirs)
    }


def without_slower(
    network: Network,
    method: Quantization,
    statistics: Statistics,
    target: Target,
    threads: int,
    batch: int = 1,
) -> tuple[Quantization, tuple[str, ...]]:
    """The method with those layers left float that are slower in integers, if the whole artifact is faster for it.

    Returns:
        The method, and what was measured, a sentence each.

    Cost:
        As ``layer_latencies``, two more exports, and two seconds of timing.
    """
    times = layer_latencies(network, method, statistics, target, threads, batch)
    slower = [name for name, row in times.items() if row[method.bits_of(name)] > row[0] > 0]
    if not slower:
        return method, (f"no layer is slower in integers on {target.name}",)
    if len(slower) == len(times):
        return method, (
            f"every layer is slower in integers on {target.name} by its profile; all were quantized all the same",
        )
    mixed = replace(method, exclude=(*method.exclude, *slower))
    inputs = _inputs(network, batch)
    with tempfile.TemporaryDirectory(prefix="tinier-") as folder:
        sessions = {}
        for name, one in (("whole", method), ("mixed", mixed)):
            path = Path(folder) / name
            path.mkdir()
            artifact = target.lower(one.plan(network, statistics).apply(network), path)
            sessions[name] = target.open(artifact.files[0], threads)
        timed = interleaved(sessions, inputs, seconds=SECONDS)
    gain = ratio(timed["whole"], timed["mixed"])
    said = f"{timed['mixed'].median:.3g} ms against {timed['whole'].median:.3g} ms on {target.name}"
    if gain.low <= 1:
        return method, (
            f"{len(slower)} layers are slower in integers by themselves, but not the whole without them: {said}",
        )
    return mixed, (f"float, because slower in integers: {', '.join(slower)} ({said})",)


def _inputs(network: Network, batch: int) -> dict[str, np.ndarray]:
    size = batch if network.traced.batched else len(next(iter(network.example.values())))
    return {name: tensor.numpy() for name, tensor in network.batch(size).items()}
