"""The main job and its demonstration."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tinier.cli.app import INTERRUPTED, LIMIT_MISSED, Batch, Json, Threads, app, guarded, print_json
from tinier.compress import compress as run_compress
from tinier.demo.run import demo as run_demo
from tinier.report.rows import rows, summary
from tinier.report.terminal import Bars, show
from tinier.search.candidate import Result


@app.command()
def compress(
    model: Annotated[
        str,
        typer.Argument(
            help="An .onnx, .keras or .pt2 file, a Hugging Face directory, or module:function that gives an nn.Module."
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

    _finish(guarded(work), as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.")] = Path(
        "demo-out"
    ),
    budget: Annotated[str, typer.Option(help="Time to spend.")] = "205s",
    as_json: Json = False,
) -> None:
    """Run the whole of it on a ResNet-20 for Fashion-MNIST that comes with tinier."""
    _finish(guarded(lambda bars: run_demo(out=out, budget=budget, progress=bars)), as_json)


def _finish(result: Result, as_json: bool) -> None:
    if as_json:
        print_json(
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


def _numbers(text: str | None, name: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"--{name} is {text!r}; write numbers such as 0.485,0.456,0.406"
        ) from None
