"""`clipseg`: any CLIPSeg checkpoint (Lüddecke & Ecker, CVPR 2022), by hub name or local folder, through transformers."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
import torch.nn.functional as F
from torch import Tensor

from mwm.localize.protocol import check_images, default_device

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.txt")


class ClipsegLocalizer:
    """Text-prompted segmentation with CLIPSeg; answers any text, well or badly.

    The probability map of a prompt is the sigmoid of the logits, brought to the image's size bilinearly. Images are
    resized and normalised as the checkpoint's processor says; one channel is repeated to three, other counts than 1 and
    3 are averaged first. Code from checkpoints is never run.

    Args:
        checkpoint: Hub name such as "CIDAS/clipseg-rd64-refined", or a folder that `save_pretrained` wrote. A hub name
            is fetched where it is not in the local cache.
        device: Where the model runs.
        offline: Use only what is on disk; a hub name is then looked up in the local cache.
        batch_size: Images that go through the model at once.

    Raises:
        ValueError: the checkpoint is no CLIPSeg model, is not there, or cannot be fetched.
    """

    name = "clipseg"
    checkpoint_hint = "Give a hub name, for example CIDAS/clipseg-rd64-refined, or a local folder."

    def __init__(self, checkpoint: str | Path, device: Any = None, *, offline: bool = False, batch_size: int = 8) -> None:
        self.checkpoint = str(checkpoint)
        self.batch_size = batch_size
        self.device = default_device(device)
        folder = _local_folder(self.checkpoint)
        processor, model = _load(folder or self.checkpoint, local_only=offline or folder is not None or not _hub_answers())
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = processor.tokenizer
        self._size, self._mean, self._std, self._resample = _image_settings(processor.image_processor)
        self._max_tokens = int(self.model.config.text_config.max_position_embeddings)
        self.fingerprint = f"clipseg {_content_hash(folder)}" if folder else f"clipseg {self.checkpoint}@{self.model.config._commit_hash}"
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
            tokens, attention = self._encode(prompts[part])
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
        x = F.interpolate(x, self._size, mode=self._resample, align_corners=False, antialias=True).clamp(0, 1)
        return (x - self._mean.to(x.device)) / self._std.to(x.device)

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
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


def _local_folder(checkpoint: str) -> Path | None:
    """The folder that the checkpoint names, or None for a hub name."""
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"clipseg: checkpoint must be a folder with config.json, got {checkpoint!r} without one. Give the folder that save_pretrained wrote.")
        return path
    if path.exists() or not _HUB_NAME.fullmatch(checkpoint):
        raise ValueError(f"clipseg: checkpoint must be a local folder or a hub name owner/model, got {checkpoint!r}. For example CIDAS/clipseg-rd64-refined.")
    return None


def _hub_answers() -> bool:
    """Whether there is a way to the hub. Its own client tries for half a minute before it says no; a copy on disk serves without."""
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urlopen(Request(address, method="HEAD"), timeout=5).close()
    except HTTPError:
        return True
    except URLError as error:
        return not isinstance(error.reason, (socket.gaierror, ConnectionError, TimeoutError))
    except (TimeoutError, ConnectionError):
        return False
    return True


def _load(source: str | Path, *, local_only: bool) -> tuple[Any, Any]:
    """Processor and model of a checkpoint; every failure becomes one sentence."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegProcessor
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if local_only:  # a download shows its progress; reading a folder takes no time
        logging.disable_progress_bar()
    try:
        options = {"local_files_only": local_only}
        found, _ = CLIPSegConfig.get_config_dict(source, **options)
        if found.get("model_type") != "clipseg":
            raise ValueError(f"clipseg: checkpoint must be a CLIPSeg model, got {str(source)!r} of type {found.get('model_type', 'unknown')!r}. "
                             "Give a CLIPSeg checkpoint such as CIDAS/clipseg-rd64-refined.")
        processor = CLIPSegProcessor.from_pretrained(source, **options)
        try:
            model, report = CLIPSegForImageSegmentation.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
        except OSError:
            # Asking first for safetensors keeps transformers from requesting a conversion online; .bin files load with weights_only.
            model, report = CLIPSegForImageSegmentation.from_pretrained(source, use_safetensors=False, output_loading_info=True, **options)
    except OSError as error:
        if Path(source).is_dir():
            raise ValueError(f"clipseg: checkpoint must hold config.json, a processor, a tokenizer and weights, got {str(source)!r} without some of them "
                             f"({_first_line(error)}). Save model and processor with save_pretrained.") from error
        raise ValueError(f"clipseg: checkpoint {str(source)!r} is neither a local folder nor could it be fetched from the hub ({_first_line(error)}). "
                         "Check the name and the network, or download it and give the folder.") from error
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("clipseg:"):
            raise
        raise ValueError(f"clipseg: checkpoint {str(source)!r} cannot be read ({_first_line(error)}). Download or save it again.") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"clipseg: checkpoint must hold all weights of CLIPSeg, got {str(source)!r} without {len(missing)} of them (first: {missing[0]}). "
                         "A plain CLIP model has no decoder; give a CLIPSeg checkpoint.")
    return processor, model


def _image_settings(processor: Any) -> tuple[tuple[int, int], Tensor, Tensor, str]:
    """Input size, mean and std [3, 1, 1] and interpolation of the checkpoint's image processor."""
    size = processor.size
    edge = (size["height"], size["width"]) if "height" in size else (size["shortest_edge"],) * 2
    mean, std = (torch.tensor(list(values), dtype=torch.float32).reshape(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return (int(edge[0]), int(edge[1])), mean, std, "bicubic" if int(processor.resample) == 3 else "bilinear"


def _content_hash(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).digest())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200].rstrip(".")
