"""A whole run on two processes: the same losses as on one, and the same bits after a kill and a resume."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mwm.train import PretrainConfig, pretrain
from mwm.train.logs import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # protobuf and tensorboard

_RANK = """
import os, signal
os.environ.update(RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(PORT))
from mwm.train import PretrainConfig, logs, pretrain
row = logs.RunLogs.row
def killing_row(self, values):
    row(self, values)
    self.flush()
    if values["step"] == KILLED_AT:
        os.kill(os.getpid(), signal.SIGKILL)
logs.RunLogs.row = killing_row
pretrain(PretrainConfig(**SETTINGS))
"""


def _run(start_process: Callable, settings: dict[str, Any], killed_at: int = 0) -> list[int]:
    """Two ranks to their ends; their exit codes. A rank whose partner was killed is ended after it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start_process(_RANK, RANK=rank, PORT=port, KILLED_AT=killed_at, SETTINGS=settings) for rank in range(2)]
    ranks[0].join(timeout=200)
    if ranks[0].exitcode != 0:
        ranks[1].kill()
    ranks[1].join(timeout=60)
    return [rank.exitcode for rank in ranks]


def test_two_processes_equal_one_and_resume_to_the_bit(scans: Path, tmp_path: Path, start_process: Callable) -> None:
    settings = dict(images=str(scans / "images"), regions=str(scans / "masks"), encoder="test_resnet", image_size=96, patch_size=32, decoder_width=32,
                    drop_path=0.3, epochs=2, batch_size=6, base_lr=0.01, optimizer="adamw", checkpoint_steps=2, checkpoint_minutes=0.0, log_every=1,
                    panel_every=0, workers=0, threads=1, progress=False, device="cpu", seed=3)
    pretrain(PretrainConfig(**settings, out=tmp_path / "one"))
    assert _run(start_process, {**settings, "out": str(tmp_path / "two")}) == [0, 0]
    losses = [torch.tensor(read_metrics(tmp_path / name / "metrics.csv")["loss"]) for name in ("one", "two")]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)  # float32; float64 to 1e-10 is in test_distributed

    cut = {**settings, "out": str(tmp_path / "cut")}
    assert _run(start_process, cut, killed_at=3)[0] == -signal.SIGKILL
    assert _run(start_process, {**cut, "resume": True}) == [0, 0]
    assert (tmp_path / "cut" / "metrics.csv").read_bytes() == (tmp_path / "two" / "metrics.csv").read_bytes()
    ours, theirs = (load_file(tmp_path / name / "encoder.safetensors") for name in ("cut", "two"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
