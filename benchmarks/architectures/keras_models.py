"""The seven of ``keras.applications`` that the engine must take, on the torch backend, channels last, with small pictures.

Run as a file it measures each from end to end:

    python benchmarks/architectures/keras_models.py [--size 64] [--backends numpy jax] [name …]

prunes to half of the MACs, proves, writes a ``.keras`` file, loads it with plain Keras (without tinier) on every backend, trains one
step with ``model.fit``, exports to ONNX, saves and loads, and prints a line for each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from architectures.base import Architecture, stir

SIZES = {
    "MobileNetV2": 64,
    "ResNet50": 64,
    "EfficientNetB0": 64,
    "DenseNet121": 64,
    "ConvNeXtTiny": 64,
    "Xception": 96,
    "InceptionV3": 96,
}
CLASSES = 10
# Runs where tinier is not: loads the file with plain Keras and computes.
PLAIN = """
import sys
import numpy as np
import keras
assert "tinier" not in sys.modules
model = keras.saving.load_model(sys.argv[1], compile=False)
x = np.load(sys.argv[2])
y = np.asarray(model.predict(x, verbose=0) if keras.backend.backend() != "torch" else model(x).detach())
np.save(sys.argv[3], y)
"""


def keras_model(name: str, size: int | None = None, **options: Any) -> Callable[[], Any]:
    """Makes a model of ``keras.applications`` with random weights."""

    def build() -> Any:
        os.environ.setdefault("KERAS_BACKEND", "torch")
        import keras

        keras.utils.clear_session()  # names are counted in a process: a model built again has to have the same
        keras.utils.set_random_seed(0)
        side = size or SIZES[name]
        kind = getattr(keras.applications, name)
        return kind(weights=None, input_shape=(side, side, 3), classes=CLASSES, **options)

    return build


ARCHITECTURES = tuple(
    Architecture(f"{name} (Keras)", "keras", keras_model(name), None, lengths={}) for name in SIZES
)


def on_backend(backend: str, file: Path, x: Any, folder: Path) -> Any:
    """Outputs of a ``.keras`` file in a fresh process of plain Keras on a backend; an exception says what it wrote."""
    import numpy as np

    np.save(folder / "x.npy", x)
    path = os.pathsep.join(p for p in sys.path if p.endswith("site-packages"))
    extra = os.environ.get("KERAS_BACKENDS_PATH", "")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(file), str(folder / "x.npy"), str(folder / "y.npy")],
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join([extra, path])},
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr else "no message")
    return np.load(folder / "y.npy")


def relative(found: Any, wanted: Any) -> float:
    """The largest difference relative to the largest value."""
    return float(abs(found - wanted).max() / abs(wanted).max())


def measure(name: str, size: int | None, backends: list[str]) -> dict[str, Any]:
    """One line of the table."""
    import numpy as np

    import tinier
    from tinier.edits.slice import prove
    from tinier.sources.keras import write_keras

    torch.manual_seed(0)
    model = keras_model(name, size)()
    stir(model)
    row: dict[str, Any] = {"name": name}
    started = time.perf_counter()
    network = tinier.sources.load.load(model)
    row["trace_s"] = time.perf_counter() - started
    row["operators"] = len(network.traced.module.graph.nodes)
    started = time.perf_counter()
    smaller = tinier.prune(network, keep=0.5)
    row["prune_s"] = time.perf_counter() - started
    cost = smaller.as_dict()
    row["macs"] = cost["macs"]["after"] / cost["macs"]["before"]
    row["parameters"] = cost["parameters"]["after"] / cost["parameters"]["before"]
    row["difference"] = prove(smaller.original, smaller.network, smaller.plan)
    row["class"] = type(smaller.model).__name__
    row["batch_free"] = smaller.network.traced.batched
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = folder / "small.keras"
        write_keras(smaller.network, file)
        x = np.random.default_rng(0).normal(
            size=(3, *network.example[next(iter(network.example))].shape[1:])
        )
        x = x.astype(np.float32)
        wanted = smaller.network({next(iter(network.example)): torch.from_numpy(x)})[0].numpy()
        for backend in backends:
            try:
                row[backend] = relative(on_backend(backend, file, x, folder), wanted)
            except RuntimeError as error:
                row[backend] = str(error)
        artifact = tinier.export(smaller, folder / "onnx", target="onnxruntime")
        import onnxruntime

        session = onnxruntime.InferenceSession(
            artifact.files[0], providers=["CPUExecutionProvider"]
        )
        row["onnx"] = relative(session.run(None, {session.get_inputs()[0].name: x})[0], wanted)
        tinier.save(smaller, folder / "saved")
        again = tinier.load(folder / "saved", into=network)
        row["saved"] = relative(
            again.network({next(iter(network.example)): torch.from_numpy(x)})[0].numpy(), wanted
        )
    trained = smaller.model
    before = [v.numpy() for v in trained.trainable_variables]
    trained.compile(optimizer="sgd", loss="sparse_categorical_crossentropy")
    trained.fit(np.repeat(x, 2, 0), np.arange(6) % CLASSES, epochs=1, batch_size=6, verbose=0)
    moved = [
        not np.array_equal(a, v.numpy())
        for a, v in zip(before, trained.trainable_variables, strict=True)
    ]
    row["trained"] = sum(moved) / len(moved)
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(SIZES))
    parser.add_argument("--size", type=int, default=None)
    parser.add_argument("--backends", nargs="*", default=["torch", "numpy"])
    chosen = parser.parse_args()
    for one in chosen.names:
        print(json.dumps(measure(one, chosen.size, chosen.backends), default=str), flush=True)
