"""metrics.csv and TensorBoard of a run; both can be cut back to a step."""

from __future__ import annotations

import csv
import io
import os
import struct
from pathlib import Path

from mwm.train.checkpoint import _writing, write_atomic

COLUMNS = ("step", "epoch", "loss", "lr", "weight_decay", "grad_norm", "hidden_share", "flat_hidden_share", "flat_loss_share")


class RunLogs:
    """One row per optimizer step, in metrics.csv and as TensorBoard scalars; only values that a resumed run repeats.

    Args:
        run: folder of the run.
        resume_after: keep what was logged up to and with this step, drop the rest; None starts anew.
    """

    def __init__(self, run: Path, resume_after: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path, board = run / "metrics.csv", run / "tensorboard"
        keep = resume_after if resume_after is not None else -1
        cut_csv(self.path, keep)
        cut_events(board, keep)
        with _writing("metrics.csv"):
            self._file = open(self.path, "a", newline="")
            self._board = SummaryWriter(str(board))

    def row(self, values: dict[str, float | int]) -> None:
        """Log one step; floats are written so that they read back exactly."""
        with _writing("metrics.csv"):
            self._file.write(",".join(repr(values[name]) for name in COLUMNS) + "\n")
        for name in COLUMNS[2:]:
            self._board.add_scalar(name, values[name], values["step"])

    def scalar(self, name: str, value: float, step: int) -> None:
        """A TensorBoard value that a resumed run need not repeat (speed)."""
        self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Bring everything to the disk."""
        with _writing("metrics.csv"):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._board.flush()

    def close(self) -> None:
        """Flush and close; further rows are an error."""
        with _writing("metrics.csv"):
            self._file.close()
            self._board.close()


def read_metrics(path: Path) -> dict[str, list[float]]:
    """The columns of a metrics.csv."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in COLUMNS}


def cut_csv(path: Path, last_step: int) -> None:
    """Drop the rows after `last_step`, and a half-written one."""
    rows = []
    if path.is_file():
        for line in path.read_text().split("\n")[1:-1]:  # what follows the last newline was cut off while written
            cells = line.split(",")
            if len(cells) == len(COLUMNS) and cells[0].isdigit() and int(cells[0]) <= last_step:
                rows.append(line)
    write_atomic(path, lambda file: file.write("\n".join([",".join(COLUMNS), *rows, ""]).encode()))


def cut_events(folder: Path, last_step: int) -> None:
    """Drop the TensorBoard events after `last_step`, and a half-written one.

    An event file is a row of records {length: uint64, checksum: uint32, data, checksum: uint32}; the records that stay
    are copied byte by byte.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    for path in sorted(folder.glob("events.out.tfevents.*")):
        kept, content = io.BytesIO(), path.read_bytes()
        at = 0
        while at + 12 <= len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            end = at + 12 + length + 4
            if end > len(content):
                break
            try:
                event = Event.FromString(content[at + 12 : at + 12 + length])
            except DecodeError:  # what a power cut leaves
                break
            if event.step <= last_step or not event.HasField("summary"):
                kept.write(content[at:end])
            at = end
        if last_step < 0:
            path.unlink()
        else:
            write_atomic(path, lambda file, kept=kept: file.write(kept.getvalue()))
