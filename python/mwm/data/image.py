"""`read_image`: any file of the list as a tensor in [0, 1]."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import readers
from .errors import DataError, UnreadableImage
from .geometry import convert_channels, fit
from .intensity import map_intensity
from .records import Record
from .settings import ReadSettings


def read_image(image: str | Path | Record, settings: ReadSettings | None = None, channels: int | None = None, **overrides: Any) -> Tensor:
    """Read one image.

    Args:
        image: A file, or a record (needed where the file holds several slices or frames).
        settings: How; the defaults where left out.
        channels: Grey ↔ colour conversion; None keeps the file's channels.
        **overrides: Fields of `ReadSettings` that go before `settings`, for example `intensity="window=40,400"`.

    Returns:
        float32 [C, H, W] in [0, 1].

    Raises:
        UnreadableImage: the file cannot be read; the message names it and says why.
        DataError: a setting is wrong.
    """
    return decode(image, settings, channels=channels, **overrides)[0]


def decode(
    image: str | Path | Record, settings: ReadSettings | None = None, channels: int | None = None, **overrides: Any
) -> tuple[Tensor, tuple[int, int], tuple[float, float] | None]:
    """`read_image`, the image's own size before `settings.size`, and its pixel spacing where known."""
    settings = replace(settings or ReadSettings(), **overrides) if overrides else settings or ReadSettings()
    path, frame, name = (image.path, image.frame, image.name) if isinstance(image, Record) else (Path(image), None, Path(image).name)
    try:
        if frame is not None and frame[:1] in "xyz" and frame[0] != settings.axis:
            raise DataError(f"read_image: {name} is a slice along {frame[0]}, but slice_axis is {settings.slice_axis} ({settings.axis}). Pass the same settings to read_list.")
        raw = readers.read(path, frame, settings)
        values = torch.from_numpy(map_intensity(raw, settings))
        stored = (int(values.shape[1]), int(values.shape[2]))
        try:
            values = convert_channels(values, channels)
        except ValueError as error:
            raise UnreadableImage(str(error)) from error
        return fit(values, settings, raw.spacing).clamp_(0, 1), stored, raw.spacing
    except UnreadableImage as error:
        raise type(error)(f"{name} cannot be used: {error}.") from error


def content_digest(image: str | Path | Record) -> str:
    """Hash of what the image is made of: the file's bytes, and the frame. For keys of caches.

    Raises:
        UnreadableImage: the file cannot be read, is no regular file (a pipe would be waited for), or is beyond the limit of one file.
    """
    path, frame, name = (image.path, image.frame, image.name) if isinstance(image, Record) else (Path(image), None, Path(image).name)
    try:
        readers.check_file(path)
        found = path.stat()
        digest = _of_file(str(path), found.st_mtime_ns, found.st_size).copy()
    except OSError as error:
        raise UnreadableImage(f"{name} cannot be used: it cannot be read ({error.strerror}).") from error
    except UnreadableImage as error:
        raise UnreadableImage(f"{name} cannot be used: {error}.") from error
    if frame is not None:
        digest.update(f"#{frame}".encode())
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _of_file(path: str, changed: int, size: int) -> Any:
    """The hash of a file's bytes, to be copied and continued: a volume is read once, not once per slice. Its time and size are part of the key."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest
