"""What is printed of a smaller network."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from tinier.cli.app import print_json
from tinier.report.words import bar
from tinier.verbs import Smaller


def finish(smaller: Smaller, out: Path, as_json: bool) -> None:
    """Print what a step gave, and where it is."""
    if as_json:
        print_json({**smaller.as_dict(), "folder": str(out)})
        return
    show(smaller, Console())
    Console().print(
        f"\nThe result is in {out}; README.md there says how to run it.", soft_wrap=True
    )


def show(smaller: Smaller, console: Console) -> None:
    """Costs before and after, notes, and a bar for each group that lost channels."""
    facts = smaller.as_dict()
    for what in ("macs", "parameters"):
        before, after = facts[what]["before"], facts[what]["after"]
        name = "MACs" if what == "macs" else what
        console.print(f"{name} {before:,} → {after:,} ({after / max(before, 1):.1%})", style="bold")
    for note in smaller.notes:
        console.print(note, style="dim", soft_wrap=True)
    if not smaller.plan.edits:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in ("group", "before → after", "kept"):
        table.add_column(head, overflow="fold")
    for edit in smaller.plan.edits:
        name, change = edit.row()
        old, _, new = change.partition(" → ")
        share = bar(int(new) / int(old)) if old.isdigit() and new.isdigit() else ""
        table.add_row(name, change, share)
    console.print(table)
