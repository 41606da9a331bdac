"""metrics.csv and TensorBoard: exact values, and cut back to a step."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mwm.train.logs import COLUMNS, RunLogs, cut_events, read_metrics

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # protobuf and tensorboard


def _write(run: Path, steps: range, resume_after: int | None = None) -> None:
    logs = RunLogs(run, resume_after)
    for step in steps:
        logs.row({name: step if name in ("step", "epoch") else step / 3 for name in COLUMNS})
    logs.flush()
    logs.close()


def _events(run: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=False, size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars("loss")]


def test_floats_read_back_exactly(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 6))
    assert read_metrics(tmp_path / "metrics.csv")["loss"] == [step / 3 for step in range(1, 6)]


def test_a_resumed_run_is_cut_back_and_then_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    _write(whole, range(1, 11))
    _write(cut, range(1, 8))
    with open(cut / "metrics.csv", "a") as file:
        file.write("8,8,2.66")  # killed while writing
    (event,) = (cut / "tensorboard").iterdir()
    event.write_bytes(event.read_bytes()[:-9])
    # TensorBoard reads its files in the order of their names: a second, then a counter without leading zeros. A run is resumed in another second.
    time.sleep(1.1)
    _write(cut, range(6, 11), resume_after=5)
    assert (cut / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert _events(cut) == _events(whole) == list(range(1, 11))


def test_a_new_run_starts_with_empty_logs(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 4))
    _write(tmp_path, range(1, 3))
    assert read_metrics(tmp_path / "metrics.csv")["step"] == [1, 2]
    assert _events(tmp_path) == [1, 2]


def test_noise_at_the_end_of_an_event_file_does_not_stop_a_run_from_going_on(tmp_path: Path) -> None:
    """What a power cut leaves: the length of a record, and no record behind it."""
    folder = tmp_path / "tensorboard"
    folder.mkdir()
    path = folder / "events.out.tfevents.1"
    path.write_bytes((20).to_bytes(8, "little") + b"1234" + b"\xff" * 24)
    cut_events(folder, 3)
    assert path.read_bytes() == b""
