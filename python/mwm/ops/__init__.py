"""The kernels, and the only door to native code: plain functions on tensors, registered with ``torch.library`` (`batch_norm` excepted: eager only)."""

from __future__ import annotations

from .backend import BackendError, has_kernel, reasons, resolve, table
from .batch_norm import batch_moments, batch_norm
from .constants import SAMPLER_VERSION
from .conv3x3 import conv3x3
from .conv_transpose4x4 import conv_transpose4x4
from .image_sum import image_expand, image_sum
from .pack_tiles import pack_tiles, unpack_tiles
from .patch_loss import patch_loss
from .philox import philox, random_words
from .plan import TilePlan, build_plan
from .region_active import region_active
from .region_coverage import region_coverage
from .sample_active import sample_active, to_q32
from .tile_conv import tile_conv
from .tile_conv_between import tile_conv_between
from .tile_pool import tile_pool

__all__ = [
    "SAMPLER_VERSION",
    "BackendError",
    "TilePlan",
    "batch_moments",
    "batch_norm",
    "build_plan",
    "conv3x3",
    "conv_transpose4x4",
    "has_kernel",
    "image_expand",
    "image_sum",
    "pack_tiles",
    "patch_loss",
    "philox",
    "random_words",
    "reasons",
    "region_active",
    "region_coverage",
    "resolve",
    "sample_active",
    "table",
    "tile_conv",
    "tile_conv_between",
    "tile_pool",
    "to_q32",
    "unpack_tiles",
]
