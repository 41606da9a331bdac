"""Boxes and masks of objects from a pre-trained encoder: Mask R-CNN, trained and measured by COCO's AP. The test split is read once, at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mwm.data import ReadSettings
from mwm.train.export import Encoder
from mwm.transfer.augment import Augment
from mwm.transfer.coco_metrics import average_precision, detection_metrics, match, pycocotools
from mwm.transfer.config import FinetuneConfig, TransferError
from mwm.transfer.detect_data import check_objects, detection_records, read_detection
from mwm.transfer.detect_images import SceneBatches, coco_results, read_scenes
from mwm.transfer.detect_model import Detector, total_loss
from mwm.transfer.detect_objects import coco_truth
from mwm.transfer.detect_results import write_detection
from mwm.transfer.fit import autocast, fit, pick_device
from mwm.transfer.images import epoch_rows
from mwm.transfer.labelled import lone_patients
from mwm.transfer.prepare import few_labels, refuse_leaks
from mwm.transfer.probe import recalibrate_batchnorm
from mwm.transfer.pyramid import pyramid_groups, pyramid_of
from mwm.transfer.start import open_start
from mwm.transfer.tasks import state_file

_JUDGED = 30  # detections per image that the choice of the epoch looks at


def run(config: FinetuneConfig, out: Path, command: str | None) -> None:
    """Train a detector on an encoder, measure it and write the results into `out`; see `mwm.transfer.finetune`."""
    began = time.perf_counter()
    pycocotools()  # missed now rather than after the training
    device = pick_device(config.device)
    start = open_start(config, lambda settings: detection_records(config, settings))
    settings = ReadSettings.from_dict(start.preprocessing.read)
    data, describe = read_detection(config, settings)
    data = replace(data, notes=(*start.notes, *data.notes))
    scenes, skipped = read_scenes(data.cases, describe, start.preprocessing, strict=config.strict, workers=config.workers, progress=config.progress)
    if not scenes:
        raise TransferError(f"finetune: DATA must hold readable images, got {len(data.cases)} that are not. The first: {next(iter(skipped))[1]}")
    pixels = {name: scene.image for name, scene in scenes.items()}
    data = data.keep(scenes)
    data = replace(data, notes=(*data.notes, *refuse_leaks(data, settings, allow=config.allow_leak, workers=config.workers)))
    data = few_labels(data, config)
    data, masks = check_objects(data, scenes, masks=config.detect_masks)
    data = replace(data, notes=(*data.notes, *lone_patients(data)))
    start = start.fed(pixels, data.of("train"))
    sets = {split: SceneBatches([scenes[case.record.name] for case in data.of(split)], data.classes, start.preprocessing, device, masks=masks)
            for split in ("train", "val", "test")}
    size = min(config.batch_size, len(sets["train"]))
    if size < 2:
        raise TransferError(f"finetune: train must hold at least two images, got {len(sets['train'])}.")
    if config.progress:
        counts = ", ".join(f"{len(s)} {name}" for name, s in sets.items())
        print(f"{start.name}: {'boxes and masks' if masks else 'boxes'} of {', '.join(data.classes)}; {counts} images")
        for note in data.notes:
            print(f"note: {note}")
    encoder = start.encoder(1)
    torch.manual_seed(config.seed)
    model = build_detector(encoder, len(data.classes), masks=masks, width=config.detect_width, frozen=config.detect_norm == "frozen")
    model.to(device, memory_format=torch.channels_last)
    if model.frozen:
        recalibrate_batchnorm(model.encoder, (images for images, _ in sets["train"].batches(size)))
    truths = {split: coco_truth([scene.objects for scene in sets[split].scenes], [case.record.name for case in data.of(split)], data.classes, masks=masks)
              for split in ("val", "test")}
    augment = Augment(config.crop, config.flip, config.seed)
    fitted = fit(model, lambda epoch: sets["train"].batches(size, order=epoch_rows(len(sets["train"]), size, seed=config.seed, epoch=epoch).tolist(), augment=augment, epoch=epoch),
                 lambda network, batch: total_loss(network(*batch)), lambda network: _judge(network, sets["val"], truths["val"], config, device),
                 groups=pyramid_groups(model.encoder, model.heads, config.lr, config.layer_decay, config.weight_decay), config=config,
                 per_epoch=len(sets["train"]) // size, device=device, state=state_file(out), better="val_score", ids=sets["train"].ids)
    results = {split: detect(model, sets[split], config.batch_size, config.precision) for split in ("val", "test")}
    figures = {split: detection_metrics(truths[split], results[split], [case.patient for case in data.of(split)] if data.patients_known else None, masks=masks,
                                        rounds=config.bootstrap, seed=config.seed) for split in results}
    write_detection(out, config, encoder, data, model, fitted, truths["test"], results["test"], figures, skipped, sets["test"].scenes,
                    seconds=time.perf_counter() - began, command=command)


def build_detector(encoder: Encoder, classes: int, *, masks: bool, width: int, frozen: bool = False) -> Detector:
    """A detector on the maps of an encoder, sized for the images of its run.

    Args:
        encoder: A loaded encoder.
        classes: Number of classes, background not counted.
        masks: Whether to learn masks.
        width: Channels of the feature pyramid and the heads.
        frozen: Keep the running statistics of the encoder's batch norms.
    """
    return Detector(pyramid_of(encoder, least_stride=4), classes, tuple(encoder.preprocessing.size), masks=masks, width=width, frozen=frozen)


@torch.no_grad()
def detect(model: Detector, batches: SceneBatches, size: int, precision: str = "fp32", *, most: int = 100) -> list[dict[str, Any]]:
    """COCO results of all scenes in pixels of their stored images; images are numbered from 1.

    Args:
        model: In eval mode.
        batches: Scenes on the model's device.
        size: Images at once.
        precision: fp32, bf16 or fp16.
        most: Detections per image, the best ones.
    """
    results: list[dict[str, Any]] = []
    for first in range(0, len(batches), size):
        rows: Sequence[int] = range(first, min(first + size, len(batches)))
        with autocast(precision, batches.device):
            found = model(batches.batch(list(rows))[0])
        for row, detections in zip(rows, found, strict=True):
            results += coco_results({key: value[:most] for key, value in detections.items()}, batches.scenes[row].placing, row + 1)
    return results


def _judge(model: nn.Module, batches: SceneBatches, truth: dict[str, Any], config: FinetuneConfig, device: torch.device) -> dict[str, float]:
    """Loss and AP of the val split, and the score that chooses the epoch.

    The score is the mean of box and mask AP less a thousandth of the loss. AP is what the task is about, while the loss of a detector, made of
    sampled proposals, soon rises as the scores grow sharper; as long as AP is 0 a falling loss still counts as progress.
    """
    total, seen = torch.zeros((), device=device), 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # proposals are sampled: the same draws every epoch
        for images, targets in batches.batches(config.batch_size):
            with autocast(config.precision, device):
                total += total_loss(model(images, targets)) * len(images)
            seen += len(images)
    loss = float(total) / seen
    found = detect(model, batches, config.batch_size, config.precision, most=_JUDGED)
    scores = {}
    for kind, name in (("bbox", "val_box_ap"), ("segm", "val_mask_ap"))[: 2 if model.masks else 1]:
        by_class = [average_precision(row[0])[0].mean() for row in match(truth, found, kind, areas=("all",))]
        scores[name] = float(np.nanmean(by_class))
    return {"val_loss": loss, **scores, "val_score": float(np.mean(list(scores.values()))) - 1e-3 * loss}
