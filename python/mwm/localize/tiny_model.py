"""The network of the `tiny` localizer: a small U-Net whose dense features are queried by an encoded prompt.

The image is read once; a prompt becomes a query vector, and its map is sigmoid(features · query), as in LSeg (Li et al. 2022,
"Language-driven semantic segmentation", section 3), so that a batch of prompts costs no more than one. A second head tells the modality.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .tiny_text import MAX_TOKENS, TOKENS, encode_prompt

MODALITIES = ("brain_mri", "chest_xray", "chest_ct", "other")
SIZE = 128
WIDTHS = (16, 32, 64, 128, 192)
FEATURES = 16
TEXT_WIDTH = 48


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class _Block(nn.Module):
    """Two 3x3 convolutions around a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _conv(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class TextEncoder(nn.Module):
    """Token ids to a query: embeddings, their mean and maximum over the prompt, a two-layer perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(TOKENS), TEXT_WIDTH, padding_idx=0)
        self.head = nn.Sequential(nn.Linear(2 * TEXT_WIDTH, 96), nn.ReLU(inplace=True), nn.Linear(96, FEATURES + 1))

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [P, MAX_TOKENS], 0 = padding -> query and bias [P, FEATURES + 1]"""
        real = (ids > 0).unsqueeze(-1)
        tokens = self.embedding(ids)
        mean = (tokens * real).sum(1) / real.sum(1).clamp(min=1)
        top = tokens.masked_fill(~real, -1e4).amax(1)
        return self.head(torch.cat([mean, top], 1))


class ImageEncoder(nn.Module):
    """Image [B, 1, SIZE, SIZE] to features [B, FEATURES, SIZE, SIZE] and modality logits [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d, e = WIDTHS
        self.stage0 = nn.Sequential(_conv(1, a, 2), _conv(a, a))
        self.stage1 = nn.Sequential(_conv(a, b, 2), _Block(b))
        self.stage2 = nn.Sequential(_conv(b, c, 2), _Block(c), _Block(c))
        self.stage3 = nn.Sequential(_conv(c, d, 2), _Block(d), _Block(d))
        self.stage4 = nn.Sequential(_conv(d, e, 2), _conv(e, e))
        self.context = nn.Linear(e, e)
        self.modality = nn.Linear(e, len(MODALITIES))
        self.up3 = nn.Sequential(nn.Conv2d(e + d, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU(inplace=True), _Block(96))
        self.up2 = nn.Sequential(_conv(96 + c, 64), _Block(64))
        self.up1 = nn.Sequential(_conv(64 + b, 32), _Block(32))
        self.up0 = _conv(32 + a, 24)
        self.out = nn.Conv2d(24, 4 * FEATURES, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 1, SIZE, SIZE] -> (map of features, logits of the modality)"""
        s0 = self.stage0(x)
        s1 = self.stage1(s0)
        s2 = self.stage2(s1)
        s3 = self.stage3(s2)
        s4 = self.stage4(s3)
        pooled = s4.mean((2, 3))
        deep = s4 * torch.sigmoid(self.context(pooled))[:, :, None, None]
        y = self.up3(torch.cat([_double(deep), s3], 1))
        y = self.up2(torch.cat([_double(y), s2], 1))
        y = self.up1(torch.cat([_double(y), s1], 1))
        y = self.up0(torch.cat([_double(y), s0], 1))
        return F.pixel_shuffle(self.out(y), 2), self.modality(pooled)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


class TinyModel(nn.Module):
    """Image encoder, text encoder, and the product of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.image = ImageEncoder()
        self.text = TextEncoder()

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Every prompt's map on every image.

        Args:
            images: Normalised images. float32 [B, 1, SIZE, SIZE]
            ids: Token ids of P prompts. int64 [P, MAX_TOKENS]

        Returns:
            Map logits [B, P, SIZE, SIZE] and modality logits [B, 4].
        """
        features, modality = self.image(images)
        query = self.text(ids).to(features.dtype)
        logits = torch.einsum("bfhw,pf->bphw", features, query[:, :-1]) + query[None, :, -1:, None]
        return logits, modality


def prompt_ids(prompts: list[str]) -> Tensor:
    """Padded token ids of prompts. -> int64 [P, MAX_TOKENS]"""
    ids = torch.zeros(len(prompts), MAX_TOKENS, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens = encode_prompt(prompt)
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    return ids


def normalise(images: Tensor) -> Tensor:
    """Grey images stretched from their 0.5th to their 99.5th percentile, resized to the network's input.

    Args:
        images: Any real intensities; channels are averaged. float32 [B, C, H, W]

    Returns:
        float32 [B, 1, SIZE, SIZE] in [0, 1]
    """
    grey = images.float().mean(1, keepdim=True)
    grey = F.interpolate(grey, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
    return stretch(grey)


def stretch(grey: Tensor) -> Tensor:
    """Map each image's 0.5th..99.5th percentile to 0..1, clamped; a constant image becomes 0. [B, 1, H, W]"""
    ordered = grey[:, :, ::2, ::2].flatten(1).sort(1).values
    n = ordered.shape[1]
    low = ordered[:, int(0.005 * n)]
    high = ordered[:, min(n - 1, int(0.995 * n))]
    flat = high <= low
    high = torch.where(flat, ordered[:, -1], high)
    low = torch.where(flat, ordered[:, 0], low)
    span = (high - low).clamp(min=1e-6)
    return ((grey - low[:, None, None, None]) / span[:, None, None, None]).clamp(0, 1)
