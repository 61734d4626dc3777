"""The command line: the verbs of the public face, in words."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tinier.compress import compress as run_compress
from tinier.demo.run import demo as run_demo
from tinier.errors import TinierError
from tinier.inspect import inspect as run_inspect
from tinier.measure.files import MeasuredFile, measure_files
from tinier.measure.machine import machine
from tinier.report import words
from tinier.report.rows import rows, summary
from tinier.report.terminal import Bars, show
from tinier.search.candidate import Result
from tinier.verify import verify as run_verify
from tinier.version import VERSION

# Exit codes, as `tinier --help` documents them.
WRONG_INPUT, LIMIT_MISSED, DOES_NOT_HOLD, INTERRUPTED = 2, 3, 4, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Make a trained neural network smaller and faster, and prove what it cost.",
    epilog="Exit codes: 0 done; 1 a bug of tinier's; 2 wrong input; 3 no candidate keeps the limits (the nearest is in the folder); "
    "4 a result does not hold; 130 interrupted (the best so far is in the folder).",
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines on standard output.")]
Threads = Annotated[
    int | None,
    typer.Option(help="Threads of the runtimes; the cores of this machine if not given."),
]
Batch = Annotated[int, typer.Option(help="Batch size that is timed.")]


@app.command()
def compress(
    model: Annotated[
        str,
        typer.Argument(
            help="An ONNX file, a Hugging Face directory, or module:function that gives an nn.Module."
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Examples: .npz, a folder of class folders of images, .csv, .jsonl, .parquet, or module:function."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.")],
    metric: Annotated[
        str | None,
        typer.Option(help="accuracy, agreement, a torchmetrics name, or module:function."),
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option(help="Greatest loss of the metric, such as 1% or 0.01.")
    ] = None,
    max_latency: Annotated[str | None, typer.Option(help="Greatest latency, such as 5ms.")] = None,
    max_size: Annotated[str | None, typer.Option(help="Greatest size, such as 4MB.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="cpu (all installed runtimes, the fastest wins) or a runtime; may be repeated."
        ),
    ] = None,
    budget: Annotated[str, typer.Option(help="Time to spend, such as 90s or 10m.")] = "10m",
    train: Annotated[
        str | None,
        typer.Option(help="Examples to recover pruned networks with; nothing is trained without."),
    ] = None,
    certify: Annotated[
        str | None,
        typer.Option(help="Examples for the certificate alone; 70 % of the data if not given."),
    ] = None,
    batch: Batch = 1,
    threads: Threads = None,
    delta: Annotated[
        float, typer.Option(help="Greatest probability that the certificate is wrong.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(help="Of the split, the training and the timing order.")] = 0,
    mean: Annotated[
        str | None, typer.Option(help="Mean of each image channel in [0, 1], by comma.")
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="Deviation of each image channel, by comma.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens at which texts are cut.")] = 128,
    as_json: Json = False,
) -> None:
    """Find the best version of a model inside the limits, measure it and certify its loss."""

    def work(bars: Bars) -> Result:
        return run_compress(
            model,
            data,
            train=train,
            certify=certify,
            metric=metric,
            max_drop=max_drop,
            max_latency=max_latency,
            max_size=max_size,
            target=target or "cpu",
            budget=budget,
            out=out,
            batch=batch,
            threads=threads,
            delta=delta,
            seed=seed,
            progress=bars,
            mean=_numbers(mean, "mean"),
            std=_numbers(std, "std"),
            max_length=max_length,
        )

    _finish(_guarded(work), as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.")] = Path(
        "demo-out"
    ),
    budget: Annotated[str, typer.Option(help="Time to spend.")] = "205s",
    as_json: Json = False,
) -> None:
    """Run the whole of it on a ResNet-20 for Fashion-MNIST that comes with tinier."""
    _finish(_guarded(lambda bars: run_demo(out=out, budget=budget, progress=bars)), as_json)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="An ONNX file, a Hugging Face directory, or module:function.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Data to take example inputs from, where the model does not say what it takes."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show layers, parameters, MACs, channel groups, and what is pinned and why."""
    report = _guarded(lambda bars: run_inspect(model, data=data))
    if as_json:
        _print_json(report.as_dict())
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

    table = _guarded(work)
    if as_json:
        _print_json([_measured(row) for row in table])
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
    checks = _guarded(
        lambda bars: run_verify(folder, data=data, metric=metric, threads=threads, progress=bars)
    )
    holds = all(check.holds is not False for check in checks)
    if as_json:
        _print_json({"holds": holds, "checks": [vars(check) for check in checks]})
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
        _print_json(
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


@app.callback(invoke_without_command=True)
def main_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"tinier {VERSION}")
        raise typer.Exit


def _guarded(work: Callable[[Bars], Any]) -> Any:
    """Run with progress bars on standard error; errors made on purpose become one message and their exit code."""
    try:
        with Bars() as bars:
            return work(bars)
    except TinierError as error:
        Console(stderr=True).print(
            f"[bold red]error:[/] {_escaped(str(error))}", highlight=False, soft_wrap=True
        )
        raise typer.Exit(WRONG_INPUT) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; nothing was written")
        raise typer.Exit(INTERRUPTED) from None


def _finish(result: Result, as_json: bool) -> None:
    if as_json:
        _print_json(
            {
                "met": result.met,
                "summary": summary(result),
                "reason": result.reason,
                "folder": str(result.folder) if result.folder else None,
                "table": rows(result),
            }
        )
    else:
        # Nobody sees columns in a file or a pipe: nothing needs to be left out there.
        console = Console(width=None if sys.stdout.isatty() else 160)
        show(result, console)
        if result.folder:
            console.print(
                f"\nThe result is in {result.folder}; open report.html there.", soft_wrap=True
            )
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(0 if result.met else LIMIT_MISSED)


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


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1, default=str)
    print()


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


def _numbers(text: str | None, name: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"--{name} is {text!r}; write numbers such as 0.485,0.456,0.406"
        ) from None


def _shapes(texts: list[str] | None) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for text in texts or ():
        name, _, sizes = text.partition("=")
        try:
            shapes[name] = tuple(int(size) for size in sizes.split("x"))
        except ValueError:
            raise typer.BadParameter(f"--shape is {text!r}; write input=1x3x224x224") from None
    return shapes


def main() -> None:
    """Entry point of the command ``tinier``."""
    app()
