"""How images are read: one frozen dataclass, stored in every run and used again later."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import DataError

INTENSITIES = ("auto", "percentile", "minmax")
AXES = (0, 1, 2)
_AXIS_WORDS = {"sagittal": 0, "coronal": 1, "axial": 2, "x": 0, "y": 1, "z": 2}
ORIENTATIONS = ("canonical", "stored")
ASPECTS = ("pad", "stretch", "crop")


@dataclass(frozen=True)
class ReadSettings:
    """How a file becomes an image in [0, 1].

    Attributes:
        intensity: How stored values become [0, 1].
            "auto": 8-bit values / 255 as they are; CT (DICOM modality CT, or a volume that reaches below -500) by the header's window,
            else by centre 40, width 400 HU; other DICOM by the header's window where there is one; all else as "percentile".
            "percentile": 0.5 … 99.5 % of the values of the image, or of the volume a NIfTI slice belongs to.
            "minmax": lowest to highest value of the same.
            "window=C,W": C - W/2 to C + W/2 in stored units after the rescale slope and intercept (HU for CT).
            Values outside are clipped. MONOCHROME1 and MINISWHITE images are inverted after it.
        slice_axis: Axis of a volume that its slices are perpendicular to, after orientation: 2 (axial in canonical orientation), 1
            (coronal), 0 (sagittal). The words, and "z", "y", "x", are understood too.
        orientation: "canonical" turns NIfTI slices to radiological view (anterior or superior up, the patient's left at image right)
            and applies the EXIF orientation of photographs; "stored" leaves the stored order.
        aspect: How an image of another shape meets `size`: "pad" (zeros around; the border's width tells the shape of the scan, which may
            differ by hospital and diagnosis), "stretch", or "crop" (centre). "pad" and "crop" use the pixel spacing where it is given.
        size: (height, width) in pixels of what `read_image` returns; None for that of the file.

    Raises:
        DataError: a value is none of these.
    """

    intensity: str = "auto"
    slice_axis: int = 2
    orientation: str = "canonical"
    aspect: str = "pad"
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "slice_axis", _AXIS_WORDS.get(self.slice_axis, self.slice_axis))
        if isinstance(self.size, int) and not isinstance(self.size, bool):
            object.__setattr__(self, "size", (self.size, self.size))
        elif self.size is not None:
            object.__setattr__(self, "size", tuple(self.size))
        self.window  # noqa: B018  (checks the text)
        for name, known in (("slice_axis", AXES), ("orientation", ORIENTATIONS), ("aspect", ASPECTS)):
            if getattr(self, name) not in known:
                raise DataError(f"read settings: {name} must be {' | '.join(map(str, known))}, got {getattr(self, name)!r}.")
        if self.size is not None and not (len(self.size) == 2 and all(isinstance(edge, int) and 0 < edge <= 8192 for edge in self.size)):
            raise DataError(f"read settings: size must be (height, width) in 1 … 8192 pixels, got {self.size!r}.")

    @property
    def axis(self) -> str:
        """The slice axis as a letter, as in `Record.frame`."""
        return "xyz"[self.slice_axis]

    @property
    def window(self) -> tuple[float, float] | None:
        """(centre, width) of "window=C,W"; None for the other ways."""
        if self.intensity in INTENSITIES:
            return None
        name, _, numbers = self.intensity.partition("=") if isinstance(self.intensity, str) else ("", "", "")
        try:
            centre, width = (float(number) for number in numbers.split(","))
        except ValueError:
            centre, width = math.nan, math.nan
        if name != "window" or not (math.isfinite(centre) and math.isfinite(width) and width > 0):
            raise DataError(f"read settings: intensity must be auto | percentile | minmax | window=C,W with a width W above 0, got {self.intensity!r}. "
                            "For example window=40,400 (soft tissue) or window=-600,1500 (lung).")
        return centre, width

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in runs and caches."""
        values = asdict(self)
        values["size"] = None if self.size is None else list(self.size)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReadSettings:
        """From `to_dict`; fields that are left out have their defaults.

        Raises:
            DataError: a name is unknown, which a newer version may have written.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise DataError(f"read settings: {unknown[0]!r} is not known; known are {', '.join(sorted(known))}. Was it written by a newer version of mwm?")
        return cls(**dict(values))

    def differences(self, stored: ReadSettings | Mapping[str, Any]) -> list[str]:
        """One sentence per field that differs from the settings a run or cache was made with; none where all agree.

        Args:
            stored: Those settings, or their `to_dict`.
        """
        stored = stored if isinstance(stored, ReadSettings) else ReadSettings.from_dict(stored)
        return [
            f"read settings: {field.name} is {getattr(self, field.name)!r} now and was {getattr(stored, field.name)!r} when this was made: "
            "the images differ from those it knows."
            for field in fields(self)
            if getattr(self, field.name) != getattr(stored, field.name)
        ]
