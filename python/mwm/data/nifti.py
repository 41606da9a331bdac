"""NIfTI volumes through nibabel, slice by slice."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from mwm.data.decoded import Decoded, check_size
from mwm.data.errors import UnreadableImage
from mwm.data.settings import ReadSettings

SUFFIXES = (".nii", ".nii.gz")


def nifti_slices(path: Path, settings: ReadSettings) -> int:
    """Number of slices along the axis of the settings; 1 where it cannot be told (reading will say why)."""
    import nibabel

    try:
        image = nibabel.load(path)
        shape = image.shape
        if settings.orientation == "canonical" and len(shape) >= 3:
            axes = nibabel.io_orientation(image.affine)[:, 0]
            shape = tuple(shape[list(axes).index(axis)] for axis in range(3))
        return max(1, int(shape[settings.slice_axis])) if len(shape) >= 3 else 1
    except Exception:  # a damaged file stays in the list as one image, and is reported when it is read
        return 1


def decode_nifti(path: Path, name: str, settings: ReadSettings, index: int | None = None) -> Decoded:
    """One slice of a volume; the middle one where no index is given. The fourth axis, if any, becomes channels.

    In canonical orientation an axial slice is shown in radiological view: the patient's left on the image's right, front up.

    Raises:
        UnreadableImage: damaged, of other than 2 to 4 dimensions, or larger than `max_pixels` per slice.
    """
    try:
        volume, bounds, extremes = _volume(path, path.stat().st_mtime_ns, settings.orientation, settings.max_pixels, name)
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(f"{name}: not a readable NIfTI ({type(error).__name__}).") from None
    axis = settings.slice_axis
    count = volume.shape[axis]
    index = count // 2 if index is None else index
    if not 0 <= index < count:
        raise UnreadableImage(f"{name}: slice must be below {count}, got {index}.")
    plane = np.take(volume, index, axis=axis)  # [a, b, C]
    if settings.orientation == "canonical":
        # Axes grow to the patient's right-hand side, front and top; the radiological view has right, front and top first.
        plane = plane[::-1, ::-1].transpose(2, 1, 0)
    else:
        plane = plane.transpose(2, 0, 1)
    return Decoded(np.ascontiguousarray(plane), bounds=bounds, extremes=extremes)


@lru_cache(maxsize=4)
def _volume(path: Path, modified: int, orientation: str, max_pixels: int, name: str) -> tuple[np.ndarray, tuple[float, float], tuple[float, float]]:
    """A volume [X, Y, Z, C] with its percentiles and extremes; kept, since its slices are read one after the other."""
    import nibabel

    image = nibabel.load(path)
    if not 2 <= len(image.shape) <= 4:
        raise UnreadableImage(f"{name}: a volume must have 2 to 4 dimensions, got {len(image.shape)}.")
    sides = sorted(int(n) for n in image.shape[:3])
    check_size(sides[-1], sides[-2], max_pixels, name=name)
    if int(np.prod(image.shape, dtype=np.int64)) > 40 * max_pixels:
        raise UnreadableImage(f"{name}: declares {'x'.join(map(str, image.shape))} voxels, over the limit. If the file is right, raise max_pixels.")
    if orientation == "canonical" and len(image.shape) >= 3:
        image = nibabel.as_closest_canonical(image)
    values = np.asarray(image.dataobj, dtype=np.float32)
    values = values.reshape(values.shape + (1,) * (4 - values.ndim))
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise UnreadableImage(f"{name}: no voxel is a finite number.")
    low, high = np.percentile(finite, (0.5, 99.5))
    return values, (float(low), float(high)), (float(finite.min()), float(finite.max()))
