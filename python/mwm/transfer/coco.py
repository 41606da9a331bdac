"""COCO JSON in and out: read without trust, masks as run lengths."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mwm.data.limits import MAX_FILES, MAX_LIST_BYTES, MAX_PIXELS
from mwm.data.table import inside
from mwm.transfer.coco_metrics import pycocotools
from mwm.transfer.config import TransferError

Rle = dict[str, Any]
"""A mask as COCO writes it: {"size": [height, width], "counts": text}, column by column."""


@dataclass(frozen=True)
class CocoImage:
    """One image of a COCO file and its objects.

    Attributes:
        file: Path relative to the images' folder.
        size: (height, width) as the file says, pixels.
        split, patient: Where the file says them, else "".
        labels: Class name of each object.
        boxes: x0, y0, x1, y1. float64 [N, 4]
        masks: One per object, or None where an object has none.
        crowd: Whether an object is a region of many, which is neither learnt nor counted.
    """

    file: str
    size: tuple[int, int]
    split: str
    patient: str
    labels: tuple[str, ...]
    boxes: NDArray
    masks: tuple[Rle | None, ...]
    crowd: tuple[bool, ...]


def encode(mask: NDArray) -> Rle:
    """A mask as run lengths. bool [H, W] -> RLE"""
    rle = pycocotools().mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(edge) for edge in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode(rle: Rle) -> NDArray:
    """Run lengths as a mask. RLE -> bool [H, W]"""
    height, width = rle["size"]
    runs = _runs(rle["counts"]) or []
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def read_coco(path: Path, images: Path) -> list[CocoImage]:
    """Read a COCO file.

    Args:
        path: The JSON: images (id, file_name, width, height, perhaps split and patient), annotations (image_id, category_id, bbox x, y, w, h,
            perhaps segmentation as polygons or RLE, iscrowd), categories (id, name).
        images: Folder that file names are relative to and must stay in.

    Returns:
        Its images in the file's order.

    Raises:
        TransferError: the file is no COCO JSON, an id occurs twice or is unknown, a number is not finite, or a mask does not fit its image.
        DataError: a file name leaves the folder.
    """
    content = _load(path)
    tables = {}
    for key in ("images", "annotations", "categories"):
        rows = content.get(key)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise TransferError(f"finetune: {path.name} must be a COCO file with the lists images, annotations and categories, got none named {key}.")
        if len(rows) > MAX_FILES:
            raise TransferError(f"finetune: {path.name} must have at most {MAX_FILES:,} {key}, got {len(rows):,}. Split it.")
        tables[key] = _by_id(rows, key, path.name)
    names = {}
    for key, row in tables["categories"].items():
        if not isinstance(row.get("name"), str) or not row["name"].strip() or row["name"] in names.values():
            raise TransferError(f"finetune: categories of {path.name} must have names, each another, got {row.get('name')!r} for id {key}.")
        names[key] = row["name"]
    objects: dict[Any, list[dict[str, Any]]] = {key: [] for key in tables["images"]}
    for key, row in tables["annotations"].items():
        if not _is_id(row.get("image_id")) or row["image_id"] not in objects:
            raise TransferError(f"finetune: annotations of {path.name} must name images of the file, got image_id {row.get('image_id')!r} (annotation {key}).")
        if not _is_id(row.get("category_id")) or row["category_id"] not in names:
            raise TransferError(f"finetune: annotations of {path.name} must name categories of the file, got category_id {row.get('category_id')!r} (annotation {key}).")
        objects[row["image_id"]].append(row)
    root = images.resolve()
    seen: dict[str, Any] = {}
    result = []
    for key, row in tables["images"].items():
        image = _image(row, objects[key], names, f"{path.name}, image {key}", root)
        if image.file in seen:
            raise TransferError(f"finetune: images of {path.name} must be other files each, got one file for the ids {seen[image.file]!r} and {key!r}. Remove one.")
        seen[image.file] = key
        result.append(image)
    return result


def _load(path: Path) -> Mapping[str, Any]:
    def refuse(word: str) -> None:
        raise TransferError(f"finetune: {path.name} must hold finite numbers, got {word}. Repair or remove that annotation.")

    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise TransferError(f"finetune: {path.name} must have at most {MAX_LIST_BYTES // 2**20} MiB, got {path.stat().st_size // 2**20}. Split it.")
        content = json.loads(path.read_bytes().decode("utf-8-sig"), parse_constant=refuse)
    except OSError as error:
        raise TransferError(f"finetune: {path.name} cannot be read ({error.strerror}). Check the path.") from error
    except TransferError:
        raise
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
        raise TransferError(f"finetune: {path.name} must be JSON in UTF-8, got something else ({type(error).__name__}).") from error
    if not isinstance(content, dict):
        raise TransferError(f"finetune: {path.name} must be a COCO file with the lists images, annotations and categories, got another JSON value.")
    return content


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _by_id(rows: list[dict[str, Any]], key: str, name: str) -> dict[Any, dict[str, Any]]:
    table: dict[Any, dict[str, Any]] = {}
    for row in rows:
        number = row.get("id")
        if not _is_id(number):
            raise TransferError(f"finetune: {key} of {name} must have an id, got {number!r}.")
        if number in table:
            raise TransferError(f"finetune: ids of {key} of {name} must each occur once, got {number!r} twice. Give every one its own.")
        table[number] = row
    return table


def _image(row: dict[str, Any], objects: Sequence[dict[str, Any]], names: Mapping[Any, str], where: str, root: Path) -> CocoImage:
    file, width, height = row.get("file_name"), row.get("width"), row.get("height")
    if not isinstance(file, str) or not file:
        raise TransferError(f"finetune: {where}: file_name must be a path, got {file!r}.")
    file = inside(file, where, root)
    if not all(isinstance(edge, int) and not isinstance(edge, bool) and edge > 0 for edge in (width, height)) or width * height > MAX_PIXELS:
        raise TransferError(f"finetune: {where}: width and height must be pixels, {MAX_PIXELS:,} at most in all, got {width!r} x {height!r}.")
    size = (height, width)
    boxes, masks = [], []
    for item in objects:
        at = f"{where}, annotation {item['id']}"
        box = item.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(is_number(v) for v in box)):
            raise TransferError(f"finetune: {at}: bbox must be four finite numbers x, y, width, height, got {str(box)[:60]}.")
        boxes.append((box[0], box[1], box[0] + box[2], box[1] + box[3]))
        shape = item.get("segmentation")
        masks.append(_mask(shape, size, at) if shape else None)
    text = lambda key: str(row[key]).strip() if row.get(key) is not None else ""  # noqa: E731
    return CocoImage(file, size, text("split"), text("patient"), tuple(names[item["category_id"]] for item in objects),
                     np.array(boxes, np.float64).reshape(-1, 4), tuple(masks), tuple(bool(item.get("iscrowd")) for item in objects))


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of floats
        return False


def _mask(shape: Any, size: tuple[int, int], where: str) -> Rle:
    """A segmentation as RLE. Run lengths are counted here before the C code of pycocotools, which trusts them, sees them."""
    height, width = size
    tools = pycocotools().mask
    if isinstance(shape, list):
        if not all(isinstance(ring, list) and len(ring) >= 6 and len(ring) % 2 == 0 and all(is_number(v) for v in ring) for ring in shape):
            raise TransferError(f"finetune: {where}: a polygon must be a list of at least three finite points x, y, got another.")
        rings = [np.clip(np.array(ring, np.float64).reshape(-1, 2), 0, (width, height)).ravel().tolist() for ring in shape]
        rle = tools.merge(tools.frPyObjects(rings, height, width))
        return {"size": [height, width], "counts": rle["counts"].decode("ascii")}
    if not (isinstance(shape, dict) and shape.get("size") == [height, width]):
        raise TransferError(f"finetune: {where}: segmentation must be polygons or RLE of the image's {height} x {width} pixels, got another.")
    counts = shape.get("counts")
    runs = _runs(counts) if isinstance(counts, str) else counts
    if not (isinstance(runs, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in runs) and sum(runs) == height * width):
        raise TransferError(f"finetune: {where}: run lengths of a segmentation must add up to {height} x {width} pixels, got others.")
    rle = tools.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _runs(text: str) -> list[int] | None:
    """COCO's compressed run lengths as numbers: 5 bits a character from 48 on, the sixth says that more follow; differences from the run before the last."""
    runs: list[int] = []
    value, shift = 0, 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return runs if not shift else None


def to_xywh(box: NDArray) -> list[float]:
    """x0, y0, x1, y1 as COCO's x, y, width, height with hundredths of pixels."""
    x0, y0, x1, y1 = (float(v) for v in box)
    return [round(x0, 2), round(y0, 2), round(x1 - x0, 2), round(y1 - y0, 2)]
