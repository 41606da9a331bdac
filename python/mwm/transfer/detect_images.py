"""Images with their objects: decoded once, kept on the device, cropped and flipped together in whole batches; detections back in stored pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mwm.data import ReadSettings, SkippedFiles, UnreadableImage
from mwm.data.geometry import fit
from mwm.data.image import decode
from mwm.train.export import Preprocessing
from mwm.transfer.augment import Augment, move_boxes, warp
from mwm.transfer.coco import decode as decode_rle
from mwm.transfer.coco import to_xywh
from mwm.transfer.coco_metrics import pycocotools
from mwm.transfer.detect_objects import Objects
from mwm.transfer.images import LEVELS, refuse_beyond_memory, threads
from mwm.transfer.labelled import Case
from mwm.transfer.placing import Placing, placing

_LEAST_EDGE = 1.0  # pixels of the network's picture; smaller objects cannot be learnt
_LEAST_SHARE = 0.25  # an object of which a crop shows less is not learnt from that crop
_PASTE = 2**24  # pixels of masks that are pasted at once


@dataclass(frozen=True)
class Scene:
    """One image as a network sees it.

    Attributes:
        case: The image's row.
        image: int16 [C, H, W] in 0 … LEVELS.
        placing: Where the stored image lies in it.
        objects: In pixels of the stored image; None where none were asked for.
        boxes: Of the objects that can be learnt, in pixels of this picture. float32 [N, 4]
        names: Their classes.
        masks: uint8 [N, H, W]; None where an object has no mask.
    """

    case: Case
    image: Tensor
    placing: Placing
    objects: Objects | None
    boxes: Tensor
    names: tuple[str, ...]
    masks: Tensor | None


def read_scenes(cases: Sequence[Case], describe: Callable[[Case, tuple[int, int]], Objects] | None, preprocessing: Preprocessing, *, strict: bool = False,
                workers: int = 0, progress: bool = False) -> tuple[dict[str, Scene], SkippedFiles]:
    """Decode images and objects once, at the run's size and intensities.

    Args:
        cases: What to read.
        describe: (case, (height, width) of the stored image) -> its objects; None reads none.
        preprocessing: Of the run.
        strict: Raise at an unreadable file instead of leaving it out.
        workers: Threads; 0 = one per CPU, at most 8.
        progress: Show a bar.

    Returns:
        Scenes by relative name, and the files that cannot be read.

    Raises:
        UnreadableImage: with `strict`.
        TransferError, DataError: objects that cannot be used, or images that do not fit into memory.
    """
    settings = replace(ReadSettings.from_dict(preprocessing.read), size=tuple(preprocessing.size))
    refuse_beyond_memory(len(cases), preprocessing)

    def read(case: Case) -> Scene | UnreadableImage:
        try:
            image, stored, spacing = decode(case.record, settings, channels=preprocessing.channels)
        except UnreadableImage as error:
            return error
        objects = None if describe is None else describe(case, stored)
        return _scene(case, (image.clamp(0, 1) * LEVELS).round().to(torch.int16), placing(stored, settings, spacing), objects, settings, spacing)

    scenes, skipped = {}, SkippedFiles()
    with ThreadPoolExecutor(threads(workers)) as pool:
        for case, found in zip(cases, tqdm(pool.map(read, cases), total=len(cases), desc="reading", unit="image", leave=False, disable=not progress), strict=True):
            if isinstance(found, UnreadableImage):
                if strict:
                    pool.shutdown(cancel_futures=True)
                    raise found
                skipped.add(case.record.name, str(found))
                continue
            scenes[case.record.name] = found
    return scenes, skipped


def _scene(case: Case, image: Tensor, place: Placing, objects: Objects | None, settings: ReadSettings, spacing: tuple[float, float] | None) -> Scene:
    if objects is None:
        return Scene(case, image, place, None, torch.zeros(0, 4), (), None)
    height, width = image.shape[1:]
    full = place.to_model(objects.boxes)
    boxes = np.clip(full, 0, (width, height, width, height))
    seen = ((boxes[:, 2:] - boxes[:, :2]) >= _LEAST_EDGE).all(1) & (_areas(boxes) >= _LEAST_SHARE * _areas(full))
    keep = [k for k in range(len(boxes)) if seen[k] and not objects.crowd[k]]
    masks = None
    if all(objects.masks[k] is not None for k in keep):
        masks = torch.zeros(len(keep), height, width, dtype=torch.uint8)
        for n, k in enumerate(keep):
            soft = fit(torch.from_numpy(decode_rle(objects.masks[k]).astype(np.float32))[None], settings, spacing)[0]
            # An object that shrinks below a pixel keeps its brightest pixels.
            masks[n] = soft >= min(0.5, max(1e-6, float(soft.max()) / 2))
    return Scene(case, image, place, objects, torch.from_numpy(boxes[keep].astype(np.float32)), tuple(objects.names[k] for k in keep), masks)


def _areas(boxes: NDArray) -> NDArray:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


class SceneBatches:
    """Batches of scenes of one size from the device.

    Args:
        scenes: In the order of their rows.
        classes: Names; labels count from 1 in this order, 0 is background.
        preprocessing: Of the run.
        device: Where images and masks stay.
        masks: Whether targets have masks.
    """

    def __init__(self, scenes: Sequence[Scene], classes: Sequence[str], preprocessing: Preprocessing, device: torch.device, *, masks: bool) -> None:
        self.scenes, self.device = list(scenes), device
        self.images = torch.stack([scene.image for scene in scenes]).to(device)
        self.ids = [scene.case.record.id for scene in scenes]
        # On the device once: made in every step they would make the host wait for it.
        self._mean, self._std = (torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        # Boxes stay on the host, where it is known without waiting which of them a crop still shows.
        self.boxes = [scene.boxes for scene in scenes]
        self.labels = [torch.tensor([classes.index(name) + 1 for name in scene.names], dtype=torch.int64) for scene in scenes]
        self.first = np.cumsum([0, *(len(scene.names) for scene in scenes)])
        self.masks = torch.cat([scene.masks for scene in scenes]).to(device) if masks else None

    def __len__(self) -> int:
        return len(self.scenes)

    def batch(self, rows: Sequence[int], augment: Augment | None = None, epoch: int = 0) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Normalised images float32 [B, C, H, W] and their targets, as `Detector` takes them.

        Args:
            rows: Which scenes.
            augment: Crops and flips, a pure function of (seed, epoch, id of the image).
            epoch: From 0.
        """
        images = self.images[torch.as_tensor(rows, device=self.device)].float() / LEVELS
        theta = augment.theta(epoch, [self.ids[k] for k in rows]) if augment is not None and augment.moves else None
        if theta is not None:
            images = warp(images, theta.to(self.device))
        targets = self._targets(rows, theta)
        return ((images - self._mean) / self._std).contiguous(memory_format=torch.channels_last), targets

    def _targets(self, rows: Sequence[int], theta: Tensor | None) -> list[dict[str, Tensor]]:
        size = (int(self.images.shape[2]), int(self.images.shape[3]))
        boxes, labels, places, owners = [], [], [], []
        for n, row in enumerate(rows):
            moved, keep = self.boxes[row], torch.ones(len(self.boxes[row]), dtype=torch.bool)
            if theta is not None and len(moved):
                full = (moved[:, 2:] - moved[:, :2]).prod(1) / (theta[n, 0, 0] * theta[n, 1, 1]).abs()
                moved = move_boxes(moved, theta[n], size)
                edges = moved[:, 2:] - moved[:, :2]
                keep = (edges >= _LEAST_EDGE).all(1) & (edges.prod(1) >= _LEAST_SHARE * full)
            boxes.append(moved[keep])
            labels.append(self.labels[row][keep])
            places.append(int(self.first[row]) + torch.nonzero(keep)[:, 0])
            owners.append(torch.full((int(keep.sum()),), n))
        counts = [len(part) for part in boxes]
        targets = [{"boxes": b, "labels": c} for b, c in zip(torch.cat(boxes).to(self.device).split(counts), torch.cat(labels).to(self.device).split(counts), strict=True)]
        if self.masks is not None:
            masks = self.masks[torch.cat(places).to(self.device)]
            if theta is not None and len(masks):
                masks = (warp(masks[:, None].float(), theta[torch.cat(owners)].to(self.device))[:, 0] >= 0.5).to(torch.uint8)
            for target, part in zip(targets, masks.split(counts), strict=True):
                target["masks"] = part
        return targets

    def batches(self, size: int, *, order: Sequence[int] | None = None, augment: Augment | None = None,
                epoch: int = 0) -> Iterator[tuple[Tensor, list[dict[str, Tensor]]]]:
        """Batches in the given order, else as listed; the last one may be smaller."""
        rows = list(range(len(self))) if order is None else list(order)
        for k in range(0, len(rows), size):
            yield self.batch(rows[k : k + size], augment, epoch)


