"""Distill and factorize from the command line."""

from pathlib import Path
from typing import Annotated

import typer

from tinier.cli.app import Json, app, guarded
from tinier.cli.results import finish
from tinier.report.terminal import Bars
from tinier.verbs import Smaller
from tinier.verbs import distill as run_distill
from tinier.verbs import factorize as run_factorize
from tinier.verbs.disk import write_all

Source = "An .onnx, .keras or .pt2 file, a Hugging Face directory, or module:function that gives an nn.Module."


@app.command()
def distill(
    student: Annotated[str, typer.Argument(help=f"The small network. {Source}")],
    teacher: Annotated[str, typer.Argument(help="The network that it learns from, likewise.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Examples to train on, as for compress --data; made up from the teacher's batch norms if there are none."
        ),
    ] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="What is minimized, such as soft_targets:temperature=2 or cross_entropy; may be repeated: their sum."
        ),
    ] = None,
    valid: Annotated[
        str | None,
        typer.Option(help="Examples that are not trained on, for the choice of the best epoch."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the examples.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Most seconds to train.")] = None,
    batch: Annotated[int, typer.Option(help="Examples in a step.")] = 64,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    ema: Annotated[
        float | None, typer.Option(help="Decay of the average of the weights, such as 0.999.")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Epochs without a smaller loss on --valid after which training ends."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder of the state; the same command goes on from there when killed."),
    ] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the order of the examples.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a small network to answer like a large one."""

    def work(bars: Bars) -> Smaller:
        with bars.task("distilling", 1.0) as step:
            smaller = run_distill(
                student,
                teacher,
                data,
                losses=loss or None,
                valid=valid,
                epochs=epochs,
                seconds=seconds,
                batch=batch,
                lr=lr,
                ema=ema,
                patience=patience,
                checkpoint=checkpoint,
                precision=precision,
                seed=seed,
                progress=step,
            )
        with bars.task("writing", None):
            write_all(smaller, out)
        return smaller

    finish(guarded(work), out, as_json)


@app.command()
def factorize(
    model: Annotated[str, typer.Argument(help=Source)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.")],
    data: Annotated[
        str | None,
        typer.Option(help="Examples, a few hundred, where factors are to be near; no labels."),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of the cost that is left; half if not given.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of each layer's squared outputs instead, as 0.95.")
    ] = None,
    of: Annotated[str, typer.Option(help="macs or parameters.")] = "macs",
    form: Annotated[str, typer.Option(help="Of wide convolutions: svd, tucker or auto.")] = "auto",
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Module or parameter that stays, * for any; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Replace layers by products of smaller ones (low rank)."""

    def work(bars: Bars) -> Smaller:
        with bars.task("factorizing", None):
            smaller = run_factorize(
                model, data=data, keep=keep, energy=energy, of=of, form=form, exclude=exclude or ()
            )
        with bars.task("writing", None):
            write_all(smaller, out)
        return smaller

    finish(guarded(work), out, as_json)
