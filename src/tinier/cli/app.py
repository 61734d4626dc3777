"""What all commands share: the application, common options, errors as one message, JSON."""

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

from tinier.errors import TinierError
from tinier.report.terminal import Bars

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


def guarded(work: Callable[[Bars], Any]) -> Any:
    """Run with progress bars on standard error; errors made on purpose become one message and their exit code."""
    try:
        with Bars() as bars:
            return work(bars)
    except TinierError as error:
        Console(stderr=True).print(
            f"[bold red]error:[/] {escaped(str(error))}", highlight=False, soft_wrap=True
        )
        raise typer.Exit(WRONG_INPUT) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; nothing was written")
        raise typer.Exit(INTERRUPTED) from None


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1, default=str)
    print()


def escaped(text: str) -> str:
    return text.replace("[", "\\[")
