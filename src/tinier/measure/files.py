"""Measuring any files against each other: what ``tinier measure A B …`` does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinier.errors import InputError
from tinier.measure.latency import Latency, Ratio, interleaved, ratio
from tinier.measure.machine import default_threads
from tinier.measure.memory import Memory, peak_memory
from tinier.targets.base import Input, Session, Target, known_targets, targets_for


@dataclass(frozen=True)
class MeasuredFile:
    """One file's figures.

    Attributes:
        path: as it was given, without the runtime's name before it.
        target: the runtime that ran it.
        latency: milliseconds of one run.
        size: bytes on disk of all its files.
        memory: of a fresh process that runs it; None when that was not asked for.
        ratio: how many times as long it takes as the first file; None for the first.
    """

    path: Path
    target: str
    latency: Latency
    size: int
    memory: Memory | None
    ratio: Ratio | None


def measure_files(
    paths: Sequence[str | Path],
    *,
    batch: int = 1,
    threads: int | None = None,
    seconds: float | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    memory: bool = True,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> list[MeasuredFile]:
    """Latency, size and peak memory of files that take the same inputs, on inputs made up from what they declare.

    Args:
        paths: ``.onnx`` (run on ONNX Runtime), ``.xml`` (OpenVINO), ``.pt2`` (torch), or a folder with one of them;
            "openvino:model.onnx" chooses the runtime.
        batch: dimension 0 of every input, where it is free.
        threads: of each runtime; by default the physical cores that this process may use.
        seconds: for all latencies together; by default 2 for each file.
        shapes: input name → whole shape, for inputs with free dimensions other than the batch.
        memory: whether peak memory is measured too, in a fresh process for each file.
        seed: of the made-up inputs, of the order of runs, of the bootstrap.
        progress: called with the seconds of latency measurement spent.

    Returns:
        One row for each path, in their order.

    Raises:
        InputError: a file that is missing, damaged, of an unknown kind or cannot be run; inputs that differ or whose shape is
            not known; the message names the file.
        MissingError: a file's runtime is not installed.
    """
    if not paths:
        raise InputError("measure: no files; give at least one .onnx, .xml or .pt2")
    if batch < 1:
        raise InputError(f"measure: the batch is {batch}; at least 1 is needed")
    threads = default_threads() if threads is None else threads
    if threads < 1:
        raise InputError(f"measure: {threads} threads; at least 1 is needed")
    places = [_place(path) for path in paths]
    sessions = [target.open(file, threads) for target, file in places]
    declared = [
        invent_shapes(session, batch, shapes or {}, file)
        for session, (_, file) in zip(sessions, places, strict=True)
    ]
    for (_, file), ports in zip(places, declared, strict=True):
        _same(places[0][1], declared[0], file, ports)
    inputs = invent(declared[0], seed)
    for session, (_, file) in zip(sessions, places, strict=True):
        _try(session, inputs, file)
    keyed = {str(index): session for index, session in enumerate(sessions)}
    seconds = 2.0 * len(paths) if seconds is None else seconds
    timed = list(interleaved(keyed, inputs, seconds=seconds, seed=seed, progress=progress).values())
    return [
        MeasuredFile(
            path=file,
            target=target.name,
            latency=latency,
            size=sum(part.stat().st_size for part in target.files(file)),
            memory=peak_memory(target.name, file, inputs, threads) if memory else None,
            ratio=ratio(latency, timed[0], seed) if index else None,
        )
        for index, ((target, file), latency) in enumerate(zip(places, timed, strict=True))
    ]


def invent_shapes(
    session: Session, batch: int, shapes: Mapping[str, Sequence[int]], file: Path
) -> list[Input]:
    """The inputs that a session declares, with a number for every dimension.

    Raises:
        InputError: a free dimension without a number, or a number that is not the declared one.
    """
    unknown = set(shapes) - {port.name for port in session.inputs}
    if unknown:
        names = ", ".join(port.name for port in session.inputs)
        raise InputError(f"{file} has no input {sorted(unknown)[0]}; it has {names}")
    ports = []
    for port in session.inputs:
        wanted: Sequence[int | None] = shapes.get(port.name, (batch, *port.shape[1:]))
        if not port.shape:
            wanted = ()
        shown = ", ".join("?" if n is None else str(n) for n in port.shape)
        if len(wanted) != len(port.shape):
            raise InputError(
                f"{file}: input {port.name} has shape ({shown}), {len(port.shape)} dimensions; "
                f"got {len(wanted)}"
            )
        if None in wanted:
            raise InputError(
                f"{file}: input {port.name} has shape ({shown}), with free dimensions; "
                f"say which to measure, such as {port.name}={'x'.join(str(n or 128) for n in wanted)}"
            )
        for dim, (got, fixed) in enumerate(zip(wanted, port.shape, strict=True)):
            if fixed is not None and got != fixed:
                what = "the batch" if dim == 0 else f"dimension {dim}"
                raise InputError(
                    f"{file}: {what} of input {port.name} is fixed at {fixed}, got {got}; use {fixed}"
                )
        ports.append(Input(port.name, tuple(wanted), port.dtype))
    return ports


def invent(ports: Sequence[Input], seed: int) -> dict[str, np.ndarray]:
    """Inputs: standard normal floats, and ones for integers, which are valid token ids, types and masks."""
    rng = np.random.default_rng(seed)
    return {
        port.name: (
            rng.standard_normal(port.shape).astype(port.dtype)  # type: ignore[arg-type]
            if np.issubdtype(port.dtype, np.floating)
            else np.ones(port.shape, port.dtype)  # type: ignore[arg-type]
        )
        for port in ports
    }


def _place(path: str | Path) -> tuple[Target, Path]:
    """The runtime and the file that a path stands for."""
    known = known_targets()
    name, colon, rest = str(path).partition(":")
    chosen = name if colon and name in known else None
    file = Path(rest if chosen else path)
    if file.is_dir():
        file = _inside(file, known)
    if chosen is None:
        endings = {cls.suffix: key for key, cls in known.items()}
        chosen = next((key for end, key in endings.items() if file.name.endswith(end)), None)
    if chosen is None:
        if not file.exists():
            raise InputError(f"{file}: there is no such file")
        raise InputError(
            f"{file}: no runtime is known for files called *{file.suffix}; "
            f"give {', '.join(cls.suffix for cls in known.values() if cls.package)}"
        )
    return targets_for(chosen)[0], file


def _inside(folder: Path, known: Mapping[str, type[Target]]) -> Path:
    endings = tuple(cls.suffix for cls in known.values())
    found = sorted(file for file in folder.iterdir() if file.name.endswith(endings))
    if len(found) != 1:
        what = f"{len(found)} models: {', '.join(f.name for f in found)}" if found else "no model"
        raise InputError(f"{folder} holds {what}; give the file to measure")
    return found[0]


def _same(first: Path, wanted: Sequence[Input], file: Path, got: Sequence[Input]) -> None:
    left, right = ({p.name: (p.shape, str(p.dtype)) for p in ports} for ports in (wanted, got))
    if left != right:
        raise InputError(
            f"{file} takes {_described(got)}, {first} takes {_described(wanted)}; "
            "files that are compared must take the same inputs"
        )


def _described(ports: Sequence[Input]) -> str:
    return ", ".join(f"{p.name}: {p.dtype} {p.shape}" for p in ports) or "nothing"


def _try(session: Session, inputs: Mapping[str, np.ndarray], file: Path) -> None:
    try:
        session.run(inputs)
    # What runtimes raise has no common base.
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        shapes = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
        raise InputError(f"{file} cannot be run on {shapes}: {line}") from error
