"""`tiny`: the localizer that comes with the package. It works offline, and only within a listed vocabulary.

A convenience for trying the pipeline, not the method's vision-language model: see `weights/tiny_card.md` for the data, the figures and the limits.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mwm.localize.protocol import UnsupportedImage, check_images, default_device
from mwm.localize.tiny_model import MODALITIES, TinyModel, normalise, prompt_ids
from mwm.localize.tiny_text import OTHERS, parse_prompt, vocabulary_text
from mwm.localize.training import Training

__all__ = ["TinyLocalizer"]

WEIGHTS = Path(__file__).parent / "weights" / "tiny.safetensors"
COLOUR_LIMIT = 0.08  # mean spread between channels; scans are grey, stained slides and photographs lie above
OTHER_LIMIT = 0.7
VERSION = 1  # raised when the same weights answer differently: words, gate, limits


class TinyLocalizer:
    """Finds brain tumours in MRI slices and lungs in chest X-rays and chest CT slices, as the prompt says.

    map = sigmoid(features(image) · query(prompt)) · gate, where the gate falls to 0 when the image's modality cannot show the structure:
    "lungs" on a brain MRI is an almost empty map. "Left" is the patient's left, at image right in radiological view.
    Each image is computed alone: a map does not depend on its batch. Deterministic.

    Args:
        device: Where it runs; the first CUDA device where there is one, else the CPU.

    Raises:
        ValueError: from a call: a prompt outside the vocabulary (`TinyLocalizer.vocabulary()`).
        UnsupportedImage: from a call: an image that is none of brain MRI, chest X-ray and chest CT. Both sentences name the
            localizers without that limit.
    """

    name = "tiny"
    training = Training("masks", None, "mwm/localize/weights/tiny_card.md")

    def __init__(self, device: Any = None) -> None:
        self.device = default_device(device)
        self.model = TinyModel()
        if not WEIGHTS.is_file():
            raise ValueError(f"tiny: weights must be at {WEIGHTS}, got no file. Install the package again.")
        state = {key: value.float() if value.is_floating_point() else value for key, value in load_file(str(WEIGHTS)).items()}
        lost = self.model.load_state_dict(state, strict=False)
        if lost.unexpected_keys or [key for key in lost.missing_keys if not key.endswith("num_batches_tracked")]:
            raise ValueError(f"tiny: weights at {WEIGHTS} do not fit this version of the model. Install the package again.")
        self.model = self.model.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.fingerprint = f"tiny v{VERSION} {hashlib.blake2b(WEIGHTS.read_bytes(), digest_size=16).hexdigest()}"

    @staticmethod
    def vocabulary() -> list[str]:
        """What it knows, as lines of text: structures with example prompts, words by meaning, filler words."""
        return vocabulary_text().splitlines()

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Probability of each pixel to belong to what the prompt names.

        Args:
            images: Grey or grey-as-colour scans. float [B, C, H, W] in [0, 1]
            prompts: One text per image.

        Returns:
            float32 [B, H, W] in [0, 1], on the images' device. An image without any contrast gets an empty map.
        """
        check_images(images, prompts, "tiny")
        for prompt in prompts:
            parse_prompt(prompt)
        maps = torch.zeros((len(images), *images.shape[2:]), dtype=torch.float32, device=images.device)
        for k, prompt in enumerate(prompts):
            maps[k] = self._answers(images[k : k + 1], [prompt], k)[0]
        return maps

    @torch.no_grad()
    def compare(self, image: Tensor, prompts: list[str]) -> Tensor:
        """Maps of many prompts on one image, which is read once.

        Args:
            image: float [1, C, H, W] in [0, 1]
            prompts: P texts.

        Returns:
            float32 [P, H, W]
        """
        check_images(image, prompts[:1], "tiny")
        return self._answers(image, list(prompts), 0)

    def _answers(self, image: Tensor, prompts: list[str], index: int) -> Tensor:
        structures = [parse_prompt(prompt) for prompt in prompts]
        pixels = image.to(self.device, torch.float32)
        if float(pixels.amax() - pixels.amin()) < 1e-6:
            return torch.zeros((len(prompts), *image.shape[2:]), device=image.device)
        ids = prompt_ids(prompts).to(self.device)
        x = normalise(pixels).contiguous(memory_format=torch.channels_last)
        logits, modality = self.model(x, ids)
        lungs = torch.tensor(["lung" in structure for structure in structures], device=self.device)
        gates = self._gates(pixels, modality[0], lungs, index)
        if bool((~lungs & (gates > 0)).any()):
            # Tumours know no side: the mirror image is a second opinion. Lungs do, so there is none for them.
            mirrored = self.model(x.flip(3), ids)[0].flip(3)
            logits = torch.where(lungs[None, :, None, None], logits, (logits + mirrored) / 2)
        heat = F.interpolate(torch.sigmoid(logits) * gates[None, :, None, None], image.shape[2:], mode="bilinear", align_corners=False)
        return heat[0].clamp(0, 1).to(image.device)

    @torch.no_grad()
    def modality(self, images: Tensor) -> list[str]:
        """Most probable modality of each image, "other" for what is no scan that it knows. float [B, C, H, W] in [0, 1] → B names"""
        check_images(images, ["lungs"] * len(images), "tiny")
        ids = prompt_ids(["lungs"]).to(self.device)
        names = []
        for image in images.to(self.device, torch.float32).split(1):
            chances = torch.softmax(self.model(normalise(image), ids)[1][0], 0)
            names.append("other" if self._is_other(image, chances) else MODALITIES[int(chances[:3].argmax())])
        return names

    def _is_other(self, image: Tensor, chances: Tensor) -> bool:
        spread = float((image.amax(1) - image.amin(1)).mean()) if image.shape[1] == 3 else 0.0
        return spread > COLOUR_LIMIT or float(chances[3]) > OTHER_LIMIT

    def _gates(self, image: Tensor, modality: Tensor, lungs: Tensor, index: int) -> Tensor:
        """How far the image can show each structure, in [0, 1]; refuses images of no known modality. lungs bool [P] -> [P]"""
        chances = torch.softmax(modality.float(), 0)
        if self._is_other(image, chances):
            raise UnsupportedImage(f"tiny: images must be brain MRI, chest X-ray or chest CT, got something else at index {index} of the batch. {OTHERS}")
        known = chances[:3] / chances[:3].sum()
        return (2 * torch.where(lungs, known[1] + known[2], known[0])).clamp(max=1) ** 2
