"""Pack and unpack from the command line."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tinier.cli.app import Json, app, guarded, print_json
from tinier.report import words
from tinier.report.packed_file import Packed
from tinier.report.terminal import Bars
from tinier.verbs import Smaller
from tinier.verbs import pack as run_pack
from tinier.verbs import share as run_share
from tinier.verbs import unpack as run_unpack
from tinier.verbs.disk import PACKED, write_all


@app.command()
def pack(
    model: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="An .onnx file, which comes back byte by byte; a .safetensors file; or a model whose weights are packed.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, such as model.tinier.")],
    as_json: Json = False,
) -> None:
    """Store a model in as few bytes as give back the same bits: few values as codebooks, integers in their bits, all entropy-coded."""

    def work(bars: Bars) -> Packed:
        with bars.task("packing", None):
            return run_pack(model, out)

    packed = guarded(work)
    if as_json:
        print_json(packed.as_dict())
        return
    console = Console()
    console.print(_table(packed))
    console.print(f"\n{out}: {words.times(packed.ratio)} smaller", soft_wrap=True, highlight=False)


@app.command()
def share(
    model: Annotated[
        str,
        typer.Argument(
            help="An .onnx, .keras or .pt2 file, a Hugging Face directory, or module:function that gives an nn.Module."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.")],
    data: Annotated[
        str | None,
        typer.Option(help="Examples, so that errors count as much as the loss feels them."),
    ] = None,
    bits: Annotated[
        int, typer.Option(help="Of a label: 4 for 16 values in each tensor; 1 to 8.")
    ] = 4,
    rule: Annotated[str, typer.Option(help="kmeans, median or minmax.")] = "kmeans",
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Module or parameter that is left alone, * for any; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Give the weights of each tensor few values, and pack them: a small file, of which the network computes in float."""

    def work(bars: Bars) -> tuple[Smaller, Packed]:
        with bars.task("sharing", None):
            smaller = run_share(model, data=data, bits=bits, rule=rule, exclude=exclude or ())
        with bars.task("writing and packing", None):
            write_all(smaller, out)
            return smaller, run_pack(smaller, out / PACKED)

    smaller, packed = guarded(work)
    if as_json:
        facts = {**smaller.as_dict(), "packed": packed.as_dict(), "folder": str(out)}
        print_json(facts)
        return
    console = Console()
    console.print(_table(packed))
    for note in smaller.notes:
        console.print(words.clean(note), style="dim", soft_wrap=True)
    console.print(
        f"\n{out / PACKED}: {words.times(packed.ratio)} smaller", soft_wrap=True, highlight=False
    )


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that pack wrote.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="File to write: .onnx for a packed ONNX file, else .safetensors."
        ),
    ],
    at_most: Annotated[
        str | None,
        typer.Option(
            help="Size that it may take unpacked, such as 4GB; 256 times the file and 256 MiB if not given."
        ),
    ] = None,
) -> None:
    """Give back what was packed, bit by bit, once the file is known to be whole."""
    if out.suffix not in (".onnx", ".safetensors"):
        raise typer.BadParameter(f"--out is {out}; write a file called ….onnx or ….safetensors")
    guarded(lambda bars: run_unpack(file, out, at_most=at_most))
    Console().print(f"{out} is what was packed", soft_wrap=True, highlight=False)


def _table(packed: Packed) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("stored as", overflow="fold")
    for head in ("tensors", "raw", "packed", "bits per weight", "ratio"):
        table.add_column(head, justify="right")
    for row in (*packed.rows, packed.total):
        table.add_row(
            words.clean(row.kind),
            f"{row.tensors}" if row.values else words.NOTHING,
            words.size(row.raw),
            words.size(row.packed),
            f"{row.bits:.2f}" if row.values else words.NOTHING,
            words.times(row.raw / max(row.packed, 1)) if row.raw else words.NOTHING,
            style="bold" if row.kind == "all" else None,
        )
    return table
