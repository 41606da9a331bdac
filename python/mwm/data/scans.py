"""The small set of real scans that the package ships."""

from __future__ import annotations

from pathlib import Path

from mwm.data.errors import DataError


def demo_folder() -> Path:
    """Folder of the shipped scans: index.csv, images, masks and ATTRIBUTION.md (CC BY).

    Raises:
        DataError: the installation lacks them.
    """
    folder = Path(__file__).resolve().parents[1] / "demo_data"
    if not (folder / "index.csv").is_file():
        raise DataError("demo: the shipped scans are missing from this installation. Install the package again.")
    return folder
