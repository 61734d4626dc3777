"""Whether an imported ONNX network computes what ONNX Runtime computes, and which operator stops it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from tinier.errors import ModelError
from tinier.graph.states import quiet
from tinier.network import Network
from tinier.sources.base import first_line
from tinier.sources.onnx_graph import resized

# Allowed difference to ONNX Runtime, relative to the largest output: float32 sums in another order.
TOLERANCE = 1e-3


def culprit(module: fx.GraphModule, inputs: Mapping[str, Tensor], trace: str = "") -> str:
    """The ONNX operator that fails, if it can be told: of a run on the inputs, or of what a trace says."""
    nodes = {node.name: node for node in module.graph.nodes}
    named = re.findall(r"^\s*(\w+) = ", trace, re.MULTILINE)
    node = next((nodes[name] for name in reversed(named) if name in nodes), None)
    if node is None:
        runner = _Last(module)
        try:
            with quiet(), torch.no_grad():
                runner.run(
                    *(inputs[str(n.target)] for n in module.graph.find_nodes(op="placeholder"))
                )
        except Exception:
            node = runner.last
    if node is None or "onnx_op_type" not in node.meta:
        return ""
    return f" (operator {node.meta['onnx_op_type']}, {node.meta.get('onnx_name', node.name)})"


class _Last(fx.Interpreter):
    """Runs the graph and knows at which node it is."""

    last: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.last = n
        return super().run_node(n)


def compare(
    path: Path,
    network: Network,
    names: Mapping[str, str],
    free: Mapping[tuple[str, int], str],
) -> None:
    """Raise ModelError unless the network computes what ONNX Runtime computes, at its sizes and at other ones."""
    try:
        import onnxruntime
    except ImportError:
        return  # Nothing to compare with: the parity gate of the artifacts still is to come.
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ModelError(f"{path}: ONNX Runtime cannot open it: {error}") from error
    base = {symbol: network.example[name].shape[dim] for (name, dim), symbol in free.items()}
    ones = {symbol: 1 if symbol == "batch" else size for symbol, size in base.items()}
    others = {
        symbol: size + 1 if symbol == "batch" else max(1, size // 2)
        for symbol, size in base.items()
    }
    for number, sizes in enumerate([base, ones, others] if free else [base]):
        # The example as it is at first, then with the ends of some rows hidden.
        inputs = resized(_hidden(network.example) if number else network.example, free, sizes)
        batch = len(next(iter(inputs.values())))
        where = f"at batch {batch}" + "".join(
            f", {symbol} {size}" for symbol, size in sizes.items() if symbol != "batch"
        )
        fed = {own: inputs[plain].numpy() for own, plain in names.items() if plain in inputs}
        try:
            wanted = session.run(None, fed)
        except Exception as error:
            raise ModelError(f"{path}: ONNX Runtime cannot run it {where}: {error}") from error
        try:
            with torch.no_grad():
                # The traced network: the one that is edited and exported.
                got = [output.numpy() for output in network.traced.module(*inputs.values())]
        except Exception as error:
            module = network.module
            where += culprit(module, inputs) if isinstance(module, fx.GraphModule) else ""
            raise ModelError(
                f"{path}: the imported network does not run {where}: {first_line(error)}"
            ) from error
        for index, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
            _compare_output(path, f"output {index} {where}", ours, np.asarray(theirs))


def _hidden(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, in masks of ones the second half of the first row zero."""
    hidden = dict(inputs)
    for name, value in inputs.items():
        rows = "mask" in name.lower() and value.dtype != torch.bool and value.ndim == 2
        if rows and bool((value == 1).all()):
            hidden[name] = value.clone()
            hidden[name][0, (value.shape[1] + 1) // 4 + 1 :] = 0
    return hidden


def _compare_output(path: Path, where: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    # Sizes of 1 may be squeezed away at batch 1 and only there.
    if ours.size != theirs.size or (ours.shape != theirs.shape and "at batch 1" not in where):
        raise ModelError(
            f"{path}: {where} of the imported network has shape {ours.shape}, of ONNX Runtime "
            f"{theirs.shape}; the import is wrong and is not used"
        )
    if not ours.size:
        return
    difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64).reshape(ours.shape))
    largest = float(np.abs(theirs.astype(np.float64)).max())
    worst = float(difference.max())
    if np.isnan(theirs).any() if theirs.dtype.kind == "f" else False:
        raise ModelError(
            f"{path}: {where} is NaN in ONNX Runtime; give example=… as the model gets it"
        )
    if not worst <= TOLERANCE * max(largest, 1e-6):
        raise ModelError(
            f"{path}: {where} of the imported network differs from ONNX Runtime by {worst:.3g} (largest value "
            f"{largest:.3g}); the import is wrong and is not used"
        )
