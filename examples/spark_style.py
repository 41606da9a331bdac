"""A SparK-style model with its encoder replaced: the five marked lines are the whole change.

    python examples/spark_style.py

SparK (arXiv 2301.03580) hands its encoder a masked image and a global mask, and pays for the dense network. Here the same
encoder reads packed tiles; the maps come back dense, zero where hidden, as the rest of the code expects them.
"""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

import mwm


class SparKStyle(nn.Module):
    """Mask, encode sparsely, fill the hidden positions with a token, decode densely, reconstruct what was hidden.

    Args:
        encoder: a CNN that returns its pyramid; sparsified in place.
        width: channels of the deepest map.
    """

    def __init__(self, encoder: nn.Module, width: int, patch_size: int = 32) -> None:
        super().__init__()
        self.sparse_encoder = mwm.sparsify(encoder)                               # 1: was SparseEncoder(encoder, input_size)
        self.patch_size = patch_size
        self.token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.decoder = nn.Sequential(nn.Conv2d(width, patch_size**2, 1), nn.PixelShuffle(patch_size))

    def forward(self, images: Tensor, mask_ratio: float = 0.6) -> Tensor:
        """Images [B, 1, H, W] to the mean squared error on hidden pixels."""
        grid = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        policy = mwm.create_policy("uniform", mask_ratio=mask_ratio)              # 2: was a loop of torch.rand and argsort
        ids = torch.arange(len(images))
        active = policy(None, grid=grid, seed=0, ids=ids, epoch=0)                # 3: bool [B, Gh, Gw], True = visible
        packed = mwm.pack(images, active)                                         # 4: was images * mask and a global variable
        features = [f.unpack() for f in self.sparse_encoder(packed)]              # 5: dense maps again
        deepest = torch.where(active[:, None], features[-1], self.token)
        hidden = ~active.repeat_interleave(self.patch_size, 1).repeat_interleave(self.patch_size, 2)[:, None]
        return (self.decoder(deepest) - images).square()[hidden].mean()


def main() -> float:
    """One training step on noise; returns the loss."""
    torch.manual_seed(0)
    model = SparKStyle(timm.create_model("resnet18", features_only=True, in_chans=1), width=512)
    loss = model(torch.rand(4, 1, 224, 224))
    loss.backward()
    print(f"loss {loss.item():.3f}; the encoder's first weights have a gradient of norm "
          f"{next(model.sparse_encoder.parameters()).grad.norm():.3f}")
    return loss.item()


if __name__ == "__main__":
    main()
