"""A target turns a network into what a runtime runs, opens it there, and says beforehand what it cannot take."""

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from torch import fx

import tinier.targets
from tinier.errors import InputError, MissingError, RefusedError
from tinier.network import Network
from tinier.registry import implementations
from tinier.targets.precision import Precision

WARM_UP = 5  # runs before those that a profile counts


@dataclass(frozen=True)
class Artifact:
    """The files that one runtime needs to run one network.

    Attributes:
        target: name of the runtime.
        files: the first is the one to open; the others lie beside it.
        size: bytes on disk of all files together.
    """

    target: str
    files: tuple[Path, ...]
    size: int

    @staticmethod
    def of(target: str, *files: Path) -> "Artifact":
        """The artifact made of these files, measured on disk."""
        return Artifact(target, files, sum(file.stat().st_size for file in files))


@dataclass(frozen=True)
class Status:
    """Whether a runtime can be used here.

    Attributes:
        installed: its package can be imported.
        version: of the package; empty when it is not installed.
        reason: why it cannot be used; empty when it can.
        install: the command that installs it.
    """

    installed: bool
    version: str
    reason: str
    install: str


@dataclass(frozen=True)
class Input:
    """One input that an artifact declares: its name, its shape (None where a dimension is free) and its dtype."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Kernel:
    """One operation that a runtime ran, after it fused and rearranged the graph.

    Attributes:
        name: as the runtime calls it; it has the names of what was fused into it.
        kind: such as QLinearConv.
        milliseconds: median over runs.
    """

    name: str
    kind: str
    milliseconds: float


class Session(ABC):
    """An artifact, opened on its runtime.

    Attributes:
        inputs: what the file declares, in its order.
        threads: how many threads an operator may use.
    """

    inputs: tuple[Input, ...] = ()
    threads: int = 1

    @abstractmethod
    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs in the network's order, for inputs by name; dimension 0 is the batch."""


class Target(ABC):
    """A runtime. Implementations have no state: their class attributes say what they are."""

    name: ClassVar[str]
    package: ClassVar[str]  # the distribution that must be installed; empty for none
    extra: ClassVar[str]  # the extra of tinier that installs it; empty for none
    suffix: ClassVar[str]  # of the file to open
    # Instruction set → how many channels its kernels take at once; widths between are filled up with zeros.
    blocks: ClassVar[Mapping[str, int]] = {}
    # Bits of weights and activations that it takes; none unless a target says so.
    precision: ClassVar[Precision] = Precision()

    @classmethod
    def status(cls) -> Status:
        """Whether the runtime is installed, its version, and the command that installs it."""
        install = f"pip install 'tinier[{cls.extra}]'" if cls.extra else "pip install tinier"
        if not cls.package:
            return Status(True, "", "", install)
        try:
            return Status(True, importlib.metadata.version(cls.package), "", install)
        except importlib.metadata.PackageNotFoundError:
            return Status(False, "", f"{cls.package} is not installed", install)

    def refuses(self, network: Network) -> str | None:
        """Why this runtime cannot take the network; None if nothing is known against it."""
        refusal = self.precision.refuses_graph(network.traced.module)
        return None if refusal is None else f"it has no {refusal}"

    @abstractmethod
    def lower(self, network: Network, folder: Path, onnx_file: Path | None = None) -> Artifact:
        """Write the network in the runtime's own form.

        Args:
            network: a float or quantized network.
            folder: an existing folder; the files get the names that users of the runtime know.
            onnx_file: the network as an ONNX file, if there is one already: it saves writing it again.

        Raises:
            RefusedError: the runtime cannot take the network, with the operator and the reason.
        """

    @abstractmethod
    def open(self, file: Path, threads: int) -> Session:
        """Open an artifact's first file, to run on the CPU with this many threads.

        Raises:
            InputError: the file is missing, empty, damaged or of another kind.
        """

    def kernels(
        self, file: Path, inputs: Mapping[str, np.ndarray], threads: int, runs: int = 30
    ) -> list[Kernel]:
        """What the runtime spends its time on, by its own profiler.

        Args:
            file: an artifact's first file, or an ONNX file.
            inputs: input name → array.
            threads: of the session.
            runs: how many, after five that do not count.

        Raises:
            RefusedError: the runtime has no profiler.
        """
        raise RefusedError(f"{self.name} has no profiler that tells the time of single operators")

    def files(self, file: Path) -> tuple[Path, ...]:
        """All files of the artifact whose first file this is."""
        return (file,)

    @abstractmethod
    def usage(self, artifact: Artifact, network: Network) -> str:
        """Three lines of Python that run the artifact, from within its folder, without tinier."""


