"""OpenVINO on the CPU: an IR (.xml and .bin), with the file names that optimum-intel loads."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tinier.errors import RefusedError
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
    readable,
)
from tinier.targets.onnx_file import write_onnx
from tinier.targets.precision import ONNX, Precision

KIND = "an OpenVINO model (.xml with its .bin, or .onnx)"


class OpenVino(Target):
    """``openvino_model.xml`` and ``openvino_model.bin``, run by the CPU plugin."""

    name: ClassVar[str] = "openvino"
    package: ClassVar[str] = "openvino"
    extra: ClassVar[str] = "openvino"
    suffix: ClassVar[str] = ".xml"
    precision: ClassVar[Precision] = ONNX
    blocks: ClassVar[Mapping[str, int]] = {"avx512f": 16}  # oneDNN's nChw16c layout

    def lower(self, network: Network, folder: Path, onnx_file: Path | None = None) -> Artifact:
        # read_model, not convert_model: that one sends telemetry.
        import openvino

        file = folder / "openvino_model.xml"
        with tempfile.TemporaryDirectory() as scratch:
            if onnx_file is None:
                onnx_file = Path(scratch) / "model.onnx"
                write_onnx(network, onnx_file)
            try:
                model = openvino.Core().read_model(onnx_file)
            except RuntimeError as error:
                first = str(error).strip().splitlines()[-1]
                raise RefusedError(f"openvino cannot take {network.name}: {first}") from error
            _join_rows(model)
            openvino.save_model(model, file, compress_to_fp16=False)
            del model  # it maps the temporary file, which Windows would then not delete
        return Artifact.of(self.name, file, file.with_suffix(".bin"))

    def open(self, file: Path, threads: int) -> Session:
        self.files(file)
        return OpenVinoSession(file, threads)

    def kernels(
        self, file: Path, inputs: Mapping[str, np.ndarray], threads: int, runs: int = 30
    ) -> list[Kernel]:
        session = OpenVinoSession(file, threads, profile=True)
        times: dict[tuple[str, str], list[float]] = {}
        for run in range(WARM_UP + runs):
            session.run(inputs)
            for part in session.profile() if run >= WARM_UP else ():
                seconds = part.real_time.total_seconds()
                if seconds:
                    times.setdefault((part.node_name, part.node_type), []).append(1e3 * seconds)
        return [Kernel(*key, float(np.median(found))) for key, found in times.items()]

    def files(self, file: Path) -> tuple[Path, ...]:
        if file.suffix == ".onnx":
            return onnx_files(file)
        readable(file, KIND)
        weights = file.with_suffix(".bin")
        return (file, readable(weights, f"the weights of {file.name}"))

    def usage(self, artifact: Artifact, network: Network) -> str:
        return "\n".join(
            [
                "import numpy as np, openvino",
                f'model = openvino.Core().compile_model("{artifact.files[0].name}", "CPU")',
                f"print(list(model({invented(network)}).values()))",
            ]
        )


def _join_rows(model: Any) -> None:
    """Integers of (N, L, C) are concatenated along L as (N, 1, L, C), in place.

    OpenVINO takes dimension 1 for the channels, gives each a zero point of its own, and cannot multiply such matrices.
    """
    from openvino import opset13 as ops

    nodes = model.get_ordered_ops()
    if not any(node.get_type_name() == "FakeQuantize" for node in nodes):
        return
    for node in nodes:
        if node.get_type_name() != "Concat" or node.get_output_partial_shape(0).rank != 3:
            continue
        if node.get_attributes()["axis"] % 3 != 1:
            continue
        one = ops.constant(np.array(1, np.int64))
        rows = [ops.unsqueeze(value, one) for value in node.input_values()]
        joined = ops.squeeze(ops.concat(rows, axis=2), one)
        joined.set_friendly_name(f"{node.get_friendly_name()}_rows")
        joined.output(0).set_names(node.output(0).get_names())
        node.output(0).replace(joined.output(0))


class OpenVinoSession(Session):
    """A compiled model and one inference request."""

    def __init__(self, file: Path, threads: int, profile: bool = False) -> None:
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            # CPUs with bfloat16 units would otherwise compute float networks in bfloat16.
            "INFERENCE_PRECISION_HINT": "f32",
            "PERF_COUNT": profile,
        }
        try:
            model = openvino.Core().read_model(file)
            compiled = openvino.Core().compile_model(model, "CPU", settings)
            self._request = compiled.create_infer_request()
            self.inputs = tuple(
                Input(
                    port.any_name,
                    tuple(None if n.is_dynamic else n.get_length() for n in port.partial_shape),
                    np.dtype(port.element_type.to_dtype()),
                )
                for port in compiled.inputs
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise damaged(file, KIND, error) from error
        self.threads = threads
        self._outputs = list(compiled.outputs)

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        results = self._request.infer(dict(inputs), share_inputs=True)
        return as_arrays(results[port] for port in self._outputs)

    def profile(self) -> list[Any]:
        """The operations of the last run, where profiling is on."""
        return list(self._request.get_profiling_info())
