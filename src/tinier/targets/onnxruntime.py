"""ONNX Runtime on the CPU: one ONNX file, quantize/dequantize pairs fused into integer operators by the runtime."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from tinier.errors import InputError
from tinier.network import Network
from tinier.targets.base import (
    WARM_UP,
    Artifact,
    Input,
    Kernel,
    Session,
    Target,
    as_arrays,
    damaged,
    invented,
    onnx_files,
)
from tinier.targets.onnx_file import write_onnx
from tinier.targets.precision import ONNX, Precision

KIND = "an ONNX model (.onnx)"
KERNEL_TIME = "_kernel_time"  # how the profiler ends the names of what it timed
DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
}  # the others, such as tensor(int64), have numpy's own names


class OnnxRuntime(Target):
    """``model.onnx``, run by the CPU execution provider with all graph optimizations."""

    name: ClassVar[str] = "onnxruntime"
    package: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str] = "onnxruntime"
    suffix: ClassVar[str] = ".onnx"
    precision: ClassVar[Precision] = ONNX
    blocks: ClassVar[Mapping[str, int]] = {"avx512f": 16}  # the NCHWc layout of its convolutions

    def lower(self, network: Network, folder: Path, onnx_file: Path | None = None) -> Artifact:
        file = folder / "model.onnx"
        if onnx_file is None:
            write_onnx(network, file)
        elif onnx_file != file:
            shutil.copyfile(onnx_file, file)
        return Artifact.of(self.name, file)

    def open(self, file: Path, threads: int) -> Session:
        onnx_files(file)
        return OnnxRuntimeSession(file, threads)

    def kernels(
        self, file: Path, inputs: Mapping[str, np.ndarray], threads: int, runs: int = 30
    ) -> list[Kernel]:
        with tempfile.TemporaryDirectory() as scratch:
            session = OnnxRuntimeSession(file, threads, Path(scratch) / "profile")
            for _ in range(WARM_UP + runs):
                session.run(inputs)
            events = json.loads(Path(session.end()).read_text())
        times: dict[tuple[str, str], list[float]] = {}
        for event in events:
            if event["cat"] == "Node" and event["name"].endswith(KERNEL_TIME):
                name = event["name"].removesuffix(KERNEL_TIME)
                times.setdefault((name, event["args"]["op_name"]), []).append(event["dur"] / 1e3)
        return [Kernel(*key, float(np.median(found[WARM_UP:]))) for key, found in times.items()]

    def files(self, file: Path) -> tuple[Path, ...]:
        return onnx_files(file)

    def usage(self, artifact: Artifact, network: Network) -> str:
        return "\n".join(
            [
                "import numpy as np, onnxruntime",
                f'session = onnxruntime.InferenceSession("{artifact.files[0].name}")',
                f"print(session.run(None, {invented(network)}))",
            ]
        )


class OnnxRuntimeSession(Session):
    """An ``onnxruntime.InferenceSession`` with a fixed number of threads."""

    def __init__(self, file: Path, threads: int, profile: Path | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        options.log_severity_level = 3  # warnings about the model are for its developers
        try:
            self._session = onnxruntime.InferenceSession(
                file, options, providers=["CPUExecutionProvider"]
            )
        # The runtime's exceptions have no common base but Exception.
        except Exception as error:
            raise damaged(file, KIND, error) from error
        self.threads = threads
        self.inputs = tuple(_declared(port, file) for port in self._session.get_inputs())

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return as_arrays(self._session.run(None, dict(inputs)))

    def end(self) -> str:
        """Stop profiling; the path of the events."""
        return str(self._session.end_profiling())


def _declared(port: object, file: Path) -> Input:
    name, kind, shape = port.name, port.type, port.shape  # type: ignore[attr-defined]
    dtype = DTYPES.get(kind, kind.removeprefix("tensor(").removesuffix(")"))
    try:
        return Input(name, tuple(n if isinstance(n, int) else None for n in shape), np.dtype(dtype))
    except TypeError as error:
        raise InputError(
            f"{file}: input {name} is a {kind}, a tensor of numbers is needed"
        ) from error
