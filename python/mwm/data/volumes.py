"""Slices back into a volume: NIfTI files that lie on the voxels of the file the slices came from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation
from numpy.typing import NDArray

from . import readers
from .errors import DataError
from .readers import nifti
from .settings import ReadSettings


def is_volume(path: Path) -> bool:
    """Whether a file is a NIfTI file by its name."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def write_volume(source: Path, slices: Mapping[str, NDArray], out: Path, settings: ReadSettings | None = None) -> None:
    """Write maps of the slices of a NIfTI file as a NIfTI file of its shape, affine and orientation; slices that are not given are 0.

    The reverse of reading: what `read_image` turned to radiological view is turned back. Of the source's header the affine with its codes and the
    units are copied, no text. The file appears whole or not at all.

    Args:
        source: The file that the slices came from.
        slices: By `Record.frame` ("z12", "z12t0"), each of the size of the stored slice as `read_image` shows it. One real dtype [h, w]
        out: Target, .nii or .nii.gz; its folder is made.
        settings: With which the slices were read; `orientation` is used.

    Raises:
        DataError: there are no slices, or one has another size or lies outside of the volume.
        UnreadableImage: the source cannot be read.
    """
    settings = settings or ReadSettings()
    if not slices:
        raise DataError(f"write_volume: slices must hold at least one map, got none for {source.name}.")
    with readers._in_words():
        image = nifti._open(source)
        turn = nifti._turn(image, settings.orientation)
    shape = tuple(image.shape[:3])
    if turn is not None:
        shape = tuple(int(image.shape[[int(k) for k in turn[:, 0]].index(axis)]) for axis in range(3))
    times = image.shape[3] if len(image.shape) == 4 else 1
    volume = np.zeros((*shape, times), next(iter(slices.values())).dtype)
    for frame, part in slices.items():
        _put(volume, frame, part, canonical=turn is not None, name=source.name)
    if turn is not None:
        back = np.empty((3, 2))
        for stored, (canonical, flip) in enumerate(turn):
            back[int(canonical)] = stored, flip
        volume = apply_orientation(volume, back)
    _save(np.ascontiguousarray(volume.reshape(image.image.shape)), image, out)


def _put(volume: NDArray, frame: str, part: NDArray, *, canonical: bool, name: str) -> None:
    """Turn one slice back and write it into its place. volume [X, Y, Z, T], part [h, w]"""
    match = nifti._FRAME.match(frame)
    place = [slice(None)] * 4
    if match is not None:
        axis, index, time = nifti._AXIS[match[1]], int(match[2]), int(match[3] or 0)
        place[axis], place[3] = index, time
    if match is None or index >= volume.shape[axis] or time >= volume.shape[3]:
        raise DataError(f"write_volume: slices must lie in the volume, got {frame!r} for {name} of {' x '.join(map(str, volume.shape[:3]))} voxels.")
    if canonical:
        part = part[::-1, ::-1]
    part = part.T
    if part.shape != volume[tuple(place)].shape:
        raise DataError(f"write_volume: slices must have the size of the stored slice, got {part.shape[1]} x {part.shape[0]} for {frame!r} of {name}.")
    volume[tuple(place)] = part


def _save(values: NDArray, image: nifti._Shaped, out: Path) -> None:
    source = image.image.header
    kind = nibabel.Nifti2Image if max(values.shape) > 32767 else nibabel.Nifti1Image
    made = kind(values, image.affine)
    made.header.set_zooms(source.get_zooms()[: values.ndim])
    for name in ("sform", "qform"):
        affine, code = getattr(source, f"get_{name}")(coded=True)
        getattr(made, f"set_{name}")(image.affine if affine is None else affine, int(code))
    made.header.set_xyzt_units(*source.get_xyzt_units())
    out.parent.mkdir(parents=True, exist_ok=True)
    ending = ".nii.gz" if out.name.lower().endswith(".gz") else ".nii"
    temporary = out.with_name(f".{out.name}.{os.getpid()}{ending}")
    try:
        nibabel.save(made, temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
