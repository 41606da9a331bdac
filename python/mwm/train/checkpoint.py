"""Checkpoints that are either whole or not there: temporary file, checksum, fsync, read back, rename."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mwm.train.config import TrainError

NAME = "checkpoint.pt"
FORMAT = 1
_MAGIC = b"MWMCKPT1"
_HEADER = struct.Struct("<8sIQ")  # magic, CRC-32 of the payload, its length in bytes


class _Checked:
    """A writer that counts and checksums what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.crc, self.length = file, 0, 0

    def write(self, data: bytes) -> int:
        self.crc = zlib.crc32(data, self.crc)
        self.length += len(data)
        self.file.write(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def _writing(what: str) -> Iterator[None]:
    """Turns a refused write into one sentence, and an interrupt that torch's archive writer covered with its own error back into itself."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        cause = error if isinstance(error, OSError) else error.__context__
        number = getattr(cause, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise TrainError(f"{what}: the disk is full ({os.strerror(number).lower()}). Free some space, then go on with --resume; what was "
                             "written before is whole.") from error
        if isinstance(error, OSError):
            raise TrainError(f"{what}: the file cannot be written ({error.strerror}). Check the folder's rights, then go on with "
                             "--resume.") from error
        raise


def write_atomic(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that `path` holds the old content or the new one, never a part.

    Args:
        path: the file.
        write: writes the content to an open binary file.

    Raises:
        TrainError: the disk is full or the folder cannot be written; `path` is as before.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with _writing(path.name):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_atomic` for UTF-8 text; bytes of a file name that are no UTF-8 (names of older systems) are written as escapes."""
    write_atomic(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace a checkpoint; until the new one is whole, checked and on the disk, the old one stays.

    Args:
        path: the checkpoint.
        state: plain values, lists, dicts and tensors (what `torch.load(weights_only=True)` accepts).

    Raises:
        TrainError: the disk is full; the old checkpoint is as before.
    """

    def write(file: BinaryIO) -> None:
        file.write(_HEADER.pack(_MAGIC, 0, 0))
        checked = _Checked(file)
        torch.save(state, checked)
        file.seek(0)
        file.write(_HEADER.pack(_MAGIC, checked.crc, checked.length))
        file.flush()
        _verify(Path(file.name))

    write_atomic(path, write)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint; nothing but plain values and tensors is accepted.

    Raises:
        TrainError: there is none, it is damaged, or it is of another kind.
    """
    try:
        payload = _verify(path)
    except OSError as error:
        raise TrainError(f"checkpoint: {path.parent.name}/{path.name} must be readable, got {error.strerror}. Start the run without --resume.") from error
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TrainError(f"checkpoint: {path.parent.name}/{path.name} holds more than plain values and tensors and is not opened. Use a checkpoint that "
                         "mwm pretrain wrote.") from error
    except Exception as error:  # a payload that only its checksum vouches for: KeyError, EOFError, RuntimeError, …
        raise TrainError(f"checkpoint: {path.parent.name}/{path.name} is damaged or no checkpoint of mwm ({type(error).__name__}). Restore it from a copy, or "
                         "start anew with --overwrite.") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TrainError(f"checkpoint: {path.parent.name}/{path.name} is of format {state.get('format') if isinstance(state, dict) else '?'}, "
                         f"this version reads format {FORMAT}. Use the mwm version that run.json names.")
    return state


def clean(folder: Path) -> None:
    """Remove what a killed write left behind."""
    for left in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            left.unlink()


def load_into(model: torch.nn.Module, state: dict[str, Any], where: str) -> None:
    """Put a checkpoint's weights into a model that must be the same.

    Raises:
        TrainError: the checkpoint belongs to another model; the message names the first difference.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or extra or wrong:
        first = (f"{wrong[0]} is {list(state[wrong[0]].shape)} there and {list(own[wrong[0]].shape)} here" if wrong
                 else f"{missing[0]} is not in it" if missing else f"it has {extra[0]} besides")
        raise TrainError(f"checkpoint: {where} belongs to another model ({first}; {len(missing) + len(extra) + len(wrong)} of {len(own)} "
                         "tensors differ). Resume with the run's own encoder and decoder settings, or choose another --out.")
    model.load_state_dict(state)


def _verify(path: Path) -> bytes:
    with open(path, "rb") as file:
        head = file.read(_HEADER.size)
        payload = file.read()
    if len(head) == _HEADER.size:
        magic, crc, length = _HEADER.unpack(head)
        if magic == _MAGIC and length == len(payload) and crc == zlib.crc32(payload):
            return payload
    raise TrainError(f"checkpoint: {path.parent.name}/{path.name} is damaged or no checkpoint of mwm (checksum). Restore it from a copy, or start "
                     "anew with --overwrite.")


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
