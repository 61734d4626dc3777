"""The command line: the verbs of the public face, in words."""

from typing import Annotated

import typer

from tinier.cli import compress, look, prune, quantize, store, train
from tinier.cli.app import app
from tinier.version import VERSION

__all__ = ["app", "compress", "look", "main", "prune", "quantize", "store", "train"]


@app.callback(invoke_without_command=True)
def main_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"tinier {VERSION}")
        raise typer.Exit


def main() -> None:
    """Entry point of the command ``tinier``."""
    app()
