"""One variant of one competitor of ``quantization.py``, in the competitor's own environment and a process of its own.

The table at the top is what ``quantization.py`` runs: environment, packages, and each variant's settings.
"""

import importlib
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import answer, request
from quantization_tasks import task as task_of
from quantization_tasks.base import Arrays, Task, arrays, each, float_file, open_artifact

# Packages that are pinned here are installed in the competitor's environment; everything else is borrowed.
PACKAGES: dict[str, tuple[str, ...]] = {
    "nncf": (
        "nncf==3.4.0",
        "pydot==4.0.1",
        "tabulate==0.9.0",
        "ninja==1.13.0",
        "scikit-learn==1.7.2",
        "joblib==1.5.2",
        "threadpoolctl==3.6.0",
    ),
    "onnxruntime": ("onnxruntime==1.31.1",),
    "torchao": ("torchao==0.18.0",),
    "inc": (
        "neural-compressor==3.10",
        "torchao==0.18.0",
        "prettytable==3.16.0",
        "wcwidth==0.2.14",
        "py-cpuinfo==9.0.0",
        "accelerate==1.15.0",
    ),
}
NAMES = {
    "nncf": "NNCF 3.4",
    "onnxruntime": "ONNX Runtime 1.31",
    "inc": "Neural Compressor 3.10",
    "torchao": "torchao 0.18",
}
TRANSFORMER = {"model_type": "transformer"}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "nncf": {
        "default": {},
        "overflow fix everywhere": {"overflow_fix": "enable"},
        "mixed": {"preset": "mixed"},
        "mixed, accurate bias correction": {"preset": "mixed", "fast_bias_correction": False},
        "transformer": TRANSFORMER,
        "transformer, SmoothQuant off": {**TRANSFORMER, "smooth_quant": -1},
        "transformer, SmoothQuant 0.5": {**TRANSFORMER, "smooth_quant": 0.5},
        "ONNX, mixed": {"preset": "mixed", "backend": "onnx"},
    },
    "onnxruntime": {
        "minmax": {"calibrate": "MinMax"},
        "minmax, reduced range": {"calibrate": "MinMax", "reduce_range": True},
        "minmax, u8 weights": {"calibrate": "MinMax", "weights": "QUInt8"},
        "entropy": {"calibrate": "Entropy"},
        "percentile": {"calibrate": "Percentile"},
        "dynamic": {"dynamic": True},
    },
    "torchao": {
        "static": {},
        "static, reduced range": {"reduce_range": True},
        "dynamic": {"dynamic": True},
    },
    "inc": {"PT2E static": {}, "PT2E dynamic": {"dynamic": True}},
}


def variants_of(peer: str, transformer: bool) -> dict[str, dict[str, Any]]:
    """A competitor's variants; those for transformers only where its documents would have them."""
    return {
        name: variant
        for name, variant in VARIANTS[peer].items()
        if transformer or "model_type" not in variant
    }


STRIDE = 8  # calibration examples whose values ONNX Runtime's histograms hold at a time
MEMORY = 10 * 2**30  # bytes that a competitor may have
Built = tuple[str, Path]  # runtime, first file


def nncf(task: Task, rows: Arrays, variant: dict[str, Any], folder: Path) -> Callable[[], Built]:
    code = importlib.import_module("nncf")
    advanced: dict[str, Any] = {}
    if "overflow_fix" in variant:
        fix = importlib.import_module("nncf.quantization.advanced_parameters").OverflowFix
        advanced["overflow_fix"] = fix(variant["overflow_fix"])
    if "smooth_quant" in variant:
        alphas = code.AdvancedSmoothQuantParameters
        advanced["smooth_quant_alphas"] = alphas(matmul=variant["smooth_quant"])
    settings: dict[str, Any] = {
        "subset_size": len(each(rows)),
        "fast_bias_correction": variant.get("fast_bias_correction", True),
        "preset": code.QuantizationPreset(variant["preset"]) if "preset" in variant else None,
        "model_type": code.ModelType.TRANSFORMER if "model_type" in variant else None,
        "advanced_parameters": code.AdvancedQuantizationParameters(**advanced),
    }
    data = code.Dataset(each(rows))
    if variant.get("backend") == "onnx":
        onnx = importlib.import_module("onnx")
        model, file = onnx.load(str(float_file(task.name))), folder / "model.onnx"
        return lambda: _save_onnx(code.quantize(model, data, **settings), file)
    openvino = importlib.import_module("openvino")
    model, file = openvino.Core().read_model(float_file(task.name)), folder / "openvino_model.xml"
    # What openvino.convert_model does besides reading; without it NNCF finds no biases to correct.
    passes = importlib.import_module("openvino._offline_transformations")
    passes.apply_moc_transformations(model, cf=False)

    def build() -> Built:
        openvino.save_model(code.quantize(model, data, **settings), file, compress_to_fp16=False)
        return "openvino", file

    return build


def _save_onnx(model: Any, file: Path) -> Built:
    importlib.import_module("onnx").save(model, str(file))
    return "onnxruntime", file


