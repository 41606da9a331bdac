"""The head of a CLIPSeg, trained on masks and prompts; CLIP itself stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mwm.data import ReadSettings, Record, SkippedFiles
from mwm.data.regions import RegionStore
from mwm.localize.clipseg import ClipsegLocalizer
from mwm.localize.train_data import Examples, epoch_order, read_batches, step_seed
from mwm.localize.training import KEY, Training


class HeadTrainee:
    """A CLIPSeg whose decoder learns; see `mwm.localize.train`."""

    kind, batch_size, lr = "head", 16, 1e-3

    def __init__(self, checkpoint: str | Path, revision: str | None, device: Any, offline: bool, prompts: list[str], absent: list[str], masks: RegionStore, settings: Any,
                 read: ReadSettings) -> None:
        self.localizer = ClipsegLocalizer(checkpoint, device, revision=revision, offline=offline)
        self.fingerprint, self.training = self.localizer.fingerprint, self.localizer.training
        self.model, self.prompts, self.absent, self.masks, self.settings, self.read = self.localizer.model, prompts, absent, masks, settings, read
        self.model.decoder.requires_grad_(True)
        self._start = deepcopy(self.model.decoder.state_dict())

    def check(self, examples: Examples) -> None:
        """Refuse images without a text, and texts that the model cannot read, before anything is trained."""
        lacking = sum(not examples.texts[record.id] for record in (*examples.train, *examples.val))
        if lacking and not self.prompts:
            raise ValueError(f"localize train: prompts must be given, got none for {lacking} images. Add --prompt or --prompt-set, or fill the column prompt of the CSV.")
        fitting = []
        for text in self.absent:
            try:
                self.localizer.encode([text])
                fitting.append(text)
            except ValueError:
                continue
        if not fitting and self.settings.absent_share:
            raise ValueError("localize train: absent must hold a text that the model can read, got none short enough. Give a shorter one.")
        self.absent = fitting
        for text in {*self.prompts, *(text for texts in examples.texts.values() for text in texts)}:
            self.localizer.encode([text])

    def parameters(self) -> list[nn.Parameter]:
        """Those of the decoder."""
        return list(self.model.decoder.parameters())

    def steps(self, count: int, batch_size: int) -> int:
        """All images, the last batch smaller."""
        return -(-count // batch_size)

    def weights(self) -> nn.Module:
        """The decoder."""
        return self.model.decoder

    def restore(self) -> None:
        """The decoder as it came."""
        self.model.decoder.load_state_dict(self._start)

    def losses(self, examples: Examples, part: str, epoch: int, batch_size: int, skipped: SkippedFiles, begin: int = 0) -> Iterator[tuple[Tensor, int, int]]:
        """Loss and number of images of each batch, and the place behind it; order, texts and whatever is drawn are a function of seed, epoch and place."""
        training, settings = part == "train", self.settings
        records = examples.train if training else examples.val
        order = epoch_order(len(records), training, settings.seed, epoch)
        self.model.decoder.train(training)
        batches = read_batches(records, order, batch_size, size=self.localizer.input_size, masks=self.masks, read=self.read, skipped=skipped, workers=settings.workers, begin=begin)
        for images, masks, rows, place in batches:
            seed = step_seed(settings.seed, epoch, place)
            texts, shown = self._texts(rows, examples, torch.Generator().manual_seed(seed))
            targets = masks.to(self.localizer.device) * shown.to(self.localizer.device)[:, None, None]
            torch.manual_seed(seed)
            with torch.set_grad_enabled(training):
                yield self._loss(images, texts, targets), len(rows), place
        self.model.decoder.eval()

    def _texts(self, rows: list[Record], examples: Examples, draw: torch.Generator) -> tuple[list[str], Tensor]:
        """A text for each image, and whether its mask applies. bool [B]"""
        texts, shown = [], torch.ones(len(rows), dtype=torch.bool)
        for index, record in enumerate(rows):
            offered = examples.texts[record.id] or self.prompts
            if self.absent and float(torch.rand((), generator=draw)) < self.settings.absent_share:
                offered, shown[index] = self.absent, False
            texts.append(offered[int(torch.randint(len(offered), (), generator=draw))])
        return texts, shown

    def _loss(self, images: Tensor, texts: list[str], targets: Tensor) -> Tensor:
        """Binary cross-entropy, plus 1 - Dice where there is something to find. [B, 3, H, W], B texts, [B, H, W] → []"""
        tokens, attention = self.localizer.encode(texts)
        with torch.autocast(self.localizer.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            logits = self.model(input_ids=tokens, attention_mask=attention, pixel_values=self.localizer.preprocess(images)).logits
        logits = logits.reshape(len(images), *logits.shape[-2:]).float()
        targets = F.interpolate(targets[:, None], logits.shape[-2:], mode="area")[:, 0]
        chances = torch.sigmoid(logits)
        dice = 1 - (2 * (chances * targets).sum((1, 2)) + 1) / (chances.sum((1, 2)) + targets.sum((1, 2)) + 1)
        return F.binary_cross_entropy_with_logits(logits, targets) + (dice * (targets.amax((1, 2)) > 0)).mean()

    def save(self, folder: Path, training: Training) -> None:
        """Model and processor, as the localizer clipseg reads them."""
        setattr(self.model.config, KEY, training.to_dict())
        self.model.save_pretrained(folder)
        self.localizer.processor.save_pretrained(folder)
