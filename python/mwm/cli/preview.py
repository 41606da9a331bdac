"""Look before training: image, region and mask of a few images, and what the masks hide over the whole set.

  mwm preview IMAGES --prompt "both lungs"
  mwm preview IMAGES --regions REGIONS --high 0.7 --low 0.3 --image-size 224 --patch-size 32

Writes OUT/preview.html (one file) and OUT/preview.png; prints the statistics, with a remedy where the regions do not suit the grid.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from mwm.cli.regions import add_localizer, add_reading, add_refining, refining


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Images, regions or prompt, policy, grid."""
    parser.add_argument("images", metavar="IMAGES", help="folder, glob, text list or index CSV")
    parser.add_argument("--prompt", metavar="TEXT", help="what to mask more, in words")
    parser.add_argument("--regions", metavar="FOLDER", help="regions made by `mwm localize`, or masks with the images' names, instead of a prompt")
    parser.add_argument("--out", metavar="FOLDER", default="preview", help="where the gallery goes (default: preview)")
    parser.add_argument("--count", type=int, metavar="N", default=8, help="images in the gallery (default: 8)")
    parser.add_argument("--image-size", type=int, nargs="+", metavar="N", default=[224], help="edge, or height and width, in pixels (default: 224)")
    parser.add_argument("--patch-size", type=int, metavar="N", default=32, help="edge of a patch in pixels (default: 32)")
    parser.add_argument("--policy", metavar="NAME", default="region", help="region | uniform (default: region)")
    parser.add_argument("--high", type=float, metavar="X", help="share hidden inside the region (default: 0.8)")
    parser.add_argument("--low", type=float, metavar="X", help="share hidden outside (default: 0.4)")
    parser.add_argument("--mask-ratio", type=float, metavar="X", help="share hidden overall; exact in every image")
    parser.add_argument("--empty", choices=("mean", "low", "error"), default="mean", help="images with an empty region (default: mean)")
    parser.add_argument("--min-cover", type=float, metavar="X", default=0.25, help="covered share from which a patch is region (default: 0.25)")
    parser.add_argument("--seed", type=int, metavar="N", default=0)
    add_localizer(parser)
    add_refining(parser)
    add_reading(parser)


def policy_of(options: argparse.Namespace) -> Any:
    """The masking policy that the flags describe."""
    from mwm.masking import create_policy

    if options.policy == "uniform":
        return create_policy("uniform", mask_ratio=0.6 if options.mask_ratio is None else options.mask_ratio)
    settings: dict[str, Any] = {"empty": options.empty, "min_cover": options.min_cover}
    if options.mask_ratio is not None:
        settings["overall"] = options.mask_ratio
    return create_policy(options.policy, **settings, **{name: value for name in ("high", "low") if (value := getattr(options, name)) is not None})


def grid_of(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Patches along height and width.

    Raises:
        ValueError: the patch does not divide the image.
    """
    if patch < 1 or min(size) < 1:
        raise ValueError(f"preview: patch_size and image_size must be positive, got {patch} and {size[0]} x {size[1]}.")
    if size[0] % patch or size[1] % patch:
        near = " x ".join(str(max(1, round(edge / patch)) * patch) for edge in size)
        raise ValueError(f"preview: patch_size must divide the image, got {patch} for {size[0]} x {size[1]} pixels. The nearest image_size that fits is {near}.")
    return size[0] // patch, size[1] // patch
