"""Objects of an image: boxes checked, instances cut out of a mask, everything in pixels of the stored image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mwm.data import ReadSettings, match_size, read_record_mask
from mwm.transfer.coco import CocoImage, Rle, decode, encode, is_number, to_xywh
from mwm.transfer.config import TransferError
from mwm.transfer.labelled import Case

OBJECT = "object"  # the class of objects for which no label is given
MAX_OBJECTS = 1000
_CONNECTED = np.ones((3, 3), int)  # pixels that touch at a corner belong together


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Attributes:
        size: (height, width) of the stored image.
        names: Class of each.
        boxes: x0, y0, x1, y1; inside the image, with an area. float64 [N, 4]
        masks: One per object, or None where an object has none.
        crowd: Whether an object is a region of many: neither learnt nor counted.
        clipped: Boxes that reached beyond the image and were cut.
        maskless: Boxes of the list that hold no pixel of the mask.
    """

    size: tuple[int, int]
    names: tuple[str, ...]
    boxes: NDArray
    masks: tuple[Rle | None, ...]
    crowd: tuple[bool, ...]
    clipped: int = 0
    maskless: int = 0


def components(mask: NDArray) -> list[NDArray]:
    """Connected parts of a mask, diagonal neighbours together, in the order of their first pixel row by row. bool [H, W] -> [bool [H, W], …]"""
    from scipy import ndimage

    numbered, count = ndimage.label(mask, _CONNECTED)
    return [numbered == k for k in range(1, count + 1)]


def extent(mask: NDArray) -> NDArray:
    """Box of a mask: first row and column, last row and column plus one. bool [H, W] -> x0, y0, x1, y1, float64 [4]"""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)


def overlap(a: NDArray, b: NDArray) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    inner = np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).prod()
    return float(inner / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner))


def instances(mask: NDArray, boxes: NDArray) -> list[NDArray]:
    """The part of a mask that belongs to each box.

    Boxes and components are paired, best overlap first. A component that is left joins the box whose pixels it completes: where the extent of
    both fits that box better than before (an object that fell apart when its mask was shrunk). Others belong to no box: a list may leave
    specks out. A box without a component takes the pixels inside it.

    Args:
        mask: bool [H, W]
        boxes: x0, y0, x1, y1. [N, 4]

    Returns:
        One mask per box, bool [H, W]; all False where the box holds no pixel.
    """
    parts = components(mask)
    extents = [extent(part) for part in parts]
    pairs = sorted(((overlap(boxes[b], extents[c]), b, c) for b in range(len(boxes)) for c in range(len(parts))), key=lambda row: (-row[0], row[1], row[2]))
    owner: dict[int, int] = {}
    taken: set[int] = set()
    for value, b, c in pairs:
        if value >= 0.3 and b not in taken and c not in owner:
            owner[c] = b
            taken.add(b)
    result = [np.zeros_like(mask) for _ in boxes]
    for c, b in owner.items():
        result[b] |= parts[c]
    for c in range(len(parts)):
        for b in range(len(boxes)) if c not in owner else ():
            joined = result[b] | parts[c]
            if result[b].any() and overlap(boxes[b], extent(joined)) > overlap(boxes[b], extent(result[b])):
                result[b] = joined
                break
    for b, box in enumerate(boxes):
        if not result[b].any():
            x0, y0, x1, y1 = np.floor(box[0]), np.floor(box[1]), np.ceil(box[2]), np.ceil(box[3])
            window = np.s_[int(y0) : int(y1), int(x0) : int(x1)]
            result[b][window] = mask[window]
    return result


def objects_of_case(case: Case, size: tuple[int, int], settings: ReadSettings, label: str) -> Objects:
    """Objects of a row of an index CSV: its boxes, with the instances of its mask; without boxes, the components of the mask.

    Args:
        case: With `boxes` and `mask`.
        size: (height, width) of the stored image.
        settings: How the image is read, for volumes.
        label: Class of objects for which the boxes give none, "" where not known.

    Raises:
        TransferError: a box is not four finite numbers, has no area, or lies outside the image.
        DataError: the mask does not fit the image.
    """
    where = case.record.name
    mask = None
    if case.mask is not None:
        mask = match_size(read_record_mask(case.mask, case.record, settings), size, case.mask.name).numpy() >= 0.5
    if not case.boxes:
        parts = [] if mask is None else components(mask)
        _check_count(len(parts), where)
        boxes = np.array([extent(part) for part in parts]).reshape(-1, 4)
        return Objects(size, (label or OBJECT,) * len(parts), boxes, tuple(encode(part) for part in parts), (False,) * len(parts))
    _check_count(len(case.boxes), where)
    names, rows = [], []
    for k, box in enumerate(case.boxes):
        values = box.get("bbox_xyxy")
        if not (isinstance(values, list) and len(values) == 4 and all(is_number(v) for v in values)):
            raise TransferError(f"finetune: {where}, box {k}: bbox_xyxy must be four finite numbers x0, y0, x1, y1, got {str(values)[:60]}.")
        rows.append(values)
        names.append(str(box.get("label") or label or OBJECT).strip())
    boxes, clipped = check_boxes(np.array(rows, np.float64), size, [f"{where}, box {k}" for k in range(len(rows))])
    if mask is None:
        return Objects(size, tuple(names), boxes, (None,) * len(names), (False,) * len(names), clipped)
    found = instances(mask, boxes)
    keep = [k for k, part in enumerate(found) if part.any()]
    return Objects(size, tuple(names[k] for k in keep), boxes[keep], tuple(encode(found[k]) for k in keep), (False,) * len(keep), clipped, len(found) - len(keep))


