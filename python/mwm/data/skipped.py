"""Files that were left out, with the reason, for the end of a run."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from mwm.data.regions import write_atomic


class SkippedFiles:
    """A list of (relative name, reason). It names files, so it stays in a local CSV and on the terminal."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, name: str, reason: str) -> None:
        """Note one file."""
        self.rows.append((name, reason))

    def write(self, path: str | Path) -> None:
        """Write file, reason as CSV; an old list is removed where nothing was skipped."""
        path = Path(path)
        if not self.rows:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([("file", "reason"), *self.rows])
        write_atomic(path, buffer.getvalue().encode())
