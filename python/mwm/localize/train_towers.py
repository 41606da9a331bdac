"""The towers of a CLIP-like model of transformers, trained on captions with DHN-NCE."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mwm.data import ReadSettings, SkippedFiles
from mwm.localize.checkpoints import hub_answers, image_settings, quiet_transformers
from mwm.localize.dhn_nce import dhn_nce
from mwm.localize.presets import PRESETS, pinned
from mwm.localize.pretrained import read_pretrained
from mwm.localize.protocol import default_device
from mwm.localize.train_data import Examples, epoch_order, read_batches, step_seed
from mwm.localize.training import KEY, Training, training_from

_KINDS = {
    "clip": ("CLIPModel", "CLIPProcessor"),
    "siglip": ("SiglipModel", "SiglipProcessor"),
    "vision-text-dual-encoder": ("VisionTextDualEncoderModel", "VisionTextDualEncoderProcessor"),
}


def is_clip_like(checkpoint: str | Path, offline: bool = False, revision: str | None = None) -> bool:
    """Whether a checkpoint is of a type that `TowersTrainee` takes; False where its configuration cannot be read, which others then say.

    Raises:
        ValueError: it is a model of open_clip, which has no folder format that could be written.
    """
    known = PRESETS.get(str(checkpoint))
    source, revision, _ = pinned(checkpoint, known.localizer if known else "localize train", revision)
    source = str(Path(source).expanduser())
    if source.startswith("hf-hub:") or (Path(source) / "open_clip_config.json").is_file():
        raise ValueError(f"localize train: checkpoint must be a model of transformers, got {str(checkpoint)!r}, which is one of open_clip. "
                         "Give a CLIP, SigLIP or dual encoder in its format.")
    from transformers import PretrainedConfig

    try:
        with quiet_transformers(bars=False):
            found, _ = PretrainedConfig.get_config_dict(source, local_files_only=offline or Path(source).is_dir() or not hub_answers(), revision=revision)
    except (OSError, ValueError):
        return False
    return found.get("model_type") in _KINDS


class TowersTrainee:
    """A CLIP-like model of which both towers learn; see `mwm.localize.train`. Captions are cut to what the text tower reads, and their number is said."""

    kind, batch_size, lr, masks = "towers", 64, 1e-6, None

    def __init__(self, checkpoint: str | Path, revision: str | None, device: Any, offline: bool, settings: Any, read: ReadSettings) -> None:
        found = read_pretrained(checkpoint, "bottleneck", _KINDS, "openai/clip-vit-base-patch16", revision=revision, offline=offline)
        self.fingerprint, self.training = found.fingerprint, training_from(getattr(found.model.config, KEY, None), "localize train")
        self.device, self.settings, self.read = default_device(device), settings, read
        self.model, self.processor = found.model.to(self.device).requires_grad_(True), found.processor
        self.tokenizer = found.processor.tokenizer
        self._size, self._mean, self._std, _ = image_settings(found.processor.image_processor)
        config = self.model.config.text_config
        self._padded = config.model_type.startswith("siglip")  # trained on padded texts without a mask
        self._limit = min(int(getattr(config, "max_position_embeddings", 512)) - (2 if "roberta" in config.model_type else 0), int(self.tokenizer.model_max_length))
        self._start = deepcopy({name: value.cpu() for name, value in self.model.state_dict().items()})

    def check(self, examples: Examples) -> None:
        """Say how many captions are longer than the text tower reads; refuse too few images for a batch with negatives."""
        with quiet_transformers(bars=False):
            long = sum(len(self.tokenizer(text)["input_ids"]) > self._limit for texts in examples.texts.values() for text in texts)
        if long:
            warnings.warn(f"localize train: {long} captions are longer than the {self._limit} tokens that the model reads; the rest of them is cut off.", stacklevel=2)
        if min(len(examples.train), len(examples.val)) < 2:
            raise ValueError(f"localize train: at least 2 images must be there to learn from and 2 to validate on, got {len(examples.train)} and {len(examples.val)}. "
                             "Give more captions.")

    def parameters(self) -> list[nn.Parameter]:
        """All but temperature and bias of the model's own loss."""
        return [parameter for name, parameter in self.model.named_parameters() if not name.startswith("logit_")]

    def steps(self, count: int, batch_size: int) -> int:
        """A last batch of one image, which has no negatives, is left out."""
        return count // batch_size + (count % batch_size > 1)

    def weights(self) -> nn.Module:
        """The model."""
        return self.model

    def restore(self) -> None:
        """The model as it came."""
        self.model.load_state_dict(self._start)

    def losses(self, examples: Examples, part: str, epoch: int, batch_size: int, skipped: SkippedFiles, begin: int = 0) -> Iterator[tuple[Tensor, int, int]]:
        """Loss and number of images of each batch, and the place behind it; the order is a function of seed and epoch. Equal captions are no negatives of each other."""
        training, settings = part == "train", self.settings
        records = examples.train if training else examples.val
        order = epoch_order(len(records), training, settings.seed, epoch)
        self.model.train(training)
        batches = read_batches(records, order, max(2, batch_size), size=self._size, masks=None, read=self.read, skipped=skipped, workers=settings.workers, begin=begin)
        for images, _, rows, place in batches:
            if len(rows) < 2:
                continue
            texts = [examples.texts[record.id][0] for record in rows]
            same = torch.tensor([[a == b for b in texts] for a in texts], device=self.device)
            torch.manual_seed(step_seed(settings.seed, epoch, place))
            with torch.set_grad_enabled(training):
                yield dhn_nce(self.similarity(images, texts), temperature=settings.temperature, beta_image=settings.beta_image, beta_text=settings.beta_text,
                              same=same), len(rows), place
        self.model.eval()

    def similarity(self, images: Tensor, texts: list[str]) -> Tensor:
        """Cosines of images [B, 3, H, W] in [0, 1] and texts. [B, B]"""
        pixels = (images.to(self.device) - self._mean.to(self.device)) / self._std.to(self.device)
        padding = {"padding": "max_length"} if self._padded else {"padding": True}
        encoded = self.tokenizer(texts, return_tensors="pt", truncation=True, max_length=self._limit, **padding).to(self.device)
        kept = {"input_ids": encoded["input_ids"]} | ({} if self._padded else {"attention_mask": encoded["attention_mask"]})
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            seen, said = _embedding(self.model.get_image_features(pixel_values=pixels)), _embedding(self.model.get_text_features(**kept))
        return F.normalize(seen.float(), dim=-1) @ F.normalize(said.float(), dim=-1).T

    def save(self, folder: Path, training: Training) -> None:
        """Model and processor, as the localizer bottleneck reads them."""
        setattr(self.model.config, KEY, training.to_dict())
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def _embedding(output: Any) -> Tensor:
    """transformers 5 wraps what transformers 4 gave as it is."""
    return output if isinstance(output, Tensor) else output.pooler_output
