"""Masks from a pre-trained encoder: training, and figures on the pixels of the stored images. The test split is read once, at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mwm.data import ReadSettings
from mwm.transfer.augment import Augment
from mwm.transfer.config import FinetuneConfig, TransferError
from mwm.transfer.fit import fit, pick_device
from mwm.transfer.images import epoch_rows, step_size
from mwm.transfer.labelled import Labelled, lone_patients, read_labelled
from mwm.transfer.mask_metrics import image_figures, mask_summary, pointing_hit
from mwm.transfer.prepare import few_labels, refuse_leaks
from mwm.transfer.pyramid import mask_network, pyramid_groups
from mwm.transfer.segment_images import MaskedSet, decode_masked, read_settings, to_source
from mwm.transfer.segment_masks import MaskClasses, mask_classes, read_truth, with_masks
from mwm.transfer.segment_results import HeldLabels, write_segmentation
from mwm.transfer.start import open_start
from mwm.transfer.tasks import state_file


def run(config: FinetuneConfig, out: Path, command: str | None) -> None:
    """Train a mask head and its encoder, measure them and write the results into `out`; see `mwm.transfer.finetune`."""
    began = time.perf_counter()
    device = pick_device(config.device)
    start = open_start(config)
    settings = read_settings(start.preprocessing)
    data = read_labelled(config.data, need="mask", labels=config.label_names, masks=config.masks, val_share=config.val_share, test_share=config.test_share, seed=config.seed,
                         allow_leak=config.allow_leak, settings=settings)
    data = with_masks(config, replace(data, notes=(*start.notes, *data.notes)))
    if settings.aspect == "crop":
        data = replace(data, notes=(*data.notes, "Images are cropped to the shape that the network reads; what is cut off counts as background in the figures."))
    classes = mask_classes(config, data)
    decoded, skipped = decode_masked(data.cases, classes, start.preprocessing, strict=config.strict, workers=config.workers, progress=config.progress)
    if not decoded:
        raise TransferError(f"finetune: DATA must hold readable images, got {len(data.cases)} that are not. The first: {next(iter(skipped))[1]}")
    data, pixels = data.keep(decoded), {name: image.image for name, image in decoded.items()}
    data = replace(data, notes=(*data.notes, *refuse_leaks(data, settings, allow=config.allow_leak, workers=config.workers)))
    start = start.fed(pixels, data.of("train"))
    if config.label_fraction < 1:
        data = few_labels(data, config)
    sets = {split: MaskedSet(data.of(split), decoded, start.preprocessing, device) for split in ("train", "val", "test")}
    data = _checked(data, sets, classes)
    if config.progress:
        counts = ", ".join(f"{len(s)} {name}" for name, s in sets.items())
        print(f"{start.name}: masks of {', '.join(classes.names)}; {counts} images")
        for note in data.notes:
            print(f"note: {note}")
    encoder = start.encoder(1)
    torch.manual_seed(config.seed)
    network = mask_network(encoder, len(classes.names) + 1, width=config.head_width, norm=config.head_norm)
    network.to(device, memory_format=torch.channels_last)
    size = step_size(len(sets["train"]), config.batch_size)
    augment = Augment(config.crop, config.flip, config.seed)
    fitted = fit(network, lambda epoch: sets["train"].batches(size, rows=epoch_rows(len(sets["train"]), size, seed=config.seed, epoch=epoch), augment=augment, epoch=epoch),
                 lambda model, batch: mask_loss(model(batch[0]), batch[1]), lambda model: _judge(model, sets["val"], config.batch_size),
                 groups=pyramid_groups(network.encoder, network.head, config.lr, config.layer_decay, config.weight_decay), config=config,
                 per_epoch=len(sets["train"]) // size, device=device, state=state_file(out), ids=sets["train"].images.ids.tolist())
    unit = "mm" if all(d.spacing for split in ("val", "test") for d in sets[split].decoded) else "pixels"
    rows = {split: [_figures(sets[split], k, logits, classes, config, unit, settings) for k, logits in enumerate(predict_logits(network, sets[split], config.batch_size))]
            for split in ("val", "test")}
    figures = {split: mask_summary(rows[split], classes.names, [case.patient for case in data.of(split)] if data.patients_known else None,
                                   rounds=config.bootstrap, seed=config.seed) for split in rows}
    write_segmentation(out, config, encoder, data, classes, network, fitted, rows, figures, skipped, unit=unit, settings=settings,
                       seconds=time.perf_counter() - began, command=command)


def _checked(data: Labelled, sets: dict[str, MaskedSet], classes: MaskClasses) -> Labelled:
    """Refuses a training split that teaches nothing, and notes what a split lacks."""
    notes = []
    present = {split: set(torch.unique(masked.labels).tolist()) - {0} for split, masked in sets.items()}
    for k, name in enumerate(classes.names, 1):
        if k not in present["train"]:
            raise TransferError(f"finetune: masks of train must mark {name!r} somewhere, got none that does. Add such images, or leave the class out.")
        for split in ("val", "test"):
            if k not in present[split]:
                if not present[split]:
                    raise TransferError(f"finetune: masks of {split} must mark something, got only empty ones. Put other patients into {split}.")
                notes.append(f"No mask of {split} marks {name!r}.")
    lost = sum(d.lost for masked in sets.values() for d in masked.decoded)
    if lost:
        notes.append(f"{lost} masks mark nothing that the network's picture shows (too small, or cut off): they teach the background only. Larger images may help.")
    if len(sets["train"]) < 2:
        raise TransferError(f"finetune: train must hold at least two images, got {len(sets['train'])}.")
    return replace(data, notes=(*data.notes, *notes, *lone_patients(data)))


def mask_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over pixels plus 1 - soft Dice, the latter over the whole batch and the mean of the foreground classes.

    Dice over the batch (as nnU-Net does, Isensee et al. 2021) is defined for images with nothing to mark, too.

    Args:
        logits: float [B, K + 1, H, W]
        labels: int64 [B, H, W], 0 = background

    Returns:
        float32 scalar
    """
    logits = logits.float()
    overlap, total = _overlap(logits, labels)
    return F.cross_entropy(logits, labels) + 1 - _soft_dice(overlap, total)


