"""Make lung pseudo-masks of the chest CT slices: air threshold inside the body, components, closing.

`python scripts/tiny/pseudo_masks.py --data DIR --out OUT` writes `OUT/<name>.png` (0 air and tissue, 1 right lung, 2 left
lung; sides are the patient's), `OUT/index.csv` (file, split, kept, reason) and overlay sheets `OUT/sheet_<split>_<n>.png`
to look at. A slice whose mask fails a plausibility check is dropped, with its reason. The figure that `evaluate.py`
reports against these masks is agreement with this heuristic, not with a radiologist.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

RIGHT, LEFT = 1, 2
# Seen on the overlay sheets: leaks between the ribs, or a part of a lung missing. Ranges include both ends.
DROPPED_BY_EYE = {
    "benign": "69 77-79",
    "malignant": "41-43 60-79 84-119 127 132-137 139 141-143 167-171 177-179 183 192-258 282-285 301-320 323-327 329-351 374-394 400",
    "normal": "51 53 55 99-100 112 125-126 150 167-168 175 187 194-199 209 235-237 254-255 258",
}


def dropped_by_eye(name: str) -> bool:
    """Whether a slice, for example "iqoth_benign_069", is on the list."""
    _, label, number = name.split("_")
    spans = [[int(v) for v in span.split("-")] for span in DROPPED_BY_EYE.get(label, "").split()]
    return any(span[0] <= int(number) <= span[-1] for span in spans)


def disk(radius: int) -> np.ndarray:
    """Round structuring element. bool [2 radius + 1, 2 radius + 1]"""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return x * x + y * y <= radius * radius + 0.5


def big_parts(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Connected components of at least `pixels` pixels. bool [H, W]"""
    labels, n = ndimage.label(mask)
    if n == 0:
        return mask
    keep = np.concatenate([[False], ndimage.sum_labels(mask, labels, range(1, n + 1)) >= pixels])
    return keep[labels]


def tissue_of(image: np.ndarray) -> np.ndarray:
    """Where soft tissue or bone is. These windows clip most soft tissue to black and leave speckle: density counts. bool [H, W]"""
    speckle = ndimage.gaussian_filter((image > 25).astype(np.float32), 1.8)
    return big_parts((speckle > 0.2) | (ndimage.median_filter(image, 3) > 60), 90)


def spine_of(image: np.ndarray, tissue: np.ndarray) -> tuple[float, float]:
    """Centre (row, column) of the vertebra: the biggest bright part near the midline, else a guess from the body's box."""
    height, width = image.shape
    bright = ndimage.binary_opening(ndimage.median_filter(image, 3) > 150, disk(1))
    bright[int(0.86 * height) :] = False
    labels, _ = ndimage.label(bright)
    best, best_score = None, 0.0
    for k, box in enumerate(ndimage.find_objects(labels), start=1):
        part = labels[box] == k
        rows, columns = part.shape
        if part.sum() < 60 or columns > 0.5 * width or part.sum() / (rows * columns) < 0.2:
            continue
        y, x = np.nonzero(part)
        row, column = float(y.mean()) + box[0].start, float(x.mean()) + box[1].start
        if row > 0.78 * height:
            continue  # the wedge of the table
        score = part.sum() * np.exp(-(((column / width - 0.5) / 0.1) ** 2)) * np.clip((row / height - 0.25) / 0.25, 0.05, 1)
        if score > best_score:
            best, best_score = (row, column), float(score)
    if best is None:
        rows, columns = np.flatnonzero(tissue.mean(1) > 0.15), np.flatnonzero(tissue.any(0))
        if len(rows) == 0:
            return 0.6 * height, 0.5 * width
        best = (rows[0] + 0.68 * (rows[-1] - rows[0]), 0.5 * (columns[0] + columns[-1]))
    return best


def star(tissue: np.ndarray, seed: tuple[int, int], reach: float) -> tuple[np.ndarray, float]:
    """Region that rays from `seed` reach before they meet tissue; rays that slip between two ribs are interpolated.

    Returns:
        The region, bool [H, W], and the share of interpolated rays.
    """
    height, width = tissue.shape
    angles = np.linspace(0, 2 * np.pi, 256, endpoint=False)
    steps = np.arange(0, reach, 0.5)
    y = seed[0] + np.sin(angles)[:, None] * steps
    x = seed[1] + np.cos(angles)[:, None] * steps
    inside = (y >= 0) & (y <= height - 1) & (x >= 0) & (x <= width - 1)
    hit = tissue[np.clip(y.round().astype(int), 0, height - 1), np.clip(x.round().astype(int), 0, width - 1)] & inside
    radius = np.where(hit.any(1), steps[hit.argmax(1)], np.inf)
    window = np.stack([np.roll(radius, k) for k in range(-24, 25)])
    usual = np.quantile(window, 0.4, axis=0, method="lower")
    lost = ~np.isfinite(radius) | (radius > 1.22 * usual + 3)
    if lost.mean() > 0.6:
        return np.zeros_like(tissue), 1.0
    radius = np.interp(angles, angles[~lost], radius[~lost], period=2 * np.pi)
    grid_y, grid_x = np.mgrid[:height, :width]
    angle = np.arctan2(grid_y - seed[0], grid_x - seed[1]) % (2 * np.pi)
    limit = np.interp(angle, angles, radius, period=2 * np.pi)
    return np.hypot(grid_y - seed[0], grid_x - seed[1]) <= limit, float(lost.mean())


