"""`clipseg`: any CLIPSeg checkpoint (Lüddecke & Ecker, CVPR 2022), by hub name or local folder, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mwm.localize.checkpoints import (
    commit_of,
    content_hash,
    first_line,
    hub_answers,
    image_settings,
    local_folder,
    quiet_transformers,
)
from mwm.localize.presets import pinned
from mwm.localize.protocol import check_flag, check_images, check_whole, default_device
from mwm.localize.training import KEY, training_from


class ClipsegLocalizer:
    """Text-prompted segmentation with CLIPSeg; answers any text, well or badly.

    The probability map of a prompt is the sigmoid of the logits, brought to the image's size bilinearly. Images are
    resized and normalised as the checkpoint's processor says; one channel is repeated to three, other counts than 1 and
    3 are averaged first. Code from checkpoints is never run.

    Args:
        checkpoint: The preset "clipseg-rd64", a hub name such as "CIDAS/clipseg-rd64-refined", or a folder that `save_pretrained` wrote. A hub name
            is fetched where it is not in the local cache.
        device: Where the model runs.
        revision: Commit, branch or tag of a hub name; None for the preset's, else the newest.
        offline: Use only what is on disk; a hub name is then looked up in the local cache.
        batch_size: Images that go through the model at once.

    Attributes:
        training: What the checkpoint learnt from in `mwm localize train`, or None.

    Raises:
        ValueError: the checkpoint is no CLIPSeg model, is not there, or cannot be fetched.
    """

    name = "clipseg"
    checkpoint_hint = "Give a hub name, for example CIDAS/clipseg-rd64-refined, or a local folder."

    def __init__(self, checkpoint: str | Path, device: Any = None, *, revision: str | None = None, offline: bool = False, batch_size: int = 8) -> None:
        self.checkpoint = str(checkpoint)
        self.batch_size = check_whole(batch_size, "batch_size", self.name)
        check_flag(offline, "offline", self.name)
        self.device = default_device(device)
        source, revision, _ = pinned(checkpoint, "clipseg", revision)
        folder = local_folder(source, "clipseg", "CIDAS/clipseg-rd64-refined")
        processor, model = _load(folder or source, revision=revision, local_only=offline or folder is not None or not hub_answers())
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.input_size, self._mean, self._std, self._resample = image_settings(processor.image_processor)
        self._max_tokens = int(self.model.config.text_config.max_position_embeddings)
        self.fingerprint = f"clipseg {content_hash(folder)}" if folder else f"clipseg {source}@{commit_of(source, revision)}"
        self.training = training_from(getattr(self.model.config, KEY, None), "clipseg")
        self._tokens: dict[str, tuple[list[int], list[int]]] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Probability of each pixel to belong to what the prompt names; see `Localizer`.

        Raises:
            ValueError: a prompt is longer than the model reads, or shapes do not fit.
        """
        check_images(images, prompts, "clipseg")
        maps = images.new_zeros((len(images), *images.shape[2:]), dtype=torch.float32)
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            tokens, attention = self.encode(prompts[part])
            pixels = self.preprocess(images[part])
            logits = self.model(input_ids=tokens, attention_mask=attention, pixel_values=pixels).logits.float()
            heat = torch.sigmoid(logits.reshape(len(pixels), 1, *logits.shape[-2:]))
            heat = F.interpolate(heat, images.shape[2:], mode="bilinear", align_corners=False)
            maps[part] = heat[:, 0].clamp(0, 1).to(maps.device)
        return maps

    def preprocess(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the checkpoint's processor would hand them on. [B, C, H, W] → float32 [B, 3, S, S]"""
        x = images.to(self.device, torch.float32)
        if x.shape[1] not in (1, 3):
            x = x.mean(1, keepdim=True)
        x = x.expand(-1, 3, -1, -1)
        # The processor resizes 8-bit images, which stay within their range; bicubic overshoot is cut likewise.
        x = F.interpolate(x, self.input_size, mode=self._resample, align_corners=False, antialias=True).clamp(0, 1)
        return (x - self._mean.to(x.device)) / self._std.to(x.device)

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask of the prompts, int64 [B, N] each."""
        for prompt in prompts:
            if prompt not in self._tokens:
                encoded = self.tokenizer(prompt)
                count = len(encoded["input_ids"])
                if count > self._max_tokens:
                    raise ValueError(f"clipseg: prompt must have at most {self._max_tokens} tokens, got {count} in {prompt[:60]!r}…. Shorten it.")
                self._tokens[prompt] = encoded["input_ids"], encoded["attention_mask"]
        longest = max(len(self._tokens[prompt][0]) for prompt in prompts)
        pad = self.tokenizer.pad_token_id or 0
        ids = [self._tokens[p][0] + [pad] * (longest - len(self._tokens[p][0])) for p in prompts]
        seen = [self._tokens[p][1] + [0] * (longest - len(self._tokens[p][1])) for p in prompts]
        return torch.tensor(ids, device=self.device), torch.tensor(seen, device=self.device)


def _load(source: str | Path, *, local_only: bool, revision: str | None = None) -> tuple[Any, Any]:
    """Processor and model of a checkpoint; every failure becomes one sentence."""
    with quiet_transformers(bars=not local_only):  # a download shows its progress; reading a folder takes no time
        processor, model, report = _read(source, {"local_files_only": local_only, "revision": revision})
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"clipseg: checkpoint must hold all weights of CLIPSeg, got {str(source)!r} without {len(missing)} of them (first: {missing[0]}). "
                         "A plain CLIP model has no decoder; give a CLIPSeg checkpoint.")
    return processor, model


def _read(source: str | Path, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegProcessor

    try:
        found, _ = CLIPSegConfig.get_config_dict(source, **options)
        if found.get("model_type") != "clipseg":
            raise ValueError(f"clipseg: checkpoint must be a CLIPSeg model, got {str(source)!r} of type {found.get('model_type', 'unknown')!r}. "
                             "Give a CLIPSeg checkpoint such as CIDAS/clipseg-rd64-refined.")
        processor = CLIPSegProcessor.from_pretrained(source, trust_remote_code=False, **options)  # said, or transformers may ask on the terminal
        try:
            model, report = CLIPSegForImageSegmentation.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
        except OSError:
            # Safetensors first; .bin files load with weights_only.
            model, report = CLIPSegForImageSegmentation.from_pretrained(source, use_safetensors=False, weights_only=True, output_loading_info=True, **options)
    except OSError as error:
        if Path(source).is_dir():
            raise ValueError(f"clipseg: checkpoint must hold config.json, a processor, a tokenizer and weights, got {str(source)!r} without some of them "
                             f"({first_line(error)}). Save model and processor with save_pretrained.") from error
        raise ValueError(f"clipseg: checkpoint {str(source)!r} is neither a local folder nor could it be fetched from the hub ({first_line(error)}). "
                         "Check the name and the network, or download it and give the folder.") from error
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("clipseg:"):
            raise
        raise ValueError(f"clipseg: checkpoint {str(source)!r} cannot be read ({first_line(error)}). Download or save it again.") from error
    return processor, model, report