def coco_results(detections: dict[str, Tensor], place: Placing, image_id: int) -> list[dict[str, Any]]:
    """Detections of one image as COCO results in pixels of the stored image, best first.

    Args:
        detections: As `Detector` gives them: boxes [D, 4], labels from 1 [D], scores [D], perhaps masks [D, 1, M, M].
        place: Of the image.
        image_id: Its number.
    """
    order = torch.argsort(detections["scores"], descending=True, stable=True)
    values = {key: detections[key][order] for key in detections}
    boxes, scores, labels = place.to_source(values["boxes"].cpu().numpy()), values["scores"].tolist(), values["labels"].tolist()
    masks = rle_masks(values["masks"][:, 0], values["boxes"], place) if "masks" in values else [None] * len(scores)
    rows = []
    for box, score, label, rle in zip(boxes, scores, labels, masks, strict=True):
        rows.append({"image_id": image_id, "category_id": label, "bbox": to_xywh(box), "score": round(score, 6)} | ({} if rle is None else {"segmentation": rle}))
    return rows


@torch.no_grad()
def rle_masks(masks: Tensor, boxes: Tensor, place: Placing) -> list[dict[str, Any]]:
    """Masks of boxes as run lengths on the pixels of the stored image.

    The value at a stored pixel is that of the mask at the same place of its box, bilinear between cells; one half and more is object.

    Args:
        masks: Probabilities on the cells of each box. [D, M, M]
        boxes: x0, y0, x1, y1 in pixels of the network's picture. [D, 4]
        place: Of the image.
    """
    (height, width), tools = place.stored, pycocotools().mask
    at = [(torch.arange(edge, device=boxes.device, dtype=torch.float32) + 0.5) * place.scale[axis] + place.offset[axis] for axis, edge in enumerate((height, width))]
    result: list[dict[str, Any]] = []
    step = max(1, _PASTE // (height * width))
    for k in range(0, len(boxes), step):
        x0, y0, x1, y1 = (edge[:, None] for edge in boxes[k : k + step].float().unbind(1))
        # Targets are cut out by torchvision's roi_align without `aligned`, which reads half a pixel to the right and below: the same half here.
        y = 2 * (at[0] - 0.5 - y0) / (y1 - y0).clamp(min=1e-6) - 1
        x = 2 * (at[1] - 0.5 - x0) / (x1 - x0).clamp(min=1e-6) - 1
        grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1)
        inside = ((at[0] > y0) & (at[0] < y1))[:, :, None] & ((at[1] > x0) & (at[1] < x1))[:, None, :]
        values = torch.nn.functional.grid_sample(masks[k : k + step, None].float(), grid, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]
        pasted = (values >= 0.5) & inside
        stack = np.asfortranarray(pasted.permute(1, 2, 0).to(torch.uint8).cpu().numpy())
        result += [{"size": [height, width], "counts": rle["counts"].decode("ascii")} for rle in tools.encode(stack)]
    return result
