"""Rows of a long run: kept as they end, so that a stopped run goes on where it was."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rows = dict[str, Row]


class Log:
    """Rows by key: of the result and of a file of JSON lines, whose last line of a key counts.

    Several runs may write at once, each the whole result with all that is in the file by then.
    """

    def __init__(self, file: Path, result: Path, content: Callable[[Rows], dict[str, Any]]) -> None:
        self.file, self.result, self.content = file, result, content
        file.parent.mkdir(parents=True, exist_ok=True)
        result.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> Rows:
        found: Rows = json.loads(self.result.read_text())["rows"] if self.result.is_file() else {}
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        found.update({row["key"]: row for row in map(json.loads, lines)})
        return found

    def keep(self, row: Row) -> None:
        with self.file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        told = {name: row[name] for name in ("error", "valid", "test", "time") if name in row}
        print(f"{row['key']}: {json.dumps(told)}", flush=True)
        self.write()

    def write(self) -> None:
        rows = self.rows()
        partial = self.result.with_suffix(f".{os.getpid()}.part")
        partial.write_text(json.dumps({**self.content(rows), "rows": rows}, indent=1) + "\n")
        partial.replace(self.result)
