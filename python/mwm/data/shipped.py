"""The scans that the package ships."""

from __future__ import annotations

from pathlib import Path


def demo_folder() -> Path:
    """Folder of the shipped scans: `index.csv` in the schema of `mwm.data.table`, images, masks, `ATTRIBUTION.md`. `read_list` takes it as IMAGES."""
    return Path(__file__).resolve().parents[1] / "demo_data"
