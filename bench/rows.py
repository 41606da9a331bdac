"""One schema for every measured figure, and files that stay valid when a run is cut."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from mwm.bench.bars import bar_of
from mwm.bench.environment import environment


@dataclass
class Row:
    """One measured line.

    Attributes:
        bench, case, rival: what ran, and against what.
        unit: of `ours` and `theirs`: "ms", "MiB" or "GB/s".
        ours, theirs: medians over the pairs.
        score, low, high: median and quartiles, over the pairs, of what `score_is` says.
        score_is: "rival / ours", "ours / rival" or "ours in % of rival".
        pairs: number of interleaved pairs.
        difference, tolerance: how far the results of the two sides lay apart before anything was timed, and the most
            that was allowed.
        visible: share of the pixels that is visible.
        limit_percent: our rate in per cent of `limit`.
        limit: the rate that bounds this work on this machine, with its unit, and how it was measured.
        note: what a reader has to know.
    """

    bench: str
    case: str
    rival: str
    unit: str
    ours: float
    theirs: float
    score: float
    low: float
    high: float
    score_is: str
    pairs: int
    difference: float
    tolerance: float
    visible: float | None = None
    limit_percent: float | None = None
    limit: str = ""
    note: str = ""
    bar: str = ""
    met: str = ""
    threads: str = ""
    torch: str = ""
    python: str = ""
    cpu: str = ""
    isa: str = ""
    commit: str = ""
    date: str = ""
    key: tuple[str, str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.key = (self.bench, self.case, self.rival)

    def judged(self) -> Row:
        """The row with its bar, whether it is met, and the environment it was measured in."""
        bar = bar_of(*self.key)
        if bar is not None:
            self.bar, self.met = bar.words(), "met" if bar.met(self.score) else "missed"
        for name, value in environment().items():
            setattr(self, name, value)
        return self

    def plain(self) -> dict[str, object]:
        """The columns as plain values, in the order of the schema."""
        values = asdict(self)
        return {name: values[name] for name in COLUMNS}

    def line(self) -> str:
        """The row for a terminal."""
        verdict = f"  bar {self.bar}: {self.met}" if self.bar else "  slower" if self.score_is == "rival / ours" and self.score < 1 else ""
        limit = "" if self.limit_percent is None else f"  {self.limit_percent:.0f} % of {self.limit}"
        return (f"{self.bench}  {self.case}:  {self.ours:.4g} {self.unit}, {self.rival} {self.theirs:.4g} {self.unit},  "
                f"{score_words(self.score, self.score_is)}{verdict}{limit}")


COLUMNS = [f.name for f in fields(Row) if f.name != "key"]
_NUMBERS = {"ours", "theirs", "score", "low", "high", "difference", "tolerance", "visible", "limit_percent"}


def score_words(score: float, score_is: str) -> str:
    """A score with its unit: `2.38 ×`, or `0.45 × the rival's`, or `71.2 %`."""
    if score_is == "ours in % of rival":
        return f"{score:.3g} %"
    digits = f"{score:.0f}" if score >= 100 else f"{score:.3f}" if 0.99 < score < 1 else f"{score:.2f}"  # just below 1 must not read 1.00
    return f"{digits} ×" if score_is == "rival / ours" else f"{digits} × the rival's"


class Sink:
    """Appends every row to a CSV and a JSON-lines file at once, so that a run that is cut leaves whole rows.

    Args:
        csv_path: rows are appended; a new file gets the header. None writes none.
        json_path: one JSON object per line. None writes none.

    Raises:
        ValueError: the CSV holds other columns.
    """

    def __init__(self, csv_path: str | Path | None = None, json_path: str | Path | None = None) -> None:
        self.csv_path = Path(csv_path) if csv_path else None
        self.json_path = Path(json_path) if json_path else None
        for path in (self.csv_path, self.json_path):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
        if self.csv_path is not None and self.csv_path.exists() and self.csv_path.stat().st_size:
            with self.csv_path.open(newline="", encoding="utf-8") as file:
                found = next(csv.reader(file), [])
            if found != COLUMNS:
                raise ValueError(f"bench: --csv must name a new file or one of this version, got {self.csv_path} with columns {', '.join(found[:4])} …. "
                                 "Move it away.")

    def add(self, row: Row) -> None:
        """Write one row to the disk."""
        if self.csv_path is not None:
            fresh = not self.csv_path.exists() or not self.csv_path.stat().st_size
            _append(self.csv_path, (_csv_line(COLUMNS) if fresh else "") + _csv_line(row.plain().values()))
        if self.json_path is not None:
            _append(self.json_path, json.dumps(row.plain(), ensure_ascii=False) + "\n")


def _csv_line(values: Iterable[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow("" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values)
    return text.getvalue()


def _append(path: Path, text: str) -> None:
    """One write of whole lines; a half line that a cut run left is closed first."""
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read_csv(path: str | Path) -> list[Row]:
    """The rows of a CSV, the last one of each bench, case and rival; half lines are left out.

    Raises:
        ValueError: the file has other columns.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if header != COLUMNS:
            raise ValueError(f"bench: {path} must have the columns {', '.join(COLUMNS[:4])} …, got {', '.join(header[:4]) or 'none'}.")
        found: dict[tuple[str, str, str], Row] = {}
        for cells in reader:
            try:
                row = Row(**{name: _value(name, cell) for name, cell in zip(COLUMNS, cells, strict=True)})
            except ValueError:
                continue
            found.pop(row.key, None)
            found[row.key] = row
    return list(found.values())


def _value(name: str, cell: str) -> object:
    if name == "pairs":
        return int(cell)
    if name in _NUMBERS:
        return float(cell) if cell else None
    return cell
