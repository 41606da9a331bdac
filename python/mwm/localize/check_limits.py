"""From the figures of `mwm localize check` to a verdict: the limits, why they are what they are, and how they are told beside the figures.

None of them comes from labels. They lie between the known extremes of two figures: equal maps have correlation 1 and mass shift 0; maps that have nothing to do with each other
correlate by about 0 and have a mass shift of 1/3 (values spread evenly over 0 … 1) up to 1 - p (regions that cover a share p of the image).

* `apart` 0.35 is what unrelated maps reach. From there on the text changed the map, however alike the shapes: a map that is merely fainter has lost half of its mass.
* `shift` 0.05: a twentieth of the mass moved, too little to call it another place. `same` 0.9 with less than `apart` is the known failure: one shape for every text.
* `differs` 0.7 with `moved` 0.1: at most half of the variance is shared (0.7² = 0.49), and the mass went elsewhere.
* `centre` 0.8: two thirds of the variance (0.8² = 0.64) are those of a Gaussian in the middle. `noise` 0.5: less than a quarter of the variance is repeated under another seed.
* `margin` 0.05: another text must change a map by more than another seed, and than other words for the same; by a figure that is seen in print.
* `steady` 0.8: in other words for the same, two thirds of the variance stay. This and the margin are what random weights do not keep: of 50 checks of CLIPs with random weights
  14 passed before other words were asked, none since. A small CLIP that was trained on captions keeps its map of "glioma" in other words (correlation 1.00, mass shift 0.03) and
  changes it for "sitting on a chair" (0.69, 0.49).
* `peak` 0.1 is the least peak of a region (`RefineSettings.min_peak`); `silent` 0.9 leaves one map in ten before a prompt counts as finding nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class CheckLimits:
    """From figures to a verdict. An absent or random text must give another map; a neutral text, the middle and another seed can only weaken a pass.

    Attributes:
        same: Correlation from which two maps are the same, if their mass shift is below `apart` too.
        shift: Mass shift below which two maps are the same whatever their correlation.
        differs: Correlation up to which two maps differ, if their mass shift is at least `moved`.
        moved: Least mass shift of maps that differ by place.
        apart: Mass shift from which two maps differ whatever their correlation.
        centre: Correlation with the middle from which a map is suspected to be the prior.
        noise: Correlation of two seeds below which a map is mostly noise.
        margin: The prompt's map must correlate with itself under another seed by this much more than with the other text's map, and another text must shift it by this much
            more than the same in other words.
        steady: Correlation with the map of the same in other words below which the map hangs on the words, if their mass shift is at least `moved`.
        peak: Largest value below which a map shows nothing.
        silent: Share of images with such maps from which the prompt finds nothing.

    Raises:
        ValueError: a limit is no number in [0, 1].
    """

    same: float = 0.9
    shift: float = 0.05
    differs: float = 0.7
    moved: float = 0.1
    apart: float = 0.35
    centre: float = 0.8
    noise: float = 0.5
    margin: float = 0.05
    steady: float = 0.8
    peak: float = 0.1
    silent: float = 0.9

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"check: limit {name} must be in [0, 1], got {value!r}.")

    @classmethod
    def changed(cls, texts: Sequence[str]) -> CheckLimits:
        """The limits with some of them changed.

        Args:
            texts: NAME=VALUE each.

        Raises:
            ValueError: a text is no NAME=VALUE, there is no such limit, or its value is out of range.
        """
        names, given = [one.name for one in fields(cls)], {}
        for text in texts:
            name, _, value = text.partition("=")
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if name.strip() not in names or math.isnan(number):
                raise ValueError(f"check: --limit must be NAME=VALUE with one of {', '.join(names)}, got {text!r}. For example --limit same=0.95.")
            given[name.strip()] = number
        return cls(**given)

    def needed(self, kind: str) -> str:
        """What the figures of a comparison must be for nothing to be said against them, in words.

        Args:
            kind: neutral, absent, random, reworded, seed or centre.
        """
        if kind in ("absent", "random"):
            return f"shift >= {self.apart:g}, or >= {self.moved:g} with correlation <= {self.differs:g}"
        if kind == "neutral":
            return f"shift >= {max(self.shift, self.apart):g}, or >= {self.shift:g} with correlation < {self.same:g}"
        if kind == "reworded":
            return f"shift < {self.moved:g}, or correlation >= {self.steady:g}"
        return f"correlation >= {self.noise:g}" if kind == "seed" else f"correlation < {self.centre:g}"

    def failing(self) -> str:
        """From where on the map of an absent or random text counts as the same, in words."""
        return (f"shift < {self.shift:g}, or < {self.apart:g} with correlation >= {self.same:g} or not {self.margin:g} below that of two seeds, "
                f"or not {self.margin:g} above that of other words")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
