"""How images are read: one frozen value that a run stores and later commands compare with their own."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from mwm.data.errors import DataError

ASPECTS = ("pad", "stretch", "crop")
ORIENTATIONS = ("canonical", "stored")


@dataclass(frozen=True)
class ReadSettings:
    """How a file becomes an image in [0, 1].

    Attributes:
        intensity: "auto", "percentile" (0.5–99.5 % of the image, or of its whole NIfTI volume), "minmax", or "window=C,W" (centre and width
            in stored units; Hounsfield units for CT). "auto": 8-bit images by their full range 0–255; DICOM by its own
            window where it names one; everything else by percentile.
        size: (height, width) in pixels of the result; None keeps the stored size.
        aspect: what happens to another aspect ratio: "pad" with black, "stretch", or "crop" to the centre.
        slice_axis: NIfTI axis that slices are taken along, 0–2 after orientation; 2 is axial in canonical orientation.
        orientation: NIfTI: "canonical" turns to the radiological view (patient's left on the image's right), "stored"
            leaves the array as it is.
        max_pixels: a file that declares more pixels per slice is refused before it is decoded.
    """

    intensity: str = "auto"
    size: tuple[int, int] | None = None
    aspect: str = "pad"
    slice_axis: int = 2
    orientation: str = "canonical"
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        if self.size is not None:
            size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
            if len(size) != 2 or any(int(edge) != edge or edge < 1 for edge in size):
                raise DataError(f"read: size must be (height, width) in pixels, got {self.size!r}. Give two positive whole numbers.")
            object.__setattr__(self, "size", (int(size[0]), int(size[1])))
        if self.intensity not in ("auto", "percentile", "minmax"):
            self.window()
        if self.aspect not in ASPECTS:
            raise DataError(f"read: aspect must be one of {', '.join(ASPECTS)}, got {self.aspect!r}.")
        if self.orientation not in ORIENTATIONS:
            raise DataError(f"read: orientation must be one of {', '.join(ORIENTATIONS)}, got {self.orientation!r}.")
        if self.slice_axis not in (0, 1, 2):
            raise DataError(f"read: slice_axis must be 0, 1 or 2, got {self.slice_axis!r}.")
        if self.max_pixels < 1:
            raise DataError(f"read: max_pixels must be positive, got {self.max_pixels}.")

    def window(self) -> tuple[float, float] | None:
        """(centre, width) of `window=C,W`, else None."""
        if self.intensity in ("auto", "percentile", "minmax"):
            return None
        number = r"([-+]?\d+(?:\.\d+)?)"
        match = re.fullmatch(rf"window={number},{number}", self.intensity.replace(" ", ""))
        if not match or float(match[2]) <= 0:
            raise DataError(f"read: intensity must be auto, percentile, minmax or window=C,W with W > 0, got {self.intensity!r}. "
                            "A lung window is window=-600,1500.")
        return float(match[1]), float(match[2])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON."""
        values = asdict(self)
        return {**values, "size": list(self.size) if self.size else None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ReadSettings:
        """Inverse of `to_dict`; unknown keys are refused."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise DataError(f"read: settings must be among {', '.join(sorted(known))}, got {', '.join(unknown)}.")
        return cls(**values)

    def differences(self, stored: ReadSettings) -> list[str]:
        """One sentence for each setting that differs from the stored one (the size and the limit aside)."""
        names = ("intensity", "aspect", "slice_axis", "orientation")
        return [f"{name} is {getattr(self, name)!r}, but the run was made with {getattr(stored, name)!r}; images will look different to the encoder."
                for name in names if getattr(self, name) != getattr(stored, name)]
