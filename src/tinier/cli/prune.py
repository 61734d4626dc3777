"""Prune from the command line."""

from pathlib import Path
from typing import Annotated

import typer

from tinier.cli.app import Json, Threads, app, guarded
from tinier.cli.results import finish
from tinier.recovery.cross_entropy import CrossEntropy
from tinier.report.terminal import Bars
from tinier.shrink import shrink as run_shrink
from tinier.verbs import Smaller
from tinier.verbs import linearize as run_linearize
from tinier.verbs import prune as run_prune
from tinier.verbs import sparsify as run_sparsify
from tinier.verbs.disk import write_all

Model = Annotated[
    str,
    typer.Argument(
        help="An .onnx, .keras or .pt2 file, a Hugging Face directory, or module:function that gives an nn.Module."
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.")]


@app.command()
def prune(
    model: Annotated[
        str,
        typer.Argument(
            help="An .onnx, .keras or .pt2 file, a Hugging Face directory, or module:function that gives an nn.Module."
        ),
    ],
    out: Out,
    keep: Annotated[
        float | None,
        typer.Option(
            help="Share of the cost that is kept, in (0, 1]; half where nothing says how much."
        ),
    ] = None,
    of: Annotated[
        str,
        typer.Option(help="macs, parameters, bytes, or channels (the same share of each group)."),
    ] = "macs",
    at_most: Annotated[
        str | None,
        typer.Option(
            help="The cost as a number of MACs, parameters or bytes (such as 4MB) instead."
        ),
    ] = None,
    max_latency: Annotated[
        str | None,
        typer.Option(help="Greatest latency instead, such as 5ms, measured on --target."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Runtime for --max-latency, and that widths are rounded for; onnxruntime if not given."
        ),
    ] = None,
    threads: Threads = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Examples, a few hundred: what follows what was cut is fitted to them again; labels are not needed."
        ),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="What leaves first, by name, or module:function, (network, group) → scores; reconstruction with data and magnitude "
            "without if not given."
        ),
    ] = None,
    ranking: Annotated[
        str | None, typer.Option(help="global, kind or local: what channels are ranked against.")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(help="Mask single weights instead: unstructured, 2:4 (n of m), 4x1 (blocks)."),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option("--uniform", help="The same width in every layer: a standard checkpoint."),
    ] = False,
    rate: Annotated[
        list[str] | None,
        typer.Option(help="Share of one group, as layer1.conv=0.7, * for any; may be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Group or module that stays, * for any; may be repeated."),
    ] = None,
    round_to: Annotated[
        int | None,
        typer.Option(help="Widths become multiples of this; what --target likes, or 8."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Cut whatever ranks at or below this instead.")
    ] = None,
    compensate: Annotated[
        bool | None,
        typer.Option(
            "--compensate/--no-compensate",
            help="Fit what follows the cuts again; with --data if not given.",
        ),
    ] = None,
    depth: Annotated[
        float,
        typer.Option(help="Whole residual blocks leave first: a number, or a share of their MACs."),
    ] = 0.0,
    steps: Annotated[int, typer.Option(help="Cut in this many rounds.")] = 1,
    schedule: Annotated[
        str | None,
        typer.Option(help="Of the rounds: geometric, or cubic: most in the first ones."),
    ] = None,
    epochs: Annotated[
        float, typer.Option(help="Training towards the original after each round, on --data.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the order of the examples.")] = 0,
    as_json: Json = False,
) -> None:
    """Cut channels, neurons, heads, experts, hidden units and blocks, or mask weights; what is cut equals its masked reference."""

    def work(bars: Bars) -> Smaller:
        with bars.task("pruning", None):
            smaller = run_prune(
                model,
                keep=keep,
                of=of,
                at_most=at_most,
                max_latency=max_latency,
                target=target,
                threads=threads,
                data=data,
                criterion=criterion,
                ranking=ranking,
                pattern=pattern,
                uniform=uniform,
                rates=_rates(rate),
                exclude=exclude or (),
                round_to=round_to,
                threshold=threshold,
                compensate=compensate,
                depth=depth,
                steps=steps,
                schedule=schedule,
                epochs=epochs,
                seed=seed,
            )
        with bars.task("writing", None):
            write_all(smaller, out)
        return smaller

    finish(guarded(work), out, as_json)


@app.command()
def shrink(model: Model, out: Out, as_json: Json = False) -> None:
    """Turn zeros that any tool left in the weights into a smaller model."""

    def work(bars: Bars) -> Smaller:
        with bars.task("shrinking", None):
            smaller = run_shrink(model)
        write_all(smaller, out)
        return smaller

    finish(guarded(work), out, as_json)


@app.command()
def linearize(
    model: Model,
    data: Annotated[str, typer.Option(help="Examples, a few hundred, that lines are fitted to.")],
    out: Out,
    keep: Annotated[
        float | None,
        typer.Option(
            help="Share of the activation functions that stay; without it those leave, at most a quarter, that let layers merge."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Replace the activation functions that matter least by straight lines, and merge the layers between them."""

    def work(bars: Bars) -> Smaller:
        with bars.task("linearizing", None):
            smaller = run_linearize(model, data=data, keep=keep)
        write_all(smaller, out)
        return smaller

    finish(guarded(work), out, as_json)


@app.command()
def sparsify(
    model: Model,
    train: Annotated[str, typer.Option(help="Examples to train on, as for compress --data.")],
    penalty: Annotated[
        list[str],
        typer.Option(
            help="What drives weights to zero, with its strength: group_lasso:weight=1e-3; l1, l2, elastic_net, slimming, "
            "growing, soft_filter; may be repeated."
        ),
    ],
    out: Out,
    epochs: Annotated[float | None, typer.Option(help="Passes over the examples.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Most seconds to train.")] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            help="Share of the MACs that is kept afterwards; only what became zero is cut if not given."
        ),
    ] = None,
    labels: Annotated[
        bool,
        typer.Option("--labels", help="Learn from the labels, not from the model's own answers."),
    ] = False,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the examples.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a model towards zeros, then cut the channels that got there."""

    def work(bars: Bars) -> Smaller:
        with bars.task("training towards zeros", None):
            smaller = run_sparsify(
                model,
                data=train,
                penalties=penalty,
                losses=[CrossEntropy()] if labels else None,
                keep=keep,
                epochs=epochs,
                seconds=seconds,
                lr=lr,
                seed=seed,
            )
        with bars.task("writing", None):
            write_all(smaller, out)
        return smaller

    finish(guarded(work), out, as_json)


def _rates(texts: list[str] | None) -> dict[str, float]:
    rates = {}
    for text in texts or ():
        name, _, share = text.rpartition("=")
        try:
            rates[name] = float(share)
        except ValueError:
            name = ""
        if not name:
            raise typer.BadParameter(f"--rate is {text!r}; write a group and a share: layer1=0.7")
    return rates
