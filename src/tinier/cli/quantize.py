"""Quantize from the command line."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tinier.cli.app import Json, Threads, app, guarded, print_json
from tinier.errors import InputError
from tinier.report import words
from tinier.report.terminal import Bars
from tinier.tensors.ranges import RULES
from tinier.verbs import Smaller, deliver
from tinier.verbs import quantize as run_quantize
from tinier.verbs.delivery import Delivered, check_delivery
from tinier.verbs.quantization import DYNAMIC

MOST_ROWS = 12  # of the layers whose loss is shown


@app.command()
def quantize(
    model: Annotated[
        str,
        typer.Argument(
            help="An .onnx, .keras or .pt2 file, a Hugging Face directory, or module:function that gives an nn.Module."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Examples, a few hundred, that ranges are taken from; labels are not used. Needless for weights alone."
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(help="Of weights: 2 to 8; 8 if not given, or what --max-size chooses."),
    ] = None,
    activations: Annotated[
        int, typer.Option(help="Bits of activations; 0 leaves them float: weights alone.")
    ] = 8,
    symmetric_activations: Annotated[
        bool,
        typer.Option(
            "--symmetric-activations",
            help="Zero points of activations are 0, for accelerators that have none.",
        ),
    ] = False,
    dynamic: Annotated[
        bool,
        typer.Option(
            "--dynamic",
            help="Round inputs of linear layers in the range of each run, without data.",
        ),
    ] = False,
    per_token: Annotated[
        bool,
        typer.Option(
            "--per-token",
            help="Dynamic ranges of each row of the last axis, not of the whole tensor.",
        ),
    ] = False,
    ranges: Annotated[
        str | None,
        typer.Option(help=f"Of activations: {', '.join(RULES)}; importance if not given."),
    ] = None,
    weight_ranges: Annotated[
        str | None, typer.Option(help="Of weights: minmax, percentile, mse or importance.")
    ] = None,
    group: Annotated[
        int | None, typer.Option(help="Inputs that share a scale, for weights alone.")
    ] = None,
    per_tensor: Annotated[
        bool, typer.Option("--per-tensor", help="One scale for all channels of a weight.")
    ] = False,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Whether zero points of weights are 0, for weights alone.",
        ),
    ] = None,
    rounding: Annotated[
        str, typer.Option(help="nearest, error_feedback, hqq, learned or learned_blocks.")
    ] = "nearest",
    layer: Annotated[
        list[str] | None,
        typer.Option(
            help="Bits of some layers, as head=8 or layer4.*=4, 0 for float; may be repeated."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Module or parameter that stays float, * for any; may be repeated."),
    ] = None,
    correction: Annotated[
        list[str] | None,
        typer.Option(
            help="cross_layer_equalization, smooth_quant, outlier_channels, batch_norm_reestimation, bias_correction, or none; "
            "may be repeated."
        ),
    ] = None,
    restore: Annotated[
        float | None,
        typer.Option(
            help="Share of the output's error that may be left: layers stay float for it."
        ),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            help="Size of the file for the target, such as 1MB: bits are chosen for each layer."
        ),
    ] = None,
    max_latency: Annotated[
        str | None,
        typer.Option(help="Greatest latency, such as 5ms: as many layers stay float as it allows."),
    ] = None,
    choice: Annotated[
        list[int] | None,
        typer.Option(help="Bits that --max-size chooses from, 0 for float; may be repeated."),
    ] = None,
    sensitivity: Annotated[
        str, typer.Option(help="What bits are chosen by: kl, output or fisher.")
    ] = "kl",
    target: Annotated[
        str, typer.Option(help="Runtime that the artifact is for; cpu for all that are installed.")
    ] = "onnxruntime",
    fastest: Annotated[
        bool,
        typer.Option(
            "--fastest", help="Leave layers float that are slower in integers on this machine."
        ),
    ] = False,
    attribution: Annotated[
        bool,
        typer.Option("--attribution", help="Show which layer loses what, and why."),
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Store weights as integers and round activations as the runtime does; the artifact is run and compared before it is written."""
    limited = max_latency is not None or max_size is not None
    measured = target if fastest or limited else None
    own = _layers(layer)

    def work(bars: Bars) -> tuple[Smaller, Delivered]:
        if fastest and max_size is not None:
            raise InputError(
                "--fastest leaves layers float, which --max-size limits; leave one out"
            )
        # What the folder or the runtime cannot take is said before the work.
        weights = {8 if bits is None else bits, *own.values(), *(choice or ())} - {0}
        rounded = () if dynamic or not activations else (activations,)
        check_delivery(out, target, weights, rounded, dynamic)
        with bars.task("quantizing", None):
            smaller = run_quantize(
                model,
                data=data,
                bits=bits,
                activations=_activations(activations, dynamic, per_token),
                symmetric_activations=symmetric_activations,
                ranges=ranges,
                weight_ranges=weight_ranges,
                group=group,
                per_tensor=per_tensor,
                symmetric=symmetric,
                rounding=rounding,
                layers=own,
                exclude=exclude or (),
                corrections=() if correction == ["none"] else correction,
                restore=restore,
                max_size=max_size,
                max_latency=max_latency,
                choices=choice,
                sensitivity=sensitivity,
                target=measured,
                threads=threads if measured else None,
            )
        with bars.task("writing, running and comparing", None):
            done = deliver(
                smaller,
                out,
                data=data,
                target=target,
                threads=threads or 1,
                attribution=attribution,
            )
        return smaller, done

    smaller, done = guarded(work)
    if as_json:
        print_json({**done.as_dict(smaller), "folder": str(out)})
        return
    show(smaller, done, Console())


