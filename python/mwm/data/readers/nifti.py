"""NIfTI volumes through nibabel, slice by slice in radiological view."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, io_orientation
from numpy.typing import NDArray

from ..errors import UnreadableImage
from ..limits import check_voxels
from ..raw import Raw, extent_of, percentiles_of
from ..settings import ReadSettings

_AXIS = {"x": 0, "y": 1, "z": 2}
_FRAME = re.compile(r"([xyz])(\d+)(?:t(\d+))?\Z")
_CT_LOW = -500.0  # no MRI or PET reaches so low; CT has air at -1000 HU


def frames(path: Path, settings: ReadSettings) -> list[str]:
    """"z0", "z1", … along `settings.slice_axis`; with "t0", "t1", … behind for the volumes of a 4-D file."""
    image = _open(path)
    shape, axis = image.shape, settings.axis
    turn = _turn(image, settings.orientation)
    stored = _AXIS[axis] if turn is None else [int(k) for k in turn[:, 0]].index(_AXIS[axis])
    length = shape[stored]
    if len(shape) == 3:
        return [f"{axis}{k}" for k in range(length)]
    return [f"{axis}{k}t{t}" for t in range(shape[3]) for k in range(length)]


def read(path: Path, frame: str | None, settings: ReadSettings) -> Raw:
    """One slice; percentiles and extent are those of the whole volume, so that its slices stay comparable."""
    match = _FRAME.match(frame or "")
    if match is None:
        raise UnreadableImage("it is a volume of several slices; pass the record of one of them" if frame is None else f"it has no slice {frame!r}")
    axis, index, time = match[1], int(match[2]), int(match[3] or 0)
    stat = path.stat()
    volume, zooms, percentiles, extent = _volume(str(path), stat.st_mtime_ns, stat.st_size, time, settings.orientation)
    k = _AXIS[axis]
    if index >= volume.shape[k]:
        raise UnreadableImage(f"it has no slice {frame!r}")
    part = np.take(volume, index, axis=k)  # [first, second remaining axis] or the same with colours
    rows, columns = [j for j in (0, 1, 2) if j != k][::-1]
    part = np.swapaxes(part, 0, 1)
    if settings.orientation == "canonical":
        part = part[::-1, ::-1]  # superior or anterior up; the patient's left, or back, at image right
    part = part[None] if part.ndim == 2 else np.moveaxis(part, 2, 0)
    return Raw(np.ascontiguousarray(part), is_ct=extent[0] < _CT_LOW, spacing=(zooms[rows], zooms[columns]), percentiles=percentiles, extent=extent)


def _open(path: Path) -> _Shaped:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if (packed and not path.name.lower().endswith(".gz")) or (not packed and path.name.lower().endswith(".gz")):
        raise UnreadableImage("its extension is not that of its content; name it .nii or, compressed, .nii.gz")
    image = nibabel.load(path)
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) not in (3, 4) or image.ndim < 2:
        raise UnreadableImage(f"its {len(image.shape)} dimensions are not those of a volume")
    check_voxels(*shape[:3])
    check_voxels(*shape[:3], max(1, shape[3] // 16) if len(shape) == 4 else 1)
    return _Shaped(image, shape)


class _Shaped:
    """An opened volume whose needless last axes are dropped."""

    def __init__(self, image: nibabel.spatialimages.SpatialImage, shape: tuple[int, ...]) -> None:
        self.image, self.shape, self.affine = image, shape, image.affine

    def values(self, time: int) -> NDArray:
        """Volume number `time`, as float32 or as stored integers. [X, Y, Z] or, in colour, [X, Y, Z, 3]"""
        proxy = self.image.dataobj
        if len(self.shape) == 4:
            if time >= self.shape[3]:
                raise UnreadableImage(f"it has no volume {time}")
            values = np.asanyarray(proxy[(slice(None),) * 3 + (time,) + (0,) * (len(self.image.shape) - 4)])
        else:
            values = np.asanyarray(proxy).reshape(self.shape)
        if values.dtype.names:
            values = np.stack([values[name] for name in values.dtype.names[:3]], -1)
        if values.dtype.kind not in "uif":
            raise UnreadableImage("its values are no real numbers")
        return values.astype(np.float32) if values.dtype.itemsize > 4 or values.dtype.kind == "f" else values


def _turn(image: _Shaped, orientation: str) -> NDArray | None:
    """nibabel's orientation array from stored to canonical axes; None where nothing is turned."""
    if orientation == "stored":
        return None
    turn = io_orientation(image.affine) if np.isfinite(image.affine).all() else np.full((3, 2), np.nan)
    if not np.isfinite(turn).all():
        raise UnreadableImage("its header gives no orientation; read it with orientation stored")
    return turn


@lru_cache(maxsize=2)
def _volume(path: str, changed: int, size: int, time: int, orientation: str) -> tuple[NDArray, tuple[float, ...], tuple[float, float], tuple[float, float]]:
    """A volume in memory: its neighbours in a list are its own slices. The time and size of the file are part of the key."""
    image = _open(Path(path))
    values = image.values(time)
    zooms = [float(z) if np.isfinite(z) and z > 0 else 1.0 for z in (*image.image.header.get_zooms()[:3], 1.0, 1.0)[:3]]
    turn = _turn(image, orientation)
    if turn is not None:
        values = apply_orientation(values, turn)
        order = [0.0] * 3
        for stored, canonical in enumerate(turn[:, 0]):
            order[int(canonical)] = zooms[stored]
        zooms = order
    extent = extent_of(values)
    return values, tuple(zooms), percentiles_of(values), extent
