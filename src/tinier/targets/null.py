"""The null target: it runs nothing, takes the time it is told to take, and serves the tests."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from tinier.errors import RefusedError
from tinier.network import Network
from tinier.targets.base import Artifact, Input, Session, Target, damaged, readable
from tinier.targets.precision import ANY, Precision

KIND = "a null artifact (model.null.json)"


class NullTarget(Target):
    """Stores the shapes of the network and a file as large as its tensors; a run returns zeros.

    The file is JSON: ``seconds`` is how long one run takes, ``outputs`` the shapes and dtypes of what it returns
    (null stands for the batch). Tests write it by hand where they need other figures.
    """

    name: ClassVar[str] = "null"
    package: ClassVar[str] = ""
    extra: ClassVar[str] = ""
    suffix: ClassVar[str] = ".null.json"
    precision: ClassVar[Precision] = ANY

    def refuses(self, network: Network) -> str | None:
        return getattr(network.module, "null_refuses", None)

    def lower(self, network: Network, folder: Path, onnx_file: Path | None = None) -> Artifact:
        if reason := self.refuses(network):
            raise RefusedError(reason)
        traced = network.traced
        tensors = {id(t): t for t in traced.module.state_dict(keep_vars=True).values()}
        outputs = network(network.example)
        batch = len(next(iter(network.example.values())))

        def port(tensor: torch.Tensor) -> dict[str, object]:
            shape = [
                None if d == 0 and traced.batched and n == batch else n
                for d, n in enumerate(tensor.shape)
            ]
            return {"shape": shape, "dtype": str(tensor.dtype).removeprefix("torch.")}

        declared = {
            "seconds": 0.0,
            "inputs": {name: port(tensor) for name, tensor in network.example.items()},
            "outputs": {
                name: port(tensor) for name, tensor in zip(traced.outputs, outputs, strict=True)
            },
        }
        file = folder / f"model{self.suffix}"
        file.write_text(json.dumps(declared, indent=1), encoding="utf-8")
        weights = folder / "model.null.bin"
        weights.write_bytes(bytes(sum(t.numel() * t.element_size() for t in tensors.values())))
        return Artifact.of(self.name, file, weights)

    def open(self, file: Path, threads: int) -> Session:
        try:
            declared = json.loads(readable(file, KIND).read_text(encoding="utf-8"))
            return NullSession(declared, threads)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(file, KIND, error) from error

    def files(self, file: Path) -> tuple[Path, ...]:
        weights = file.with_name("model.null.bin")
        return (file, weights) if weights.exists() else (file,)

    def usage(self, artifact: Artifact, network: Network) -> str:
        file = artifact.files[0].name
        return "\n".join(
            [
                "import json, numpy as np",
                f'declared = json.load(open("{file}", encoding="utf-8"))["outputs"].values()',
                'print([np.zeros([n or 1 for n in o["shape"]], o["dtype"]) for o in declared])',
            ]
        )


class NullSession(Session):
    """Waits as long as the artifact says and returns zeros."""

    def __init__(self, declared: Mapping, threads: int) -> None:
        self.inputs = tuple(
            Input(name, tuple(port["shape"]), np.dtype(port["dtype"]))
            for name, port in declared["inputs"].items()
        )
        self.threads = threads
        self._seconds = float(declared["seconds"])
        self._outputs = [
            (tuple(port["shape"]), np.dtype(port["dtype"])) for port in declared["outputs"].values()
        ]
        if not (math.isfinite(self._seconds) and self._seconds >= 0):
            raise ValueError(f"seconds: got {declared['seconds']}, needs 0 or more")

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if self._seconds:
            time.sleep(self._seconds)
        batch = len(next(iter(inputs.values())))
        return [
            np.zeros([batch if n is None else n for n in shape], dtype)
            for shape, dtype in self._outputs
        ]
