"""PyTorch itself: the traced graph as a .pt2 archive (torch.export), read back without unpickling anything."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tinier.errors import RefusedError
from tinier.graph.archive import KIND, read, write
from tinier.graph.states import quiet
from tinier.network import Network
from tinier.targets.base import (
    Artifact,
    Input,
    Session,
    Target,
    as_arrays,
    invented,
    is_quantized,
    readable,
)
from tinier.targets.precision import Precision


class Torch(Target):
    """``model.pt2``: float networks, run eagerly from the exported graph."""

    name: ClassVar[str] = "torch"
    package: ClassVar[str] = "torch"
    extra: ClassVar[str] = ""
    suffix: ClassVar[str] = ".pt2"
    precision: ClassVar[Precision] = Precision(
        reason="torch runs quantize/dequantize pairs as float arithmetic: slower than the float network, and no smaller in memory"
    )

    def refuses(self, network: Network) -> str | None:
        if is_quantized(network):
            return self.precision.reason
        return None

    def lower(self, network: Network, folder: Path, onnx_file: Path | None = None) -> Artifact:
        if reason := self.refuses(network):
            raise RefusedError(f"torch cannot take {network.name}: {reason}")
        file = folder / "model.pt2"
        write(network.traced, network.example, file)
        return Artifact.of(self.name, file)

    def open(self, file: Path, threads: int) -> Session:
        return TorchSession(readable(file, KIND), threads)

    def usage(self, artifact: Artifact, network: Network) -> str:
        inputs = re.sub(
            r"np\.ones\((.*?), dtype=\"(\w+)\"\)",
            r"torch.ones(\1, dtype=torch.\2)",
            invented(network),
        )
        return "\n".join(
            [
                "import torch",
                f'model = torch.export.load("{artifact.files[0].name}").module()',
                f"print(model(**{inputs}))",
            ]
        )


class TorchSession(Session):
    """The graph of an archive, in inference mode."""

    def __init__(self, file: Path, threads: int) -> None:
        exported = read(file)
        with quiet():
            module = exported.module(check_guards=False)
        self.threads = threads
        self.inputs = tuple(_declared(exported))
        # The bare graph costs what the model itself costs; torch.export's checks of each call, which the lines of `usage`
        # have, would add 0.1 ms and make small models look slow.
        module.graph.set_codegen(fx.graph.CodeGen())
        self._module = fx.GraphModule(module, module.graph)

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        # The number of threads belongs to the process, so each run sets its own.
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                outputs = self._module(*[_tensor(inputs[port.name]) for port in self.inputs])
        finally:
            if before != self.threads:
                torch.set_num_threads(before)
        leaves = pytree.tree_leaves(outputs)
        return as_arrays(leaf.numpy() for leaf in leaves if isinstance(leaf, torch.Tensor))


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _declared(exported: ExportedProgram) -> Iterator[Input]:
    _, named = exported.example_inputs or ((), {})
    values = {
        node.name: node.meta["val"]
        for node in exported.graph.find_nodes(op="placeholder")
        if node.name in exported.graph_signature.user_inputs
    }
    for name, value in zip(named, values.values(), strict=True):
        shape = tuple(n if isinstance(n, int) else None for n in value.shape)
        yield Input(name, shape, np.dtype(str(value.dtype).removeprefix("torch.")))
