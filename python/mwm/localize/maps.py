"""`maps`: masks that the user already has, drawn by hand or by another program, as regions.

The text that points at a region is here the name of its file. For whole folders `prompt_for` finds it: the mask of the same
relative name or stem as the image (see `mwm.data.MaskFolder`), or the one in the `mask` column of an index CSV.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mwm.data import DataError, MaskFolder, ReadSettings, Record, read_mask
from mwm.localize.protocol import UnsupportedImage, check_images

_ASPECT = 0.02  # relative difference of aspect ratios that rounding of a resize explains
_FRAME = re.compile(r"(.+)#(\d+)")


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
        self._masks = MaskFolder(checkpoint)
        self._read_settings = read

    def prompt_for(self, record: Record) -> str:
        """The file that holds the region of a record; a slice of a volume adds "#n".

        Raises:
            DataError: there is no mask, or more than one.
        """
        path = self._masks.find(record)
        return str(path) if record.frame is None else f"{path}#{record.frame}"

    def evidence(self, prompt: str) -> str:
        """Hash of the mask's bytes: what a cached region depends on instead of a text."""
        path, frame = _split(prompt)
        try:
            return f"{hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()} {frame}"
        except OSError as error:
            raise DataError(f"maps: the mask {path.name} cannot be read ({error.strerror}).") from error

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The masks that the prompts name, at the size of the images. float [B, C, H, W], B file names → float32 [B, H, W]"""
        check_images(images, prompts, self.name)
        size = (images.shape[2], images.shape[3])
        maps = [self._read(prompt, size) for prompt in prompts]
        return torch.stack(maps).to(images.device) if maps else images.new_zeros((0, *size), dtype=torch.float32)

    def _read(self, prompt: str, size: tuple[int, int]) -> Tensor:
        """One mask. float32 [H, W] in [0, 1]"""
        path, frame = _split(prompt)
        try:
            mask = read_mask(path, frame=frame, settings=self._read_settings)
        except (DataError, OSError) as error:
            raise UnsupportedImage(f"maps: the mask of this image cannot be read ({error})") from error
        height, width = mask.shape
        if (height, width) == size:
            return mask
        if abs(height * size[1] - width * size[0]) > _ASPECT * max(height * size[1], width * size[0]):
            raise UnsupportedImage(f"maps: mask must have the aspect ratio of its image, got a mask of {height}x{width} for an image of {size[0]}x{size[1]} pixels. "
                                   "Give the mask of this image at its own size.")
        return F.interpolate(mask[None, None], size, mode="bilinear", align_corners=False, antialias=True)[0, 0].clamp(0, 1)


def _split(prompt: str) -> tuple[Path, int | None]:
    """File and slice of a prompt."""
    match = _FRAME.fullmatch(prompt)
    return (Path(match[1]), int(match[2])) if match and not Path(prompt).is_file() else (Path(prompt), None)
