"""From a heat map to a region: edges of the image, a cut, holes, connected components, boxes, a soft rim. Deterministic, on the CPU.

A map that does not say *where* never becomes a region that covers everything: a constant map and a map whose peak is
below `min_peak` give an empty region, and a map with NaN is refused. What an empty region means for masking is the policy's
setting `empty` (by default such an image is masked like the mean image of its set).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from mwm.localize.crf import dense_crf
from mwm.localize.threshold import otsu

_METHODS = ("threshold", "otsu", "kmeans")
_FLAT = 1e-6  # a map that varies by less is constant: rounding of a network's output, not a place
_SLACK = 1e-3  # rounding above 1 or below 0 that resizing may leave
_TAIL = 0.05  # of a soft rim
_NEIGHBOURS = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True)
class RefineSettings:
    """How heat maps become regions. The steps: peak, field (`crf`), cut, holes, components, boxes, rim (`blur`), values (`soft`).

    Attributes:
        method: "threshold" (pixels of at least `threshold`), "otsu" (Otsu's threshold of the values of each map) or "kmeans"
            (k = 2 on the values of each map; foreground is the higher centre), as in MedCLIP-SAMv2's post-processing.
        threshold: Least value of a region pixel, in [0, 1]; 0 keeps every pixel above zero.
        min_peak: A map whose largest value is below this is empty, in [0, 1]. k-means would find a foreground in noise.
        min_area: Components with a smaller share of the image are dropped, in [0, 1].
        components: Number of largest connected components to keep (8-neighbourhood); None keeps all.
        expand: Replace each component by its bounding box, scaled about its centre by this factor (≥ 1; the paper uses
            1.0 … 1.5) and clipped to the image; None keeps the shape.
        soft: Keep the map's own values inside the region instead of 1.
        crf: Draw the map to the edges of its image by a dense conditional random field first (see `mwm.localize.crf`); needs the images.
            A field that leaves nothing, or everything, is not used: the map alone decides.
        fill: Fill holes of the region: what it encloses without a way to the image's border.
        blur: Standard deviation of a Gaussian that softens the rim, as a share of the image's edge (the root of its area), in
            (0, 0.5]; None leaves it sharp. Not with `soft`.
    """

    method: str = "threshold"
    threshold: float = 0.5
    min_peak: float = 0.1
    min_area: float = 0.0
    components: int | None = None
    expand: float | None = None
    soft: bool = False
    crf: bool = False
    fill: bool = False
    blur: float | None = None

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise ValueError(f"refine: method must be one of {', '.join(_METHODS)}, got {self.method!r}.")
        for argument in ("threshold", "min_peak", "min_area"):
            value = getattr(self, argument)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"refine: {argument} must be in [0, 1], got {value!r}.")
        if self.components is not None and (isinstance(self.components, bool) or not isinstance(self.components, int) or self.components < 1):
            raise ValueError(f"refine: components must be a whole number of at least 1, got {self.components!r}. Leave it out to keep all.")
        if self.expand is not None and (isinstance(self.expand, bool) or not isinstance(self.expand, (int, float)) or not 1 <= self.expand < float("inf")):
            raise ValueError(f"refine: expand must be a factor of at least 1, got {self.expand!r}. 1 is the bounding box; leave it out to keep the shape.")
        if self.blur is not None and (isinstance(self.blur, bool) or not isinstance(self.blur, (int, float)) or not 0 < self.blur <= 0.5):
            raise ValueError(f"refine: blur must be a share of the image's edge in (0, 0.5], got {self.blur!r}. 0.02 softens over a few pixels; leave it out for a sharp rim.")
        if self.blur is not None and self.soft:
            raise ValueError("refine: one of blur and soft must be given, got both. soft keeps the map's values, blur makes new ones.")

    def before_sam(self) -> RefineSettings:
        """The steps that find the parts from which prompts for a SAM are made: no boxes, no rim, no values."""
        return replace(self, expand=None, blur=None, soft=False)

    def after_sam(self) -> RefineSettings:
        """The steps on the masks that a SAM gives back: holes, components, boxes, rim."""
        return replace(self, method="threshold", threshold=0.5, min_peak=0.0, soft=False, crf=False)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for config files and cache keys."""
        return asdict(self)


def refine(maps: Tensor, settings: RefineSettings | None = None, images: Tensor | None = None) -> Tensor:
    """Turn heat maps into regions.

    Args:
        maps: Heat maps in [0, 1]. float [B, H, W] or [H, W]
        settings: The steps; the defaults where left out.
        images: The images of the maps, needed with ``crf=True``. float [B, C, H, W] or [C, H, W] in [0, 1]

    Returns:
        Regions in [0, 1] of the same shape, float32 on the CPU: 0 or 1, the map's values with ``soft=True``, or between with
        `blur`. A constant map and a map below `min_peak` give an empty region.

    Raises:
        ValueError: a map holds NaN or values outside [0, 1], has the wrong number of dimensions, or its image is lacking.
    """
    settings = settings or RefineSettings()
    if settings.crf and (images is None or images.ndim != maps.ndim + 1 or images.shape[-2:] != maps.shape[-2:] or (maps.ndim == 3 and len(images) != len(maps))):
        raise ValueError(f"refine: images must be given with crf, [B, C, H, W] or [C, H, W] of the maps' size, got {None if images is None else list(images.shape)} "
                         f"for maps {list(maps.shape)}.")
    if maps.ndim not in (2, 3):
        raise ValueError(f"refine: maps must be [B, H, W] or [H, W], got {list(maps.shape)}.")
    if not maps.is_floating_point():
        raise TypeError(f"refine: maps must be float in [0, 1], got {maps.dtype}. Divide a 0 … 255 map by 255.")
    values = maps.detach().to("cpu", torch.float32).numpy()
    pixels = images.detach().to("cpu", torch.float32).numpy() if settings.crf else None
    if maps.ndim == 2:
        return torch.from_numpy(_refine_one(values, settings, pixels))
    regions = np.zeros(values.shape, dtype=np.float32)
    for index, one in enumerate(values):
        regions[index] = _refine_one(one, settings, None if pixels is None else pixels[index])
    return torch.from_numpy(regions)


def component_boxes(region: Tensor) -> list[tuple[int, int, int, int]]:
    """Bounding boxes of the connected components, largest component first.

    Args:
        region: Region; pixels above zero belong to it. [H, W]

    Returns:
        (top, left, bottom, right) in pixels, the last two exclusive.
    """
    labels, _ = ndimage.label(region.detach().cpu().numpy() > 0, structure=_NEIGHBOURS)
    return [_box(part) for part in _largest_first(labels)]


def two_means_threshold(values: np.ndarray) -> float:
    """Boundary between the two clusters of k-means (k = 2) on scalars, started at the least and the largest value.

    Lloyd's iterations on sorted scalars; deterministic. Values above the boundary are the upper cluster.
    """
    ordered = np.sort(values, axis=None).astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    boundary = (ordered[0] + ordered[-1]) / 2
    for _ in range(100):
        split = int(np.searchsorted(ordered, boundary, side="right"))
        if split in (0, len(ordered)):
            break
        moved = (sums[split] / split + (sums[-1] - sums[split]) / (len(ordered) - split)) / 2
        if moved == boundary:
            break
        boundary = moved
    return float(boundary)


def _refine_one(values: np.ndarray, settings: RefineSettings, image: np.ndarray | None) -> np.ndarray:
    """One map, and its image where the field needs it. float32 [H, W] → float32 [H, W]"""
    empty = np.zeros_like(values)
    if not values.size:
        return empty
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):  # min and max are NaN where any value is
        raise ValueError("refine: maps must be finite, got NaN or infinity. The localizer failed on this image; try another one or float32.")
    if low < -_SLACK or high > 1 + _SLACK:
        raise ValueError(f"refine: maps must be in [0, 1], got {low:.3g} … {high:.3g}. Apply a sigmoid or rescale.")
    if high - low < _FLAT or high < settings.min_peak or high <= 0:
        return empty
    if settings.crf:
        drawn = dense_crf(values, image)
        share = float((drawn >= 0.5).mean())
        values = drawn if 0 < share < 1 else values
    mask = _cut(values, settings)
    if settings.fill:
        mask = ndimage.binary_fill_holes(mask)
    mask = _keep_components(mask, settings)
    if settings.blur is not None:
        return _blurred(mask, settings.blur)
    return np.where(mask, values.clip(0, 1) if settings.soft else np.float32(1), np.float32(0))