def objects_of_coco(image: CocoImage, size: tuple[int, int]) -> Objects:
    """Objects of an image of a COCO file.

    Args:
        image: From `read_coco`.
        size: (height, width) of the stored image.

    Raises:
        TransferError: the file says another size, or a box has no area or lies outside the image.
    """
    if image.size != tuple(size):
        raise TransferError(f"finetune: {image.file} must be {image.size[1]} x {image.size[0]} pixels as the COCO file says, got {size[1]} x {size[0]}. Correct width and height, "
                            "or give the images that were annotated.")
    _check_count(len(image.labels), image.file)
    boxes, clipped = check_boxes(image.boxes, size, [f"{image.file}, object {k}" for k in range(len(image.labels))])
    masks = tuple(None if rle is None or not decode(rle).any() else rle for rle in image.masks)
    return Objects(size, image.labels, boxes, masks, image.crowd, clipped)


def check_boxes(boxes: NDArray, size: tuple[int, int], where: Sequence[str]) -> tuple[NDArray, int]:
    """Boxes cut to their image.

    Args:
        boxes: x0, y0, x1, y1. float64 [N, 4]
        size: (height, width) of the image.
        where: What to call each in a message.

    Returns:
        Boxes inside the image, float64 [N, 4], and how many were cut.

    Raises:
        TransferError: a box has no area, or lies outside.
    """
    height, width = size
    inner = np.clip(boxes, 0, (width, height, width, height))
    for box, cut, name in zip(boxes, inner, where, strict=True):
        if not (box[2] > box[0] and box[3] > box[1]):
            raise TransferError(f"finetune: {name}: a box must have an area, got {_numbers(box)}. Correct or remove it.")
        if not (cut[2] > cut[0] and cut[3] > cut[1]):
            raise TransferError(f"finetune: {name}: a box must lie in its image of {width} x {height} pixels, got {_numbers(box)}, which is wholly outside. Correct or remove it.")
    return inner, int((inner != boxes).any(1).sum())


def coco_truth(objects: Sequence[Objects], files: Sequence[str], classes: Sequence[str], *, masks: bool) -> dict[str, Any]:
    """A COCO data set of images, numbered from 1 in the order given, and categories, numbered from 1.

    Args:
        objects: Per image.
        files: Name of each image.
        classes: Names of the categories; objects of others are left out.
        masks: Whether every object has a mask, which then gives its area; else the box does. Crowds may lack one.
    """
    number = {name: k + 1 for k, name in enumerate(classes)}
    images = [{"id": k + 1, "file_name": file, "width": item.size[1], "height": item.size[0]} for k, (file, item) in enumerate(zip(files, objects, strict=True))]
    annotations = []
    for k, item in enumerate(objects):
        for name, box, rle, crowd in zip(item.names, item.boxes, item.masks, item.crowd, strict=True):
            if name not in number:  # a class of crowds alone, which is neither learnt nor judged
                continue
            row = {"id": len(annotations) + 1, "image_id": k + 1, "category_id": number[name], "bbox": to_xywh(box), "iscrowd": int(crowd)}
            if masks:
                rle = rle or encode(_filled(box, item.size))  # only a crowd may lack one here
                row |= {"segmentation": rle, "area": int(decode(rle).sum())}
            else:
                row["area"] = row["bbox"][2] * row["bbox"][3]
            annotations.append(row)
    return {"images": images, "annotations": annotations, "categories": [{"id": k, "name": name} for name, k in number.items()]}


def _filled(box: NDArray, size: tuple[int, int]) -> NDArray:
    mask = np.zeros(size, bool)
    mask[int(box[1]) : int(np.ceil(box[3])), int(box[0]) : int(np.ceil(box[2]))] = True
    return mask


def _numbers(box: NDArray) -> str:
    return "[" + ", ".join(f"{v:g}" for v in box) + "]"


def _check_count(count: int, where: str) -> None:
    if count > MAX_OBJECTS:
        raise TransferError(f"finetune: {where} must have at most {MAX_OBJECTS} objects, got {count}. Is its mask noise?")
