"""Competitors, each in a virtual environment of its own that borrows torch and everything else from this one.

    environment = peer_environment("torch-pruning", ["torch-pruning==1.6.1"])
    answer = run_peer(environment, script, {"name": "BERT"}, seconds=60)

Environments are made once, in the cache folder of the user ($TINIER_PEERS, or tinier-peers in $XDG_CACHE_HOME or ~/.cache). Only the
packages named are installed there (``pip install --no-deps``); the site-packages of the interpreter that runs this stand behind them.
A script that runs there reads one JSON object from standard input and calls ``answer`` with another.
"""

import json
import os
import site
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TORCH_PRUNING = ("torch-pruning==1.6.1",)


class PeerError(Exception):
    """A competitor's environment could not be made."""


def peer_environment(name: str, requirements: Sequence[str] = TORCH_PRUNING) -> Path:
    """The interpreter of a competitor's environment, made where it is missing.

    Args:
        name: of the environment; a folder in the cache.
        requirements: what pip installs, pinned; their dependencies come from this environment.

    Returns:
        Path of its python.

    Raises:
        PeerError: pip failed; the message has its last lines.
    """
    folder = cache() / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / "requirements.txt"
    wanted = "\n".join([*requirements, sys.version])
    if done.is_file() and done.read_text() == wanted and python.exists():
        return python
    venv.EnvBuilder(clear=True, with_pip=False).create(folder)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # A .pth line beginning with "import" is run: addsitedir also reads the .pth files of what it adds, as of editable installs.
    behind = [*site.getsitepackages(), str(Path(__file__).resolve().parent)]
    lines = [f"import site; site.addsitedir({path!r})" for path in behind]
    (own / "behind.pth").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    command += ["--no-deps", "--quiet", "--disable-pip-version-check", *requirements]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise PeerError(
            f"{name}: {' '.join(requirements)} cannot be installed: {_tail(made.stderr)}"
        )
    done.write_text(wanted)
    return python


def run_peer(
    python: Path, script: Path, request: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Run a script with JSON in and JSON out, on one thread.

    Args:
        python: the interpreter.
        script: reads the request with ``request()`` and ends with ``answer(…)``.
        request: anything that JSON holds.
        seconds: time limit.

    Returns:
        What the script answered, or ``{"error": …}`` with the last line of what it said, or that time was up; with "late"
        where time was up after an answer, which may then not be its last.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "answer.json"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TINIER_ANSWER": str(result),
            "TOKENIZERS_PARALLELISM": "false",
        }
        try:
            done = subprocess.run(
                [str(python), "-W", "ignore", str(script)],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                timeout=seconds,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            if result.is_file():  # what it had by then
                return {**json.loads(result.read_text()), "late": True}
            return {"error": f"no answer in {seconds:.0f} s"}
        if not result.is_file():
            return {"error": _tail(done.stderr) or f"ended with {done.returncode}"}
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def request() -> dict[str, Any]:
    """In a script that ``run_peer`` runs: what was asked."""
    found: dict[str, Any] = json.loads(sys.stdin.read())
    return found


def answer(result: Mapping[str, Any]) -> None:
    """In a script that ``run_peer`` runs: what to give back; the last call counts."""
    path = Path(os.environ["TINIER_ANSWER"])
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result))
    partial.replace(path)


def cache() -> Path:
    """The folder of the environments."""
    if "TINIER_PEERS" in os.environ:
        return Path(os.environ["TINIER_PEERS"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tinier-peers"


def _tail(text: str, lines: int = 1) -> str:
    """The last lines of what a program said."""
    said = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(said[-lines:])[:300]
