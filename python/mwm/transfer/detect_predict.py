"""Objects of new images by a trained detector: COCO JSON, and pictures of what was found where asked for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mwm import view
from mwm.data import DataError, ReadSettings, Record, SkippedFiles, read_image, read_list
from mwm.data.masks import stem_of
from mwm.train.export import Encoder, full_model, head_keys, refuse_larger
from mwm.transfer.coco_metrics import pycocotools
from mwm.transfer.config import TransferError
from mwm.transfer.detect import build_detector, detect
from mwm.transfer.detect_images import Scene, SceneBatches, read_scenes
from mwm.transfer.detect_results import draw
from mwm.transfer.fit import pick_device
from mwm.transfer.labelled import Case
from mwm.transfer.results import new_results, open_results
from mwm.transfer.stored import read_model, read_weights
from mwm.view.contours import PREDICTED_RGB


class ObjectFinder:
    """A trained detector of a folder of results.

    Args:
        results: Folder that `mwm finetune --task detect` wrote.
        device: auto | cpu | cuda | cuda:N

    Attributes:
        classes: Names; category k of a result is class k - 1.
        settings: How images are read.

    Raises:
        TransferError: the folder holds no such network, or it is damaged.
    """

    def __init__(self, results: str | Path, device: str = "auto") -> None:
        pycocotools()
        self.stored = read_model(results)
        if self.stored.task != "detect":
            raise TransferError(f"predict: RESULTS must be of task detect, got {self.stored.task}. Give another folder.")
        masks, width = self.stored.facts.get("masks"), self.stored.facts.get("width")
        if not isinstance(masks, bool) or not isinstance(width, int) or not 16 <= width <= 1024:
            raise TransferError(f"predict: model.json of {Path(results).name} must tell masks and width of the detector, got {masks!r} and {width!r}. Run mwm finetune again.")
        self.classes, self.preprocessing = self.stored.classes, self.stored.preprocessing
        self.settings, self.device = ReadSettings.from_dict(self.preprocessing.read), pick_device(device)
        weights = read_weights(results)
        refuse_larger(self.stored.encoder, self.preprocessing.channels, weights)
        plain = full_model(self.stored.encoder, self.preprocessing.channels, 1)
        encoder = Encoder(plain, self.stored.encoder, head_keys(self.stored.encoder, plain), (), self.preprocessing)
        self.model = build_detector(encoder, len(self.classes), masks=masks, width=width)
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise TransferError(f"predict: the weights of {Path(results).name} do not fit {self.stored.encoder}. Use the timm or torchvision version that wrote them, or run "
                                "mwm finetune again.") from error
        self.model.to(self.device, memory_format=torch.channels_last).eval()

    def __call__(self, records: Sequence[Record], skipped: SkippedFiles | None = None, *, batch_size: int = 16, workers: int = 0,
                 strict: bool = False) -> Iterator[tuple[Scene, list[dict[str, Any]]]]:
        """Images that can be read, in order, each with its COCO results (image_id 1) in pixels of the stored image, best first.

        Args:
            records: Images.
            skipped: Takes the files that cannot be read.
            batch_size: Images at once.
            workers: Threads that read; 0 = one per CPU, at most 8.
            strict: Raise at an unreadable file.
        """
        for first in range(0, len(records), batch_size):
            cases = [Case(record, -1, "", "") for record in records[first : first + batch_size]]
            scenes, bad = read_scenes(cases, None, self.preprocessing, strict=strict, workers=workers)
            for name, reason in bad if skipped is not None else ():
                skipped.add(name, reason)
            if not scenes:
                continue
            batches = SceneBatches(list(scenes.values()), self.classes, self.preprocessing, self.device, masks=False)
            rows = detect(self.model, batches, batch_size)
            for number, scene in enumerate(batches.scenes, 1):
                yield scene, [row | {"image_id": 1} for row in rows if row["image_id"] == number]


def predict_objects(results: str | Path, images: str | Path | Sequence[Record], out: str | Path, *, overlays: bool = False, least_score: float = 0.05,
                    split: str | None = None, batch_size: int = 16, workers: int = 0, device: str = "auto", strict: bool = False, overwrite: bool = False,
                    progress: bool = True) -> Path:
    """Write the objects of images into a folder.

    predictions.json is a COCO data set whose annotations carry scores: images (id, file_name, width, height), categories, annotations (bbox x, y, w, h in
    pixels of the stored image, score; segmentation as RLE where masks were learnt, which then gives the area). overlays/ holds, where asked for, a picture per image.

    Args:
        results: Folder that `mwm finetune --task detect` wrote.
        images: Folder, glob, list, index CSV, or records.
        out: New folder.
        overlays: Draw what was found.
        least_score: Detections below are left out.
        split: Only this split of an index CSV.
        batch_size: Images per step.
        workers: Threads that read; 0 = one per CPU, at most 8.
        device: auto | cpu | cuda | cuda:N
        strict: Raise at an unreadable image instead of leaving it out.
        overwrite: Replace a folder that an earlier call made.
        progress: Show a bar.

    Returns:
        `out`.

    Raises:
        TransferError, DataError: the network or the images cannot be used; the message says what to do.
        FileExistsError: `out` exists.
        UnreadableImage: with `strict`.
    """
    out = Path(out)
    if not 0 <= least_score <= 1:
        raise TransferError(f"predict: least_score must be in [0, 1], got {least_score!r}.")
    open_results(out, overwrite=overwrite, command="predict")
    finder = ObjectFinder(results, device)
    records = list(read_list(images, split=split, settings=finder.settings))
    if any(Path(record.name).is_absolute() or ".." in Path(record.name).parts for record in records):
        raise DataError("predict: names of images must be relative paths inside their folder, got others. Pass a folder or a list.")
    skipped, stems = SkippedFiles(), Counter(stem_of(record.name) for record in records)
    content: dict[str, list[dict[str, Any]]] = {"images": [], "categories": [{"id": k, "name": name} for k, name in enumerate(finder.classes, 1)], "annotations": []}
    with new_results(out) as folder:
        bar = tqdm(total=len(records), desc="objects", unit="image", leave=False, disable=not progress)
        for number, (scene, rows) in enumerate(finder(records, skipped, batch_size=batch_size, workers=workers, strict=strict), 1):
            rows = [row for row in rows if row["score"] >= least_score]
            height, width = scene.placing.stored
            content["images"].append({"id": number, "file_name": scene.case.record.name, "width": width, "height": height})
            for row in rows:
                area = float(pycocotools().mask.area(row["segmentation"])) if "segmentation" in row else row["bbox"][2] * row["bbox"][3]
                content["annotations"].append(row | {"id": len(content["annotations"]) + 1, "image_id": number, "area": area, "iscrowd": 0})
            if overlays:
                image = read_image(scene.case.record, replace(finder.settings, size=None)).numpy()
                whole, name = scene.case.record.name, stem_of(scene.case.record.name)
                if scene.case.record.frame or stems[name] > 1:  # a.png beside a.jpg
                    name = whole.replace("#", "_")
                view.save(draw(image, rows, PREDICTED_RGB, edge=max(height, width, 288)), folder / "overlays" / f"{name}.png")
            bar.update()
        bar.close()
        if not content["images"]:
            raise TransferError(f"predict: IMAGES must hold readable images, got {len(records)} that are not. The first: {next(iter(skipped))[1]}")
        (folder / "predictions.json").write_text(json.dumps(content))
        skipped.write(folder / "skipped.csv")
        facts = {"task": "detect", "method": "prediction", "images": len(content["images"]), "objects": len(content["annotations"]), "skipped": len(skipped)}
        (folder / "metrics.json").write_text(json.dumps(facts, indent=2) + "\n")
    return out