def targets_for(names: str | Sequence[str]) -> list[Target]:
    """The runtimes that a user asked for.

    Args:
        names: "cpu" (every installed runtime that really runs), a name, or several.

    Raises:
        InputError: an unknown name; the message lists the known ones.
        MissingError: a runtime that was asked for by name is not installed.
    """
    known = known_targets()
    wanted: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        if name == "cpu":
            wanted += [key for key, cls in known.items() if cls.package and cls.status().installed]
        elif name not in known:
            raise InputError(
                f"there is no target {name!r}; the targets are cpu, {', '.join(known)}"
            )
        elif not known[name].status().installed:
            raise MissingError(known[name].package, known[name].extra, f"the target {name}")
        else:
            wanted.append(name)
    return [known[name]() for name in dict.fromkeys(wanted)]


def known_targets() -> dict[str, type[Target]]:
    """Every target that tinier has, installed or not, by name."""
    return implementations(tinier.targets, Target)  # type: ignore[type-abstract]


def is_quantized(network: Network) -> bool:
    """Whether the network's graph has quantize/dequantize pairs."""
    return any(
        _namespace(node) == "quantized_decomposed" for node in network.traced.module.graph.nodes
    )


def _namespace(node: fx.Node) -> str:
    return getattr(node.target, "namespace", "") if node.op == "call_function" else ""


def readable(file: Path, kind: str) -> Path:
    """The file itself, once it is known to be a file with content.

    Raises:
        InputError: it is missing, a folder, or empty.
    """
    if not file.exists():
        raise InputError(f"{file}: there is no such file; {kind} is needed")
    if not file.is_file():
        raise InputError(f"{file} is a folder; {kind} is needed")
    if file.stat().st_size == 0:
        raise InputError(f"{file} is empty; {kind} is needed")
    return file


def damaged(file: Path, kind: str, error: BaseException) -> InputError:
    """The error for a file that its runtime cannot open, with the first line of what the runtime said."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return InputError(f"{file} cannot be opened as {kind}: {' '.join(lines[:2])[:300]}")


def onnx_files(file: Path) -> tuple[Path, ...]:
    """An ONNX file and the files beside it that hold its tensors.

    Raises:
        InputError: it is no ONNX file, or names tensors outside its folder.
    """
    kind = "an ONNX model"
    try:
        model = onnx.load(readable(file, kind), load_external_data=False)
    except DecodeError as error:
        raise damaged(file, kind, error) from error
    if not model.graph.node:
        raise InputError(f"{file} is not {kind}: it has no operators")
    names = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    folder = file.resolve().parent
    for name in names:
        if not (folder / name).resolve().is_relative_to(folder):
            raise InputError(
                f"{file} keeps tensors in {name}, outside its folder; move them beside the model"
            )
        readable(folder / name, f"the file of tensors of {file.name}")
    return (file, *(file.parent / name for name in sorted(names)))


def as_arrays(outputs: Iterable[object]) -> list[np.ndarray]:
    """Outputs as arrays."""
    return [np.asarray(output) for output in outputs]


def invented(network: Network) -> str:
    """The inputs of a network as one Python expression with numpy as np: names, shapes and dtypes, filled with ones."""
    parts = []
    for name, tensor in network.batch(1).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        parts.append(f'"{name}": np.ones({tuple(tensor.shape)}, dtype="{dtype}")')
    return "{" + ", ".join(parts) + "}"
