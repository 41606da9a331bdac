"""`maps`: masks that the user already has, drawn by hand or by another program, as regions.

The text that points at a region is here the name of its file. For whole folders `prompt_for` finds it: the mask of the same
relative name or stem as the image (see `mwm.data.MaskFolder`), or the one in the `mask` column of an index CSV.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from mwm.data import (
    DataError,
    MaskFolder,
    MissingRegion,
    ReadSettings,
    Record,
    content_digest,
    match_size,
    read_record_mask,
)
from mwm.localize.protocol import UnsupportedImage, check_images

_FRAME = re.compile(r"(.+)#([a-z]\w*)")


class MapsLocalizer:
    """Reads masks instead of finding regions; they are regions already and are not refined unless asked.

    Args:
        checkpoint: Folder of the masks; left out where an index CSV has a `mask` column.
        read: Slice axis and orientation of volumes; as the images are read.

    Raises:
        ValueError: the folder is not there or holds no masks. From a call (`UnsupportedImage`): the mask cannot be read, or
            its aspect ratio is not that of the image.
    """

    name = "maps"
    fingerprint = "maps 1"
    gives_regions = True

    def __init__(self, checkpoint: str | Path | None = None, *, read: ReadSettings | None = None) -> None:
        self._masks = None if checkpoint is None else MaskFolder(checkpoint)
        self._settings = read or ReadSettings()

    def prompt_for(self, record: Record) -> str:
        """The file that holds the region of a record; a slice of a volume adds "#" and the slice.

        Raises:
            DataError: there is no mask, or more than one.
        """
        path = (self._masks.find(record) if self._masks else None) or record.mask
        if path is None:
            raise MissingRegion(f"maps: there is no mask for {record.name}. Add one of the same name, or leave the image out.")
        return str(path) if record.frame is None else f"{path}#{record.frame}"

    def evidence(self, prompt: str) -> str:
        """Hash of the mask's bytes: what a cached region depends on instead of a text."""
        mask = _record(prompt)
        return f"{content_digest(mask)} {mask.frame}"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The masks that the prompts name, at the size of the images. float [B, C, H, W], B file names → float32 [B, H, W]"""
        check_images(images, prompts, self.name)
        size = (images.shape[2], images.shape[3])
        maps = [self._read(prompt, size) for prompt in prompts]
        return torch.stack(maps).to(images.device) if maps else images.new_zeros((0, *size), dtype=torch.float32)

    def _read(self, prompt: str, size: tuple[int, int]) -> Tensor:
        """One mask at the size of its image. float32 [H, W]"""
        mask = _record(prompt)
        try:
            return match_size(read_record_mask(mask.path, mask, self._settings), size, mask.path.name)
        except (DataError, OSError) as error:
            raise UnsupportedImage(f"maps: {error}") from error


def _record(prompt: str) -> Record:
    """File and slice that a prompt names."""
    match = _FRAME.fullmatch(prompt)
    path, frame = (Path(match[1]), match[2]) if match and not Path(prompt).is_file() else (Path(prompt), None)
    return Record(path=path, name=path.name if frame is None else f"{path.name}#{frame}", id=0, frame=frame)
