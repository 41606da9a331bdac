"""What a localizer is, and the checks that every localizer makes on its arguments."""

from __future__ import annotations

import os
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Localizer(Protocol):
    """From images and texts to regions.

    Attributes:
        name: Name in the registry.
        fingerprint: Changes when the answers may change (weights, settings); part of the key of cached regions.
    """

    name: str
    fingerprint: str

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Heat maps of what the prompts name.

        Args:
            images: float [B, C, H, W] in [0, 1]
            prompts: One text per image.

        Returns:
            Heat maps in [0, 1]. float32 [B, H, W]
        """
        ...


class UnsupportedImage(ValueError):
    """A localizer cannot answer for this image (another modality, no mask); the other images of a folder go on."""


class PromptRefused(ValueError):
    """A localizer does not know what a text names, and says so instead of answering it somehow."""


def check_images(images: Any, prompts: Any, name: str) -> None:
    """Refuse what is not images [B, C, H, W] in [0, 1] with one prompt each.

    Raises:
        TypeError: not a float tensor, or prompts that are no list of texts.
        ValueError: shape, range or number of prompts do not fit.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"{name}: images must be a float tensor [B, C, H, W] in [0, 1], got {getattr(images, 'dtype', type(images).__name__)}. Divide 8-bit images by 255.")
    if images.ndim != 4 or not all(images.shape[1:]):
        raise ValueError(f"{name}: images must be [B, C, H, W], got {list(images.shape)}. Add the batch or channel dimension.")
    if isinstance(prompts, str) or not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"{name}: prompts must be a list of texts, one per image, got {type(prompts).__name__}. Use [prompt] * len(images).")
    if len(prompts) != len(images):
        raise ValueError(f"{name}: prompts must be one text per image, got {len(prompts)} for {len(images)} images. Use [prompt] * len(images).")
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError(f"{name}: prompts must not be empty, got {prompt!r}. Name what to look for, for example 'both lungs'.")
    if len(images):
        low, high = torch.aminmax(images.detach())
        if not bool(low >= -1e-3) or not bool(high <= 1 + 1e-3):  # written so that NaN is refused too
            raise ValueError(f"{name}: images must be in [0, 1], got {float(low):.3g} … {float(high):.3g}. Read them with mwm.data.read_image, and normalise after localizing.")


def check_whole(value: Any, argument: str, name: str, *, least: int = 1) -> int:
    """A setting that is a whole number; the command line hands on whatever was typed.

    Raises:
        ValueError: it is none, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: {argument} must be a whole number of at least {least}, got {value!r}.")
    return value


def check_flag(value: Any, argument: str, name: str) -> bool:
    """A setting that is True or False, and not a word that merely counts as true.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {argument} must be true or false, got {value!r}.")
    return value


def default_device(device: Any = None) -> torch.device:
    """The device asked for, or the first CUDA device where there is one, else the CPU. Under torchrun "first" means that of LOCAL_RANK.

    Raises:
        ValueError: it is unknown, or not there.
    """
    if device is None or str(device) == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0
        if torch.cuda.is_available():
            return torch.device("cuda", local % torch.cuda.device_count()) if local else torch.device("cuda")
        if device is None:
            return torch.device("cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"localize: device must be cpu, cuda or cuda:N, got {device!r}.") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"localize: device must be cpu, cuda or cuda:N, got {str(device)!r}.")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"localize: device must be present, got {str(device)!r} on a machine without CUDA. Use cpu.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"localize: device must be present, got {str(device)!r} on a machine with {torch.cuda.device_count()} of them. They count from 0.")
    return found