def _cut(values: np.ndarray, settings: RefineSettings) -> np.ndarray:
    """Pixels of the region, by value. float32 [H, W] → bool [H, W]"""
    if settings.method == "kmeans":
        return values > two_means_threshold(values)
    if settings.method == "otsu":
        return values >= otsu(values)
    return values >= settings.threshold if settings.threshold > 0 else values > 0


def _blurred(mask: np.ndarray, share: float) -> np.ndarray:
    """The region with a soft rim; faint tails are cut, so that it ends somewhere. bool [H, W] → float32 [H, W]"""
    soft = ndimage.gaussian_filter(mask.astype(np.float32), share * float(np.sqrt(mask.size)), mode="nearest")
    return np.where(soft >= _TAIL, soft.clip(0, 1), np.float32(0)).astype(np.float32)


def _keep_components(mask: np.ndarray, settings: RefineSettings) -> np.ndarray:
    """Drop small components, keep the largest, replace them by boxes. bool [H, W] → bool [H, W]"""
    if settings.components is None and settings.expand is None and not settings.min_area:
        return mask
    labels, count = ndimage.label(mask, structure=_NEIGHBOURS)
    if not count:
        return mask
    kept = np.zeros_like(mask)
    least = settings.min_area * mask.size
    for part in _largest_first(labels)[: settings.components]:
        if part[0] < least:
            break
        if settings.expand is None:
            kept |= labels == part[1]
        else:
            top, left, bottom, right = _scaled(_box(part), settings.expand, mask.shape)
            kept[top:bottom, left:right] = True
    return kept


def _largest_first(labels: np.ndarray) -> list[tuple[int, int, tuple[slice, slice]]]:
    """(area, label, slices) of every component, by area, then by position."""
    areas = np.bincount(labels.ravel())
    parts = [(int(areas[index + 1]), index + 1, where) for index, where in enumerate(ndimage.find_objects(labels))]
    return sorted(parts, key=lambda part: (-part[0], part[1]))


def _box(part: tuple[int, int, tuple[slice, slice]]) -> tuple[int, int, int, int]:
    rows, columns = part[2]
    return rows.start, columns.start, rows.stop, columns.stop


def _scaled(box: tuple[int, int, int, int], factor: float, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box scaled about its centre, rounded to pixels and clipped to the image."""
    edges = []
    for start, stop, limit in ((box[0], box[2], shape[0]), (box[1], box[3], shape[1])):
        centre, half = (start + stop) / 2, (stop - start) * factor / 2
        edges.append((max(0, int(np.floor(centre - half + 0.5))), min(limit, int(np.floor(centre + half + 0.5)))))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]
