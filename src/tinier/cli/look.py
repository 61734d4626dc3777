"""Commands that change nothing: inspect, measure, verify, targets."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tinier.cli.app import DOES_NOT_HOLD, Batch, Json, Threads, app, guarded, print_json
from tinier.inspect import Inspection
from tinier.inspect import inspect as run_inspect
from tinier.measure.files import MeasuredFile, measure_files
from tinier.measure.machine import machine
from tinier.report import words
from tinier.report.terminal import Bars
from tinier.verify import verify as run_verify


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="An .onnx, .keras or .pt2 file, a Hugging Face directory, or module:function."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Data to take example inputs from, where the model does not say what it takes; for --distributions to run."
        ),
    ] = None,
    keep: Annotated[
        float,
        typer.Option(help="Share of the MACs for the bars that show what pruning would leave."),
    ] = 0.5,
    distributions: Annotated[
        bool,
        typer.Option(
            "--distributions",
            help="Show how the values of every weight, and with --data of every activation, are distributed.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="HTML file for the distributions, with a histogram each."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show layers, parameters, MACs, channel groups, what pruning would leave, and what is pinned and why."""
    distributions = distributions or out is not None

    def work(bars: Bars) -> Inspection:
        found = run_inspect(model, data=data, keep=keep, distributions=distributions)
        if out is not None:
            found.write_distributions(out)
        return found

    report = guarded(work)
    if as_json:
        print_json(report.as_dict())
    elif distributions:
        report.show_distributions(Console())
    else:
        report.show(Console())


@app.command()
def measure(
    files: Annotated[
        list[str],
        typer.Argument(help="Artifacts: .onnx, .xml, .pt2, result folders, or runtime:file."),
    ],
    batch: Batch = 1,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(help="Time to spend on all files together.")] = 10.0,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Size of a free dimension, as input=1x3x224x224; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time files against each other, interleaved, and measure their size and peak memory."""

    def work(bars: Bars) -> list[MeasuredFile]:
        with bars.task("timing, interleaved", seconds) as step:
            return measure_files(
                files,
                batch=batch,
                threads=threads,
                seconds=seconds,
                shapes=_shapes(shape),
                progress=step,
            )

    table = guarded(work)
    if as_json:
        print_json([_measured(row) for row in table])
        return
    shown = Table(box=None, header_style="bold")
    heads = (
        "file",
        "runtime",
        "median ms",
        "95 % interval",
        "p95 ms",
        "size",
        "peak memory",
        "ratio to the first",
    )
    for index, head in enumerate(heads):
        shown.add_column(head, justify="left" if index < 2 else "right", overflow="fold")
    for row in table:
        latency, ratio = row.latency, row.ratio
        shown.add_row(
            str(row.path),
            row.target,
            words.plain(latency.median),
            f"{words.plain(latency.low)} – {words.plain(latency.high)}",
            words.plain(latency.p95),
            words.size(row.size),
            words.size(row.memory.peak if row.memory else None),
            f"{words.plain(ratio.value)} ({words.plain(ratio.low)} – {words.plain(ratio.high)})"
            if ratio
            else words.NOTHING,
        )
    console = Console()
    console.print(shown)
    console.print(f"batch {batch}, {table[0].latency.threads} threads, interleaved", style="dim")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="What compress wrote.")],
    data: Annotated[
        str | None,
        typer.Option(help="Where the certification data are now; where they were, if not given."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="The metric, where it is a module:function; it is run only if it is named here."
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Check hashes, run the artifact again and recompute its certificate."""
    checks = guarded(
        lambda bars: run_verify(folder, data=data, metric=metric, threads=threads, progress=bars)
    )
    holds = all(check.holds is not False for check in checks)
    if as_json:
        print_json({"holds": holds, "checks": [vars(check) for check in checks]})
    else:
        table = Table(box=None, show_header=False)
        words = {True: "[green]holds[/]", False: "[bold red]does not hold[/]", None: "not checked"}
        for check in checks:
            table.add_row(words[check.holds], check.what, check.detail)
        console = Console()
        console.print(table)
        console.print("The result holds." if holds else "The result does not hold any more.")
    raise typer.Exit(0 if holds else DOES_NOT_HOLD)


@app.command()
def targets(as_json: Json = False) -> None:
    """Show which runtimes are installed, what the CPU has, and how to install what is missing."""
    facts = machine()
    if as_json:
        print_json(
            {
                "cpu": facts.cpu,
                "cores": facts.cores,
                "flags": facts.flags,
                "vnni": facts.vnni,
                "runtimes": {name: vars(status) for name, status in facts.runtimes.items()},
            }
        )
        return
    console = Console()
    console.print(
        f"{facts.cpu}, {facts.cores} cores, {facts.memory / 2**30:.0f} GiB, {facts.system}"
    )
    console.print(f"instructions: {', '.join(facts.flags) or 'none known'}")
    console.print(
        "int8: exact sums (VNNI or the like)"
        if facts.vnni
        else "int8: no VNNI; products of 8-bit pairs saturate at 16 bits, so that weights are scaled to avoid it"
    )
    table = Table(box=None, header_style="bold")
    for head in ("target", "version", "install"):
        table.add_column(head)
    for name, status in facts.runtimes.items():
        table.add_row(
            name, status.version or "not installed", "" if status.installed else status.install
        )
    console.print(table)


def _measured(row: MeasuredFile) -> dict[str, Any]:
    latency = {key: value for key, value in vars(row.latency).items() if key != "rounds"}
    return {
        "file": str(row.path),
        "target": row.target,
        "latency_ms": latency,
        "size_bytes": row.size,
        "peak_memory_bytes": row.memory.peak if row.memory else None,
        "ratio_to_first": vars(row.ratio) if row.ratio else None,
    }


def _shapes(texts: list[str] | None) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for text in texts or ():
        name, _, sizes = text.partition("=")
        try:
            shapes[name] = tuple(int(size) for size in sizes.split("x"))
        except ValueError:
            raise typer.BadParameter(f"--shape is {text!r}; write input=1x3x224x224") from None
    return shapes
