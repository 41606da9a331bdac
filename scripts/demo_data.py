"""Choose and write the small set of real scans that the package ships.

    python scripts/demo_data.py --data DIR

DIR holds the sets with their index.csv. Only rows under CC BY 3.0 or 4.0 and only of the val and test splits are taken, so
that no shipped scan trained the `tiny` localizer (it saw train splits). The choice is deterministic.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections import defaultdict
from hashlib import blake2b
from pathlib import Path

from PIL import Image

TARGET = Path(__file__).resolve().parents[1] / "python" / "mwm" / "demo_data"
EDGE = 224
QUALITY = 85
SETS = {
    "brain_mri": {"glioma": 18, "meningioma": 16, "pituitary_tumor": 16},
    "chest_ct": {"normal": 16, "malignant": 16, "benign": 10},
    "chest_xray": {"bacterial_pneumonia": 80, "viral_pneumonia": 80},
}
SHORT = {"brain_mri": "mri", "chest_ct": "ct", "chest_xray": "xray"}
COLUMNS = ("file", "split", "label", "patient", "mask", "source", "licence")


def free(row: dict[str, str]) -> bool:
    """Whether image and mask are CC BY, without share-alike or non-commercial terms."""
    return row["licence"].startswith("CC BY ") and "SA" not in row["licence"] and "NC" not in row["licence"]


def chosen(rows: list[dict[str, str]], wanted: int) -> list[dict[str, str]]:
    """Rows spread over as many patients as possible: one of each patient, then a second of each, …"""
    by_patient: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        by_patient[row["patient"]].append(row)
    order = sorted(by_patient, key=lambda p: blake2b(p.encode()).digest())
    for patient in by_patient.values():
        patient.sort(key=lambda r: blake2b(r["file"].encode()).digest())
    turns = [by_patient[p][turn] for turn in range(max(map(len, by_patient.values()))) for p in order if turn < len(by_patient[p])]
    return turns[:wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    written = []
    for name, labels in SETS.items():
        folder = TARGET / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with open(data / name / "index.csv", newline="", encoding="utf-8") as file:
            rows = [r for r in csv.DictReader(file) if r["split"] in ("val", "test") and free(r)]
        picked = [row for label, wanted in labels.items() for row in chosen([r for r in rows if r["label"] == label], wanted)]
        picked.sort(key=lambda r: r["file"])
        patients: dict[str, str] = {}
        for number, row in enumerate(picked):
            image = Image.open(data / name / row["file"]).convert("L")
            scale = min(1.0, EDGE / max(image.size))
            size = tuple(max(1, round(edge * scale)) for edge in image.size)
            stem = f"{SHORT[name]}_{number:03d}"
            image.resize(size, Image.Resampling.LANCZOS).save(folder / f"{stem}.jpg", quality=QUALITY, optimize=True)
            mask = ""
            if row["mask"] and (name == "brain_mri" or number % 12 == 0):
                mask = f"{name}/{stem}_mask.png"
                drawn = Image.open(data / name / row["mask"]).convert("L").resize(size, Image.Resampling.BOX).point(lambda v: 255 * (v >= 128))
                drawn.convert("1").save(TARGET / mask, optimize=True)
            patient = patients.setdefault(row["patient"], f"{SHORT[name]}-p{len(patients):03d}")
            written.append((f"{name}/{stem}.jpg", row["split"], row["label"], patient, mask, row["source"], row["licence"]))
    with open(TARGET / "index.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *written])
    total = sum(p.stat().st_size for p in TARGET.rglob("*") if p.is_file())
    print(f"{len(written)} scans, {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
