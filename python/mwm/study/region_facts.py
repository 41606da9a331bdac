"""How good the regions of a study were: what cross-fitting and shuffling wrote down about them, by data set and fold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mwm.study.cell_files import read_facts

STORED = "region_facts"
"""Folder of facts that came with an archive, in place of regions that were made elsewhere."""
COLUMNS = ("data_set", "fold", "regions", "kind", "dice", "missed", "empty", "overlap", "images")


def region_facts(out: str | Path) -> list[dict[str, Any]]:
    """Facts of every folder OUT/regions/DATA_SET/FOLD/NAME that has some, and of regions that stayed elsewhere.

    Args:
        out: Folder of the study.

    Returns:
        By `COLUMNS`: mean Dice of cross-fitted regions against the masks, share of images whose region misses (Dice below 0.1), share of empty regions, and, of
        shuffled ones, the mean Dice between an image's own region and the one it got; None where it does not apply.
    """
    rows, root = {}, Path(out)
    for path in sorted(root.glob(f"{STORED}/*/*/*.json")):
        stored = read_facts(path.parent, path.name)
        if path.parts[-2].isdigit() and stored:
            key = (path.parts[-3], int(path.parts[-2]), path.stem)
            rows[key] = {**dict(zip(COLUMNS[:3], key, strict=True)), **{name: stored.get(name) for name in COLUMNS[3:]}}
    for path in sorted(root.glob("regions/*/*/*/regions.json")):
        data, fold, name = path.parts[-4:-1]
        source = ((read_facts(path.parent, path.name).get("meta") or {}).get("source") or {})
        if source and fold.isdigit():
            held = {key: source.get(key) for key in COLUMNS[3:]}
            if held["empty"] is not None:
                held["empty"] = held["empty"] / max(1, source.get("regions") or 1)  # written down as a number of images
            rows[data, int(fold), name] = {"data_set": data, "fold": int(fold), "regions": name, **held}
    return [rows[key] for key in sorted(rows)]
