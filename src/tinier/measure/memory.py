"""How much memory an artifact needs, measured in a fresh process that has only numpy and the runtime."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinier.errors import InputError

RUNS = 3  # the first allocates, the others show that it stays


@dataclass(frozen=True)
class Memory:
    """Bytes resident in a process that opens an artifact and runs it.

    Attributes:
        peak: the most there ever was, runtime included.
        baseline: after the runtime was imported, before the artifact was opened.
    """

    peak: int
    baseline: int

    @property
    def added(self) -> int:
        """What the artifact took on top of its runtime."""
        return self.peak - self.baseline


def peak_memory(
    target: str,
    file: Path,
    inputs: Mapping[str, np.ndarray],
    threads: int,
    *,
    limit: float = 120.0,
) -> Memory:
    """Open an artifact in a fresh process, run it three times, and read the process's peak.

    Args:
        target: name of the runtime.
        file: the artifact's first file, one that ``Target.open`` has accepted: the process does not check it again.
        inputs: input name → array; their size in memory is part of the figure.
        threads: of the runtime.
        limit: seconds that the process may take.

    Returns:
        Peak and baseline in bytes.

    Raises:
        InputError: the process failed or took too long; the message has the last lines it wrote.

    Cost:
        One start of Python and of the runtime, about a second (torch: three).
    """
    probe = Path(__file__).with_name("probe.py")
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "inputs.npz"
        # A folder in the archive, because savez has parameters of its own that inputs may be named like.
        members = {f"inputs/{name}": array for name, array in inputs.items()}
        np.savez(archive, **members)  # type: ignore[arg-type]
        # -P: the folder of the probe is not searched for modules.
        arguments = [target, str(file.resolve()), str(archive), str(threads), str(RUNS)]
        try:
            done = subprocess.run(
                [sys.executable, "-P", str(probe), *arguments],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"{file}: measuring its memory on {target} took more than {limit:g} s; give it more time"
            ) from error
    try:
        if done.returncode:
            raise ValueError
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        return Memory(int(figures["peak"]), int(figures["baseline"]))
    except (ValueError, IndexError, KeyError) as error:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise InputError(
            f"{file}: running it on {target} in a process of its own failed "
            f"(exit code {done.returncode}): {' | '.join(lines[-3:]) or 'it wrote nothing'}"
        ) from error