def _overlap(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of p·t and of p + t of each foreground class. [K] each"""
    chances = torch.softmax(logits, 1)[:, 1:]
    truth = torch.stack([(labels == k).to(chances.dtype) for k in range(1, logits.shape[1])], 1)
    return (chances * truth).sum((0, 2, 3)), (chances + truth).sum((0, 2, 3))


def _soft_dice(overlap: Tensor, total: Tensor) -> Tensor:
    return ((2 * overlap + 1) / (total + 1)).mean()


def _judge(network: nn.Module, masked: MaskedSet, size: int) -> dict[str, float]:
    """Loss and mean Dice of images on the network's own pixels, in fp32 whatever the training is."""
    entropy, overlap, total, dice = 0.0, 0.0, 0.0, []
    for images, labels in masked.batches(size):
        logits = network(images)
        entropy = entropy + F.cross_entropy(logits, labels, reduction="sum")
        parts = _overlap(logits, labels)
        overlap, total = overlap + parts[0], total + parts[1]
        found, truth = logits.argmax(1) > 0, labels > 0
        right, marked = (found & (logits.argmax(1) == labels)).sum((1, 2)), found.sum((1, 2)) + truth.sum((1, 2))
        dice.append(torch.where(marked > 0, 2 * right / marked.clamp(min=1), 1.0))
    loss = entropy / masked.labels.numel() + 1 - _soft_dice(overlap, total)
    return {"val_loss": loss.item(), "val_dice": torch.cat(dice).mean().item()}


@torch.no_grad()
def predict_logits(network: nn.Module, masked: MaskedSet, size: int) -> Iterator[Tensor]:
    """Logits of each image in order, on the network's pixels, in fp32. float32 [K + 1, H, W] on the CPU"""
    network.eval()
    for images, _ in masked.batches(size):
        yield from network(images).cpu()


def source_labels(logits: Tensor) -> tuple[NDArray[np.uint8], NDArray]:
    """Labels, and how much more likely any foreground is than background (log odds). [K + 1, H, W] -> uint8 [H, W], float [H, W]"""
    return logits.argmax(0).to(torch.uint8).numpy(), (torch.logsumexp(logits[1:], 0) - logits[0]).numpy()


def _figures(masked: MaskedSet, k: int, logits: Tensor, classes: MaskClasses, config: FinetuneConfig, unit: str, settings: ReadSettings) -> dict[str, Any]:
    """Figures of one image on the pixels of the stored file."""
    decoded = masked.decoded[k]
    predicted, odds = source_labels(to_source(logits, decoded.stored, settings, decoded.spacing))
    truth = read_truth(masked.cases[k], classes, decoded.stored, settings)
    spacing = decoded.spacing if unit == "mm" else (1.0, 1.0)
    return image_figures(truth, predicted, len(classes.names), tolerance=config.surface_tolerance, spacing=spacing) | {
        "pointing": pointing_hit(truth > 0, odds), "truth_pixels": int((truth > 0).sum()), "predicted_pixels": int((predicted > 0).sum()),
        "truth": HeldLabels.of(truth), "predicted": HeldLabels.of(predicted)}
