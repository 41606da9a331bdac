"""How good the regions of a study were: what cross-fitting and shuffling wrote down about them, by data set and fold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COLUMNS = ("data_set", "fold", "regions", "kind", "dice", "missed", "empty", "overlap", "images")


def region_facts(out: str | Path) -> list[dict[str, Any]]:
    """Facts of every folder OUT/regions/DATA_SET/FOLD/NAME that has some.

    Args:
        out: Folder of the study.

    Returns:
        By `COLUMNS`: mean Dice of cross-fitted regions against the masks, share of images whose region misses (Dice below 0.1), share of empty regions, and, of
        shuffled ones, the mean Dice between an image's own region and the one it got; None where it does not apply.
    """
    rows = []
    for path in sorted(Path(out).glob("regions/*/*/*/regions.json")):
        data, fold, name = path.parts[-4:-1]
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        source = ((stored.get("meta") or {}).get("source") or {}) if isinstance(stored, dict) else {}
        if source and fold.isdigit():
            held = {key: source.get(key) for key in COLUMNS[3:]}
            if held["empty"] is not None:
                held["empty"] = held["empty"] / max(1, source.get("regions") or 1)  # written down as a number of images
            rows.append({"data_set": data, "fold": int(fold), "regions": name, **held})
    return rows