class Reader:
    """Calibration examples as ONNX Runtime asks for them, all or a range."""

    def __init__(self, rows: Arrays) -> None:
        self.rows = each(rows)
        self.left = iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> "Reader":
        return self

    def __next__(self) -> Arrays:
        found = self.get_next()
        if found is None:
            raise StopIteration
        return found

    def get_next(self) -> Arrays | None:
        return next(self.left, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = iter(self.rows[start_index:end_index])


def onnxruntime(
    task: Task, rows: Arrays, variant: dict[str, Any], folder: Path
) -> Callable[[], Built]:
    code = importlib.import_module("onnxruntime.quantization")
    process = importlib.import_module("onnxruntime.quantization.shape_inference")
    file, ready = folder / "model.onnx", folder / "preprocessed.onnx"
    kinds, reduce_range = code.QuantType, variant.get("reduce_range", False)
    weights = kinds[variant.get("weights", "QInt8")]

    def build() -> Built:
        try:
            process.quant_pre_process(float_file(task.name), ready)
        # What symbolic shape inference cannot follow, its documents say to leave out; it raises plain exceptions.
        except Exception as error:
            print(f"without symbolic shapes: {error}")
            process.quant_pre_process(float_file(task.name), ready, skip_symbolic_shape=True)
        if variant.get("dynamic"):
            code.quantize_dynamic(
                ready, file, per_channel=True, reduce_range=reduce_range, weight_type=weights
            )
        else:
            count = len(next(iter(rows.values()))) // STRIDE * STRIDE
            code.quantize_static(
                ready,
                file,
                Reader({name: value[:count] for name, value in rows.items()}),
                quant_format=code.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=reduce_range,
                activation_type=kinds[variant.get("activations", "QUInt8")],
                weight_type=weights,
                calibrate_method=code.CalibrationMethod[variant["calibrate"]],
                extra_options={"CalibStridedMinMax": STRIDE},
            )
        ready.unlink()
        return "onnxruntime", file

    return build


def torchao(task: Task, rows: Arrays, variant: dict[str, Any], folder: Path) -> Callable[[], Built]:
    steps = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    model, first = task.module(), _row(each(rows)[0])
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(
        x86.get_default_x86_inductor_quantization_config(
            is_dynamic=variant.get("dynamic", False),
            reduce_range=variant.get("reduce_range", False),
        )
    )

    def build() -> Built:
        with torch.no_grad():
            exported = torch.export.export(model, (), first).module()
            prepared = steps.prepare_pt2e(exported, quantizer)
            for row in each(rows):
                prepared(**_row(row))
            return _save_program(steps.convert_pt2e(prepared), first, folder)

    return build


def inc(task: Task, rows: Arrays, variant: dict[str, Any], folder: Path) -> Callable[[], Built]:
    code = importlib.import_module("neural_compressor.torch.quantization")
    capture = importlib.import_module("neural_compressor.torch.export").export
    model, first = Positional(task.module(), tuple(rows)), _row(each(rows)[0])
    dynamic = variant.get("dynamic", False)
    config = code.get_default_dynamic_config() if dynamic else code.get_default_static_config()

    def build() -> Built:
        with torch.no_grad():
            exported = capture(model, example_inputs=tuple(first.values()))
            prepared = code.prepare(exported, config)
            for row in each(rows):
                prepared(*_row(row).values())
            return _save_program(
                Named(code.convert(prepared), tuple(rows)), first, folder, strict=False
            )

    return build


class Positional(torch.nn.Module):
    """A module that takes its inputs in order."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: torch.Tensor) -> Any:
        return self.model(**dict(zip(self.names, values, strict=True)))


class Named(torch.nn.Module):
    """A module that takes its inputs by name."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.model(*(inputs[name] for name in self.names))


def _row(row: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in row.items()}


def _save_program(
    model: Any, first: dict[str, torch.Tensor], folder: Path, strict: bool = False
) -> Built:
    file = folder / "model.pt2"
    torch.export.save(torch.export.export(model, (), first, strict=strict), file)
    return "torch", file


def main() -> None:
    asked = request()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    task, folder = task_of(asked["task"]), Path(asked["folder"])
    rows = arrays(task.calibration())
    build = {"nncf": nncf, "onnxruntime": onnxruntime, "torchao": torchao, "inc": inc}
    ready = build[asked["peer"]](task, rows, asked["variant"], folder)
    before, started, busy = _peak(), time.monotonic(), time.process_time()
    runtime, file = ready()
    seconds, busy = time.monotonic() - started, time.process_time() - busy
    parts = [part for part in folder.iterdir() if part.is_file()]
    row = {
        "runtime": runtime,
        "path": str(file),
        "size": sum(part.stat().st_size for part in parts),
        "seconds": seconds,
        "cpu_seconds": busy,
        "peak_mb": _peak(),
        "peak_before_mb": before,
    }
    answer(row)
    answer(row | {"valid": task.evaluate(open_artifact(runtime, file, 1), "valid")})


def _peak() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
