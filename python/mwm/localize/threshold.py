"""`threshold`: body and lungs by Otsu's threshold (1979), filled holes and connected components: no learning, no annotation, hardly a text.

A baseline that guided masking has to beat, and where air ends: everything here is what anybody could compute before there were networks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from mwm.localize.protocol import PromptRefused, check_images

_WORDS = {"body": "body", "head": "body", "brain": "body", "patient": "body", "tissue": "body", "foreground": "body", "lung": "lungs", "lungs": "lungs"}
_BINS = 256
_AIR = 0.65  # of Otsu's threshold, which lies between dark and bright tissue where there is little air
_SMALL = 0.004  # share of the image below which a dark component is no lung
_CROSS = ndimage.generate_binary_structure(2, 1)


class ThresholdLocalizer:
    """Finds the body, or two lungs, by grey values alone.

    body: pixels above 0.65 of Otsu's threshold (both on the root of the smoothed grey values, which separates air from dark tissue), holes filled, opened, the
    largest component. On 240 slices of ours it holds brains and chests whole; of CT slices windowed for bone it loses parts.
    lungs: inside the body, pixels below Otsu's threshold of the body's own values, opened; components that touch the image's border or are small are dropped,
    the two largest kept, holes filled. Rough: on frontal X-rays, where lungs often run into dark shoulders, Dice 0.35.

    The prompt only chooses between the two: it must name one of body (also head, brain, patient, tissue, foreground) and lungs.

    Args:
        device: Taken for the sake of the protocol; the work is done on the CPU.

    Raises:
        ValueError: from a call: the prompt names neither, or both.
    """

    name = "threshold"
    gives_regions = True

    def __init__(self, device: Any = None) -> None:
        self.fingerprint = "threshold 1"

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Regions of zeros and ones.

        Args:
            images: float [B, C, H, W] in [0, 1]; channels are averaged.
            prompts: One text per image.

        Returns:
            float32 [B, H, W], on the images' device. An image without contrast gets an empty region.
        """
        check_images(images, prompts, self.name)
        maps = torch.zeros((len(images), *images.shape[2:]), dtype=torch.float32)
        for k, prompt in enumerate(prompts):
            part, grey = _part(prompt), images[k].detach().float().mean(0).cpu().numpy()
            maps[k] = torch.from_numpy((body(grey) if part == "body" else lungs(grey)).astype(np.float32))
        return maps.to(images.device)


def otsu(values: NDArray) -> float:
    """Otsu's threshold: the grey value that splits the values into two classes of the largest between-class variance.

    Args:
        values: float, any shape, at least one.

    Returns:
        The upper edge of the last bin of the lower class, of 256 bins between the least and the largest value; that value itself where all are equal.
    """
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return low
    counts, edges = np.histogram(values, _BINS, (low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(np.float64)
    above = counts.sum() - below
    sums = np.cumsum(counts * centres)
    between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2  # the first and the last bin are never empty
    return float(edges[int(np.argmax(between)) + 1])


def body(grey: NDArray) -> NDArray[np.bool_]:
    """Where there is no air around: float [H, W] → bool [H, W]"""
    smooth = np.sqrt(np.clip(ndimage.gaussian_filter(grey, _scale(grey)), 0, None))
    bright = smooth > smooth.min() + _AIR * (otsu(smooth) - smooth.min())
    return _largest(ndimage.binary_fill_holes(_opened(ndimage.binary_fill_holes(bright))), 1, 0)


def lungs(grey: NDArray) -> NDArray[np.bool_]:
    """The two largest dark things inside the body that do not reach the image's border: float [H, W] → bool [H, W]"""
    inside = body(grey)
    if not inside.any():
        return inside
    smooth = ndimage.gaussian_filter(grey, _scale(grey) / 2)
    dark = _opened(inside & (smooth < otsu(smooth[inside])))
    labels, _ = ndimage.label(dark)
    rim = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    dark &= ~np.isin(labels, rim[rim > 0])
    return ndimage.binary_fill_holes(_largest(dark, 2, _SMALL))


def _scale(grey: NDArray) -> float:
    """One hundred-and-twenty-eighth of the image's edge, in pixels."""
    return float(np.sqrt(grey.size)) / 128


def _opened(mask: NDArray) -> NDArray[np.bool_]:
    """Bridges of a few pixels cut."""
    return ndimage.binary_opening(mask, _CROSS, iterations=max(1, round(_scale(mask))))


def _largest(mask: NDArray, keep: int, least: float) -> NDArray[np.bool_]:
    """The largest components with at least a share `least` of the image."""
    labels, count = ndimage.label(mask)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    order = np.argsort(-areas, kind="stable")[:keep]
    return np.isin(labels, [k + 1 for k in order if areas[k] >= max(1, least * mask.size)])


def _part(prompt: str) -> str:
    named = {_WORDS[word] for word in "".join(c if c.isalpha() else " " for c in prompt.lower()).split() if word in _WORDS}
    if len(named) != 1:
        raise PromptRefused(f'threshold: prompt must name either body or lungs, got "{prompt[:80]}". It reads grey values; for other structures take tiny or clipseg.')
    return named.pop()
