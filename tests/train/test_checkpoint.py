"""A checkpoint is whole or it is the old one: damage, a full disk, another model, code in the file."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mwm.train import checkpoint
from mwm.train.config import TrainError


def _state(fill: float = 1.0) -> dict:
    return {"format": 1, "step": 7, "model": {"w": torch.full((200, 100), fill)}, "name": "x", "betas": (0.9, 0.95)}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / checkpoint.NAME, _state(3.5))
    state = checkpoint.load(tmp_path / checkpoint.NAME)
    assert (state["step"], state["betas"], state["name"]) == (7, (0.9, 0.95), "x")
    assert torch.equal(state["model"]["w"], torch.full((200, 100), 3.5))
    assert os.listdir(tmp_path) == [checkpoint.NAME]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign"])
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path: Path, damage: str) -> None:
    path = tmp_path / checkpoint.NAME
    checkpoint.save(path, _state())
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-100]), "empty": b"", "foreign": b"PK" + bytes(5000)}[damage])
    with pytest.raises(TrainError, match="is damaged or no checkpoint of mwm"):
        checkpoint.load(path)


def test_an_absent_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="must be readable"):
        checkpoint.load(tmp_path / checkpoint.NAME)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    path = tmp_path / checkpoint.NAME
    checkpoint.save(path, {"format": 1, "bomb": Bomb()})
    with pytest.raises(TrainError, match="holds more than plain values and tensors"):
        checkpoint.load(path)
    assert not (tmp_path / "exploded").exists()


_FULL_DISK = """
import resource, torch
from pathlib import Path
from mwm.train import checkpoint
from mwm.train.config import TrainError
resource.setrlimit(resource.RLIMIT_FSIZE, (QUOTA, resource.RLIM_INFINITY))
try:
    checkpoint.save(Path(PATH), {"format": 1, "step": 8, "w": torch.zeros(400, 1000)})
except TrainError as error:
    open(SAID, "w").write(str(error))
"""


@pytest.mark.parametrize("quota", [8_000, 700_000])
def test_a_full_disk_is_one_sentence_and_the_old_checkpoint_stays(quota: int, tmp_path: Path, start_process: Callable) -> None:
    run = tmp_path / "run"
    run.mkdir()
    path = run / checkpoint.NAME
    checkpoint.save(path, {**_state(), "model": {}})
    process = start_process(_FULL_DISK, PATH=str(path), QUOTA=quota, SAID=str(tmp_path / "said"))
    process.join(timeout=120)
    said = (tmp_path / "said").read_text()
    assert said.startswith("checkpoint.pt: the disk is full") and "--resume" in said and len(said.splitlines()) == 1
    assert checkpoint.load(path)["step"] == 7
    assert os.listdir(run) == [checkpoint.NAME]


def test_a_checkpoint_of_another_model_is_refused_with_the_first_difference() -> None:
    model, other = nn.Linear(3, 4), nn.Linear(3, 5)
    with pytest.raises(TrainError, match=r"belongs to another model \(weight is \[5, 3\] there and \[4, 3\] here"):
        checkpoint.load_into(model, other.state_dict(), "run/checkpoint.pt")
    with pytest.raises(TrainError, match="bias is not in it"):
        checkpoint.load_into(model, {"weight": torch.zeros(4, 3)}, "run/checkpoint.pt")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    checkpoint.write_text(path, "old")

    def fail(file) -> None:
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomic(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("call", range(1, 9))
def test_ctrl_c_within_a_save_stays_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """torch's archive writer closes itself on the way out and then raises a RuntimeError of its own over the interrupt."""
    path, calls = tmp_path / checkpoint.NAME, itertools.count(1)
    checkpoint.save(path, {"format": checkpoint.FORMAT, "step": 7})
    write = checkpoint._Checked.write

    def interrupted(self: checkpoint._Checked, data: bytes) -> int:
        if next(calls) == call:
            raise KeyboardInterrupt
        return write(self, data)

    monkeypatch.setattr(checkpoint._Checked, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"format": checkpoint.FORMAT, "step": 8, "weight": torch.zeros(100_000), "bias": torch.ones(10)})
    assert next(calls) > call, "the interrupt never came"
    assert checkpoint.load(path)["step"] == 7
    assert os.listdir(tmp_path) == [checkpoint.NAME]


@pytest.mark.parametrize("payload", [b"", b"hello", b"PK\3\4" + bytes(100), b"\x80\2."], ids=["nothing", "text", "half an archive", "half a pickle"])
def test_a_payload_that_only_its_checksum_vouches_for_is_one_sentence(payload: bytes, tmp_path: Path) -> None:
    path = tmp_path / checkpoint.NAME
    path.write_bytes(checkpoint._HEADER.pack(checkpoint._MAGIC, zlib.crc32(payload), len(payload)) + payload)
    with pytest.raises(TrainError, match=r"damaged or no checkpoint of mwm|more than plain values"):
        checkpoint.load(path)
