"""A killed run goes on bit for bit: real processes, real SIGKILL, at any moment and with any number of workers."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mwm.train import PretrainConfig, checkpoint, pretrain
from mwm.train.config import TrainError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # protobuf and tensorboard

#: Each kills its own process with SIGKILL at the named moment of a run of 12 steps with checkpoints every 3.
_MOMENTS = {
    "mid-epoch": """
from mwm.train import logs
row = logs.RunLogs.row
def killing_row(self, values):
    row(self, values)
    self.flush()
    if values["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
logs.RunLogs.row = killing_row
""",
    "half of a checkpoint is written": """
from mwm.train import checkpoint
write, total = checkpoint._Checked.write, [0]
def killing_write(self, data):
    total[0] += len(data)
    if total[0] > 1.5 * LENGTH:
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, data)
checkpoint._Checked.write = killing_write
""",
    "a checkpoint is written but not yet in place": """
replace, count = os.replace, [0]
def killing_replace(source, target):
    if str(target).endswith("checkpoint.pt"):
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killing_replace
""",
    "before the first checkpoint": """
from mwm.train import checkpoint
def killing_save(path, state):
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save = killing_save
""",
}
_RUN = """
import os, signal
{moment}
from mwm.train import PretrainConfig, pretrain
pretrain(PretrainConfig(**SETTINGS))
"""


@pytest.fixture(scope="module")
def whole(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return pretrain(PretrainConfig(**_settings(scans, out)))


def _settings(scans: Path, out: Path) -> dict[str, Any]:
    return dict(images=str(scans / "images"), regions=str(scans / "masks"), out=str(out), encoder="test_resnet", image_size=96, patch_size=32,
                decoder_width=32, drop_path=0.3, crop_scale=(0.6, 1.0), epochs=3, batch_size=4, base_lr=0.02, optimizer="lamb", checkpoint_steps=3,
                checkpoint_minutes=0.0, log_every=1, panel_every=2, panel_images=2, workers=0, threads=1, progress=False, device="cpu", seed=3)


def _assert_same(run: Path, whole: Path) -> None:
    assert (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    ours, theirs = load_file(run / "encoder.safetensors"), load_file(whole / "encoder.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = checkpoint.load(run / checkpoint.NAME), checkpoint.load(whole / checkpoint.NAME)
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])
    for key, state in theirs["optimizer"]["state"].items():
        assert all(torch.equal(torch.as_tensor(ours["optimizer"]["state"][key][name]), torch.as_tensor(value)) for name, value in state.items())
    assert (run / "panels" / "epoch_0002.png").read_bytes() == (whole / "panels" / "epoch_0002.png").read_bytes()
    assert not list(run.glob(".*.tmp"))


@pytest.mark.parametrize("moment", list(_MOMENTS))
def test_a_run_killed_and_resumed_equals_the_uninterrupted_one(moment: str, whole: Path, scans: Path, tmp_path: Path,
                                                                   start_process: Callable) -> None:
    settings = _settings(scans, tmp_path / "run")
    length = (whole / checkpoint.NAME).stat().st_size
    killed = start_process(_RUN.format(moment=_MOMENTS[moment]), SETTINGS={**settings, "workers": 2}, LENGTH=length)
    killed.join(timeout=120)
    assert killed.exitcode == -signal.SIGKILL
    assert not (tmp_path / "run" / "encoder.safetensors").exists()
    run = pretrain(PretrainConfig(**settings, resume=True))
    _assert_same(run, whole)


def test_a_run_killed_from_outside_at_any_moment_equals_the_uninterrupted_one(whole: Path, scans: Path, tmp_path: Path,
                                                                                          start_process: Callable) -> None:
    settings = _settings(scans, tmp_path / "run")
    killed = start_process(_RUN.format(moment=""), SETTINGS={**settings, "workers": 1})
    table = tmp_path / "run" / "metrics.csv"
    limit = time.monotonic() + 100
    while killed.is_alive() and time.monotonic() < limit:
        if table.exists() and len(table.read_bytes().splitlines()) > 4:
            killed.kill()
            break
        time.sleep(0.002)
    killed.join(timeout=60)
    run = pretrain(PretrainConfig(**settings, resume=True))
    _assert_same(run, whole)


def test_worker_processes_do_not_change_a_run(whole: Path, scans: Path, tmp_path: Path) -> None:
    run = pretrain(PretrainConfig(**{**_settings(scans, tmp_path / "run"), "workers": 2}))
    _assert_same(run, whole)


def test_resuming_a_finished_run_changes_nothing(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    pretrain(PretrainConfig.from_run(run))
    _assert_same(run, whole)


def test_a_run_is_not_continued_with_other_settings(whole: Path, scans: Path, tmp_path: Path) -> None:
    settings = _settings(scans, shutil.copytree(whole, tmp_path / "run"))
    with pytest.raises(TrainError, match=r"base_lr is 0.02 in the run and 0.5 now"):
        pretrain(PretrainConfig(**{**settings, "base_lr": 0.5}, resume=True))


def test_a_changed_thread_count_is_named_in_a_warning(whole: Path, scans: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    with pytest.warns(UserWarning, match=r"threads 1 -> 2.*will not repeat bit for bit"):
        pretrain(PretrainConfig(**{**_settings(scans, run), "threads": 2}, resume=True))


def test_changed_images_are_refused_on_resume(scans: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((scans / "images").iterdir()):
        (images / path.name).write_bytes(path.read_bytes())
    settings = {**_settings(scans, tmp_path / "run"), "images": str(images), "epochs": 1, "panel_every": 0}
    pretrain(PretrainConfig(**settings))
    os.remove(images / "scan_03.png")
    with pytest.raises(TrainError, match="the images are not those the run began with"):
        pretrain(PretrainConfig(**settings, resume=True))
