"""Files that were left out: counted, listed, written to a local CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from .csv_cells import file_cell, text_cell


class SkippedFiles:
    """A list of (relative name, reason). Names appear on the terminal and in local CSVs, nowhere else."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    def add(self, name: str, reason: str) -> None:
        """Note a file; a second reason for the same file is dropped."""
        if all(name != known for known, _ in self.rows[-64:]):
            self.rows.append((name, " ".join(str(reason).split())))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.rows)

    def write(self, path: str | Path) -> None:
        """Write the columns file, reason; with no rows, a list of an earlier call is removed.

        Raises:
            OSError: the disk is full or the folder is not writable; an earlier list is whole.
        """
        path = Path(path)
        if not self.rows:
            path.unlink(missing_ok=True)
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                csv.writer(file, lineterminator="\n").writerows([("file", "reason"), *((file_cell(name), text_cell(reason)) for name, reason in self.rows)])
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def __str__(self) -> str:
        lines = [f"skipped {len(self.rows)} files:"] + ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in f"  {name}: {reason}") for name, reason in self.rows[:10]]
        return "\n".join(lines + ([f"  … and {len(self.rows) - 10} more"] if len(self.rows) > 10 else []))
