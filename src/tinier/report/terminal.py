"""A result and a run's progress in the terminal."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import rich.progress
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from tinier.progress import Progress
from tinier.report import words
from tinier.report.rows import rows, summary
from tinier.search.candidate import Result

LONG = 2.0  # seconds that a task lasts before anything is drawn of it
APART = 76  # columns from which the runtime has a column of its own
WIDE = 118  # columns from which reasons fit beside the figures


def show(result: Result, console: Console) -> None:
    """Print the answer, the table of originals and candidates, and the certificate in words.

    Args:
        result: of a search.
        console: where to; from 118 columns on the table has all figures and the reasons, below that the reasons follow it.
    """
    wide = console.width >= WIDE
    found = rows(result)
    found = [row for row in found if row["original"]] + ordered(found)
    console.print()
    if found:
        console.print(_table(found, result, console.width))
    if not wide:
        _reasons(found, console)
    console.print()
    console.print(Text(summary(result), style="bold" if result.met else "yellow"))
    proof = result.best.certificate if result.best else None
    if proof is not None:
        console.print()
        for sentence in words.certificate(proof, result.facts):
            console.print(Text(sentence))


def ordered(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Candidates without the originals: the one taken, the others that were kept, then the dropped; each in order of speed."""
    rank = {"taken": 0, "front": 1, "waiting": 1, "dropped": 2}
    return sorted(
        (row for row in found if not row["original"]),
        key=lambda row: (
            not row["taken"],
            rank.get(row["status"], 1),
            row["latency_ms"] is None,
            row["latency_ms"] or 0.0,
        ),
    )


def _table(found: list[dict[str, Any]], result: Result, width: int) -> Table:
    wide, apart = width >= WIDE, width >= APART
    facts = result.facts
    base = "than_torch" if any(row["faster_than_torch"] for row in found) else "than_original"
    table = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, header_style="bold"
    )
    # A column: its head, its cells, and whether a narrow console has it.
    columns: list[tuple[str, Callable[[dict[str, Any]], str], bool]] = [
        ("", _mark, True),
        ("candidate", lambda row: row["name"] if apart else _where(row), True),
        ("runtime", lambda row: row["runtime"], apart),
        (_metric(facts), lambda row: words.quality(row["quality"], facts), True),
        ("lost", lambda row: _lost(row, facts), wide),
        ("ms", lambda row: _ms(row["latency_ms"]), True),
        ("p95 ms", lambda row: _ms(row["latency_p95_ms"]), wide),
        ("size", lambda row: words.size(row["size_bytes"]), True),
        ("memory", lambda row: words.size(row["peak_memory_bytes"]), wide),
        ("speed", lambda row: words.times(row[f"faster_{base}"]), True),
        ("why", lambda row: row["reason"], wide),
    ]
    columns = [column for column in columns if column[2]]
    for head, _, _ in columns:
        text = head in ("", "candidate", "runtime", "why")
        table.add_column(
            head,
            justify="left" if text else "right",
            no_wrap=head not in ("candidate", "why"),
            min_width=20 if head in ("candidate", "why") else None,
            max_width=36 if head == "candidate" and wide else None,
        )
    for row in found:
        table.add_row(*(Text(cell(row)) for _, cell, _ in columns), style=_style(row))
    return table


def _metric(facts: Mapping[str, Any]) -> str:
    return words.clean(facts.get("metric") or "quality")[:16]


def _where(row: dict[str, Any]) -> str:
    return f"{row['name']}, on {row['runtime']}"


def _lost(row: dict[str, Any], facts: Mapping[str, Any]) -> str:
    """Points or units; the original loses nothing by definition."""
    if row["original"] or row["loss"] is None:
        return words.NOTHING
    return f"{100 * row['loss']:.2f}" if facts.get("points") else words.plain(row["loss"])


def _ms(value: float | None) -> str:
    return words.NOTHING if value is None else words.plain(value)


def _mark(row: dict[str, Any]) -> str:
    """What a row is, for those who see no colours."""
    if row["taken"]:
        return "▸"
    return "×" if row["status"] == "dropped" and not row["original"] else ""


def _style(row: dict[str, Any]) -> str:
    if row["taken"]:
        return "bold green"
    return "dim" if row["status"] == "dropped" and not row["original"] else ""


def _reasons(found: list[dict[str, Any]], console: Console) -> None:
    """Why each candidate was taken or dropped, where the table has no room for it; equal reasons once."""
    together: dict[tuple[str, str], list[str]] = {}
    for row in found:
        if row["reason"] and not row["original"]:
            together.setdefault((_mark(row), row["reason"]), []).append(_where(row))
    listed = Table.grid(padding=(0, 1))
    for (mark, reason), names in together.items():
        style = "dim" if mark == "×" else "bold green" if mark else ""
        listed.add_row(Text(mark or "·"), Text(f"{'; '.join(names)}: {reason}"), style=style)
    console.print()
    console.print(listed)


class Bars(Progress):
    """Progress bars with the time that has passed and the time left, on stderr, for tasks that last longer than two seconds.

    Where stderr is no terminal there are no bars and no colours: one plain line for what is said, and one for each task
    that lasted longer than two seconds, when it ends.

    Args:
        console: where to; stderr if none is given.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._drawing: _Slow | None = None
        self._started: dict[int, tuple[str, float]] = {}
        self._count = 0

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        """Take everything off the screen, whatever is still under way."""
        self._started.clear()
        self._close()

    def say(self, text: str) -> None:
        self._line(text)

    def start(self, text: str, total: float | None) -> int:
        text = words.clean(text)
        if self.console.is_terminal:
            if self._drawing is None:
                self._drawing = _Slow(self.console)
                self._drawing.start()
            number = int(self._drawing.add_task(text, total=total))
        else:
            number = self._count
            self._count += 1
        self._started[number] = (text, time.monotonic())
        return number

    def advance(self, task: int, done: float) -> None:
        if self._drawing is not None and task in self._started:
            self._drawing.update(TaskID(task), completed=done)

    def stop(self, task: int) -> None:
        if task not in self._started:
            return
        text, start = self._started.pop(task)
        lasted = time.monotonic() - start
        if self._drawing is not None:
            self._drawing.remove_task(TaskID(task))
        if lasted > LONG:
            self._line(f"{text}: {lasted:.0f} s", style="dim")
        if not self._started:
            self._close()

    def _close(self) -> None:
        if self._drawing is not None:
            self._drawing.stop()
            self._drawing = None

    def _line(self, text: str, style: str = "") -> None:
        # Long lines stay whole where nobody sees columns: in a file or a pipe.
        self.console.print(
            Text(words.clean(text), style=style), soft_wrap=not self.console.is_terminal
        )


class _Slow(rich.progress.Progress):
    """Rich's bars, of the tasks that have lasted long enough to be worth one."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            _Done(),
            TimeElapsedColumn(),
            _Left(),
            console=console,
            transient=True,
            refresh_per_second=5,
        )

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        return super().make_tasks_table([task for task in tasks if (task.elapsed or 0) > LONG])


class _Done(ProgressColumn):
    """The share that is done, where it is known."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.percentage:3.0f} %" if task.total else "")


class _Left(ProgressColumn):
    """The time left: "0:41 left"."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        if task.total is None or left is None:
            return Text("")
        minutes, seconds = divmod(int(left), 60)
        return Text(f"{minutes}:{seconds:02} left", style="progress.remaining")