def lungs_of(image: np.ndarray) -> tuple[np.ndarray, str]:
    """Pseudo-mask and the reason why it is not usable ("" where it is).

    Args:
        image: One axial slice, radiological view. uint8 [H, W]

    Returns:
        uint8 [H, W] of 0, RIGHT, LEFT; the reason.
    """
    height, width = image.shape
    mask = np.zeros((height, width), np.uint8)
    tissue = tissue_of(image)
    row, middle = spine_of(image, tissue)
    grid_x = np.arange(width)[None].repeat(height, 0)
    distance = ndimage.distance_transform_edt(np.pad(~tissue, 1))[1:-1, 1:-1]
    for side, sign in ((RIGHT, -1), (LEFT, 1)):
        half = (grid_x - middle) * sign > 0
        region = np.zeros_like(tissue)
        inside = []
        for across in (0.09, 0.14, 0.19):
            for up in (0.26, 0.19, 0.12, 0.05):
                seed = (int(row - up * height), int(middle + sign * across * width))
                if not (0 <= seed[0] < height and 0 <= seed[1] < width) or distance[seed] < 4:
                    continue
                reached, lost = star(tissue, seed, 0.4 * width)
                if lost <= 0.32:
                    region |= reached
                    inside.append(seed)
        if not inside:
            return mask, "no seed whose rays find a chest wall"
        lung = ndimage.binary_opening(region & half & ~tissue, disk(4))
        labels, _ = ndimage.label(lung)
        kept = np.isin(labels, [labels[seed] for seed in inside if labels[seed]])
        closed = ndimage.binary_closing(np.pad(kept, 8), disk(4))[8:-8, 8:-8]
        mask[ndimage.binary_fill_holes(closed) & half] = side
    return mask, implausible(mask, tissue, middle)


def implausible(mask: np.ndarray, tissue: np.ndarray, middle: float) -> str:
    """Why a pair of lungs looks wrong, "" if it does not. mask uint8 [H, W], tissue bool [H, W]"""
    areas = {side: float((mask == side).mean()) for side in (RIGHT, LEFT)}
    if min(areas.values()) < 0.008:
        return f"a lung covers only {min(areas.values()):.3f} of the slice"
    if max(areas.values()) > 0.22 or max(areas.values()) > 2.4 * min(areas.values()):
        return f"the lungs cover {areas[RIGHT]:.3f} and {areas[LEFT]:.3f} of the slice"
    near = mask[:, max(0, int(middle) - 2) : int(middle) + 3] > 0
    rows = np.flatnonzero((mask > 0).any(1))
    if near.any(1).sum() > 0.45 * len(rows):
        return "the mediastinum is not visible between the lungs"
    for side in (RIGHT, LEFT):
        part = mask == side
        open_rows = 0
        for k in np.flatnonzero(part.any(1)):
            columns = np.flatnonzero(part[k])
            beyond = tissue[k, : columns[0]] if side == RIGHT else tissue[k, columns[-1] + 1 :]
            open_rows += not beyond.any()
        if open_rows > 0.35 * part.any(1).sum():
            return "a lung has no wall outside"
        y, x = np.nonzero(part)
        share = len(y) / ((np.ptp(y) + 1) * (np.ptp(x) + 1))
        if share < 0.4:
            return f"a lung fills only {share:.2f} of its box"
        if np.ptp(y) + 1 < 0.1 * mask.shape[0]:
            return "a lung is too short"
        if y.max() > 0.93 * mask.shape[0]:
            return "a lung reaches the lower border"
    return ""


def overlay(image: np.ndarray, mask: np.ndarray, dropped: bool, text: str) -> Image.Image:
    """Slice with the right lung red and the left lung green; a dropped one has a white frame; its name's tail. -> 160 x 160"""
    colour = np.repeat(image[..., None], 3, 2).astype(np.float32)
    for side, rgb in ((RIGHT, (255, 60, 60)), (LEFT, (60, 255, 60))):
        colour[mask == side] = 0.6 * colour[mask == side] + 0.4 * np.array(rgb, np.float32)
    if dropped:
        colour[:6] = colour[-6:] = colour[:, :6] = colour[:, -6:] = 255
    tile = Image.fromarray(colour.astype(np.uint8)).resize((160, 160))
    ImageDraw.Draw(tile).text((4, 2), text, fill=(255, 255, 0))
    return tile


def main() -> None:
    """Write the masks, the index and the sheets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds chest_ct/")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    root = arguments.data / "chest_ct"
    records = list(csv.DictReader((root / "index.csv").open()))
    sheets: dict[str, list[Image.Image]] = {}
    lines = []
    for record in records:
        image = np.asarray(Image.open(root / record["file"]).convert("L"))
        mask, reason = lungs_of(image)
        name = Path(record["file"]).stem
        if not reason and dropped_by_eye(name):
            reason = "looked wrong"
        Image.fromarray(mask).save(arguments.out / f"{name}.png")
        lines.append({"file": record["file"], "split": record["split"], "kept": int(not reason), "reason": reason})
        sheets.setdefault(record["split"], []).append(overlay(image, mask, bool(reason), name[6:]))
    with (arguments.out / "index.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["file", "split", "kept", "reason"])
        writer.writeheader()
        writer.writerows(lines)
    for split, tiles in sheets.items():
        for start in range(0, len(tiles), 70):
            sheet = Image.new("RGB", (10 * 160, 7 * 160))
            for k, tile in enumerate(tiles[start : start + 70]):
                sheet.paste(tile, (k % 10 * 160, k // 10 * 160))
            sheet.save(arguments.out / f"sheet_{split}_{start // 70}.png")
    kept = sum(line["kept"] for line in lines)
    print(f"{kept} of {len(lines)} slices kept; look at {arguments.out}/sheet_*.png", file=sys.stderr)


if __name__ == "__main__":
    main()
