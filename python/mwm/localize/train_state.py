"""Training that survives a kill: OUT.unfinished holds everything that the rest of a training depends on, and refuses to go on with anything else."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

from mwm.data import DataError, MaskFolder, blob, content_digest
from mwm.data.blob import key
from mwm.localize.checkpoints import first_line
from mwm.localize.train_data import Examples

_PARTS = {"asked", "epoch", "position", "told", "history", "best_epoch", "weights", "best", "optimizer", "schedule"}


class Checkpoints(Protocol):
    """Reads and writes whole checkpoints: the module `mwm.train.checkpoint`."""

    FORMAT: int

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Replace a file; the old one stays until the new one is whole."""
        ...

    def load(self, path: Path) -> dict[str, Any]:
        """Plain values and tensors, or an error."""
        ...


class Unfinished:
    """What is kept of a training while it runs.

    Args:
        out: Folder of the result.
        store: How checkpoints are written; None keeps nothing.
        minutes: At least so long between two checkpoints.
        resume: Go on with what is there.

    Raises:
        ValueError: there is nothing to go on with, or something is there and `resume` was not asked for.
    """

    def __init__(self, out: Path, store: Checkpoints | None, minutes: float, resume: bool) -> None:
        if not 0 <= minutes < float("inf"):
            raise ValueError(f"localize train: checkpoint_minutes must be at least 0, got {minutes!r}.")
        if resume and store is None:
            raise ValueError("localize train: checkpoints must be given with resume, got none. Pass the module mwm.train.checkpoint.")
        self.folder, self.store, self.minutes, self.asked = out.with_name(f"{out.name}.unfinished"), store, minutes, ""
        self.path, self.begun = self.folder / "checkpoint.pt", self.folder / "asked.json"
        self._saved = time.monotonic()
        if resume and not self.path.is_file() and not self.begun.is_file() and not finished(out):
            raise ValueError(f"localize train: resume must have a training to go on with, got none in {str(self.folder)!r}. Start it without --resume.")
        if not resume and store is not None and self.path.is_file():
            raise ValueError(f"localize train: {str(self.folder)!r} holds an unfinished training. Go on with --resume, or remove the folder.")

    def begin(self, asked: dict[str, Any], resume: bool) -> dict[str, Any] | None:
        """What was kept, or None to begin at the start: also with `resume`, where the training was killed before its first checkpoint.

        Args:
            asked: Everything that decides the result, as plain values.
            resume: Go on with what is there.

        Raises:
            ValueError: it is damaged, or was asked for with something else; the message names the first difference.
        """
        self.asked = json.dumps(asked, sort_keys=True)
        advice = f"Remove the folder {str(self.folder)!r} and start without --resume."
        if resume and not self.path.is_file():
            compare(self._read_begun(advice), asked, advice)
            return None
        if not resume:
            if self.store is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                blob.write_bytes(self.begun, self.asked.encode())
            return None
        try:
            state = self.store.load(self.path) if self.store else {}
        except (ValueError, OSError) as error:
            raise ValueError(f"localize train: {self.path.name} cannot be read ({first_line(error)}). {advice}") from error
        if not _PARTS <= state.keys() or not isinstance(state["asked"], str):
            raise ValueError(f"localize train: {self.path.name} must be of mwm localize train, got that of something else. {advice}")
        compare(json.loads(state["asked"]), asked, advice)
        return state

    def _read_begun(self, advice: str) -> dict[str, Any]:
        """What a training without a checkpoint was asked for."""
        try:
            before = json.loads(self.begun.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"localize train: {self.begun.name} cannot be read ({first_line(error)}). {advice}") from error
        if not isinstance(before, dict):
            raise ValueError(f"localize train: {self.begun.name} must be of mwm localize train, got that of something else. {advice}")
        return before

    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self.store is not None and time.monotonic() - self._saved >= 60 * self.minutes

    def keep(self, state: dict[str, Any]) -> None:
        """Write a checkpoint, where any are written."""
        if self.store is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store.save(self.path, {"format": self.store.FORMAT, "asked": self.asked, **state})
        self._saved = time.monotonic()

    def drop(self) -> None:
        """Remove what was kept: the training is finished, or cannot be."""
        if self.store is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def finished(out: Path) -> bool:
    """Whether a folder is the result of a training."""
    return (out / "training.json").is_file()


def compare(before: dict[str, Any], now: dict[str, Any], advice: str) -> None:
    """Refuse to go on with other settings or data.

    Raises:
        ValueError: they differ; one sentence about the first difference.
    """
    for name in [*now, *before]:
        if before.get(name) == now.get(name):
            continue
        if name in ("list", "images"):
            raise ValueError(f"localize train: --resume must find the images, masks and captions that the training began with, got others. {advice}")
        if name == "checkpoint":
            raise ValueError(f"localize train: --resume must find the checkpoint that the training began with, got another one. {advice}")
        raise ValueError(f"localize train: --resume must go on with the {name} that the training began with, {before.get(name)!r}, got {now.get(name)!r}. {advice}")


def list_hash(examples: Examples, masks: Any) -> str:
    """Hash of the images (ids and contents), their masks or captions, and how they are parted.

    Args:
        examples: The images.
        masks: Where their masks are, or None.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part, records in (("train", examples.train), ("val", examples.val)):
        for record in sorted(records, key=lambda one: one.id):
            mask = None if masks is None else masks.find(record) if isinstance(masks, MaskFolder) else record.mask
            seen = [_digest(record), "" if mask is None else _digest(mask)]
            digest.update(key(part, record.hashed, *seen, *examples.texts[record.id]).encode())
    return digest.hexdigest()


def _digest(what: Any) -> str:
    try:
        return content_digest(what)
    except (DataError, OSError):
        return "unreadable"
