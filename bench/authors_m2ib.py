"""M2IB as its authors run it (arXiv 2312.17174; own words and code after the description in the paper and of the repository's behaviour): the rival of bench_localize.

One image at a time; in each of ten steps ten copies of the image and of the text go through both whole towers, and the backward pass reaches every parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NoisyBlock:
    """Mixes the output of one vision block with noise, as much as alpha says; a forward hook.

    Attributes:
        alpha: The parameter, one value per token and channel. float32 [1, T, D]
        capacity: Of the last forward pass, per copy and element. float32 [N, T, D]
    """

    def __init__(self, tokens: int, width: int, noise: Callable[[tuple[int, ...]], Tensor]) -> None:
        self.alpha = nn.Parameter(torch.full((1, tokens, width), 5.0))
        self.noise, self.capacity = noise, torch.zeros(0)

    def __call__(self, block: nn.Module, inputs: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        kept = torch.sigmoid(self.alpha).expand(h.shape)
        mean, variance = kept * h, (1 - kept) ** 2
        self.capacity = 0.5 * (mean**2 + variance - 1 - variance.log())
        z = mean + variance.sqrt() * self.noise(tuple(h.shape))
        return (z, *output[1:]) if isinstance(output, tuple) else z


def authors_map(model: nn.Module, pixels: Tensor, tokens: dict[str, Tensor], layer: int, noise: Callable[[tuple[int, ...]], Tensor], *, beta: float = 0.1, steps: int = 10,
                copies: int = 10) -> Tensor:
    """The map of one image.

    Args:
        model: A `CLIPModel` of transformers.
        pixels: As the model wants them. float32 [1, 3, H, W]
        tokens: `input_ids` and `attention_mask` of one text.
        layer: Block of the bottleneck, 0-based.
        noise: Shape → standard normal numbers.
        beta: Weight of the capacity.
        steps: Of Adam with learning rate 1; the last one's update is not looked at.
        copies: Of image and text.

    Returns:
        float32 [H, W], from 0 to 1.
    """
    vision = model.vision_model
    config = model.config.vision_config
    side = config.image_size // config.patch_size
    bottleneck = NoisyBlock(side * side + 1, config.hidden_size, noise)
    handle = vision.encoder.layers[layer].register_forward_hook(bottleneck)
    optimizer = torch.optim.Adam([bottleneck.alpha], lr=1.0)
    many = {name: value.expand(copies, -1) for name, value in tokens.items()}
    try:
        for _ in range(steps):
            optimizer.zero_grad()
            text, image = _features(model.get_text_features(**many)), _features(model.get_image_features(pixel_values=pixels.expand(copies, -1, -1, -1)))
            loss = beta * bottleneck.capacity.mean() - F.cosine_similarity(text, image, eps=1e-6).mean()
            loss.backward()
            optimizer.step()
    finally:
        handle.remove()
    saliency = bottleneck.capacity.detach().mean(0).nansum(-1)[1:].reshape(1, 1, side, side)
    saliency = F.interpolate(saliency, pixels.shape[2:], mode="bilinear", align_corners=False)[0, 0]
    return (saliency - saliency.min()) / (saliency.max() - saliency.min())


def _features(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output