def show(smaller: Smaller, done: Delivered, console: Console) -> None:
    """Sizes, parity and, if it was asked for, the layers that lose most."""
    facts = done.as_dict(smaller)
    for name, artifact in facts["artifacts"].items():
        before, after = artifact["float_bytes"], artifact["bytes"]
        console.print(
            f"{name}: {words.size(before)} of float tensors → {words.size(after)} "
            f"({words.times(before / max(after, 1))} smaller)",
            style="bold",
        )
        if artifact["packed_bytes"] is not None:
            console.print(
                f"  {words.size(artifact['packed_bytes'])} packed by tinier pack", style="dim"
            )
        for row in done.parity[name].rows:
            if row.skipped:
                said = f"not run: {row.reason}"
            else:
                steps = "" if row.steps is None else f", {row.steps:.2g} quantization steps"
                said = f"differs by at most {row.relative:.2g} of the range{steps}"
            console.print(f"  batch {row.batch}, {words.clean(row.output)}: {said}", style="dim")
    counts: dict[int, int] = {}
    for bits in facts["weights"].values():
        counts[bits] = counts.get(bits, 0) + 1
    said = ", ".join(f"{count} at {bits} bits" for bits, count in sorted(counts.items()))
    console.print(f"weights: {said}; activations rounded: {facts['activations']}")
    integer, every = facts["macs"]["integer"], facts["macs"]["all"]
    if every:
        console.print(f"MACs in integers: {integer / every:.1%} ({integer:,} of {every:,})")
    for note in smaller.notes:
        console.print(words.clean(note), style="dim", soft_wrap=True)
    if done.attribution is not None:
        console.print(_table(done))
    console.print(
        f"\nThe result is in {done.folder}; README.md there says how to run it, report.html shows what was measured.",
        soft_wrap=True,
    )


def _table(done: Delivered) -> Table:
    assert done.attribution is not None
    total = done.attribution.total
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.title = f"Loss {total:.3g} of the output's variance, by layer (on {done.attribution.examples} examples)"
    table.add_column("layer", overflow="fold")
    for head in (
        "restored gives back",
        "weights: rounding",
        "clipping",
        "inputs: rounding",
        "clipping",
    ):
        table.add_column(head, justify="right")
    for row in done.attribution.layers[:MOST_ROWS]:
        causes = [f"{value:.2g}" if value else words.NOTHING for value in row.causes.values()]
        table.add_row(words.clean(row.layer), f"{row.restored / max(total, 1e-300):.0%}", *causes)
    return table


def _activations(bits: int, dynamic: bool, per_token: bool) -> int | str | None:
    if per_token and not dynamic:
        raise typer.BadParameter("--per-token is of ranges of each run; give --dynamic, too")
    if dynamic:
        return DYNAMIC[1] if per_token else DYNAMIC[0]
    return bits or None


def _layers(texts: list[str] | None) -> dict[str, int]:
    layers = {}
    for text in texts or ():
        name, _, bits = text.rpartition("=")
        if not name or not bits.isdecimal():
            raise typer.BadParameter(f"--layer is {text!r}; write a pattern and bits: layer4.*=4")
        layers[name] = int(bits)
    return layers
