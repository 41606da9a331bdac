"""Flags and calls that localize, preview and pretrain share: how a prompt becomes regions, and how images are read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

REFINING = ("method", "threshold", "min_peak", "min_area", "components", "expand", "soft", "crf", "fill", "blur")

GEOMETRY = ("aspect", "slice_axis", "orientation")


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """What to find, in one sentence or several, and what to leave out."""
    parser.add_argument("--prompt", metavar="TEXT", default=argparse.SUPPRESS, help="what to find, in words; left out where the index CSV has a column `prompt`")
    parser.add_argument("--prompt-set", metavar="NAME[:LEVEL]", default=argparse.SUPPRESS,
                        help="instead of a prompt: the mean of the maps of a set's sentences; `mwm prompts` lists the sets; a .yaml file of your own")
    parser.add_argument("--not", dest="negatives", metavar="TEXT", action="append", default=argparse.SUPPRESS, help="subtract the map of this text; may be given several times")


def add_localizer(parser: argparse.ArgumentParser) -> None:
    """Which localizer, with which weights."""
    group = parser.add_argument_group("localizer")
    group.add_argument("--localizer", metavar="NAME", default=argparse.SUPPRESS,
                       help="tiny (shipped; a listed vocabulary), bottleneck or clipseg (any prompt; need --checkpoint), maps (masks you have), … `--list` (default: tiny)")
    group.add_argument("--checkpoint", metavar="NAME", default=argparse.SUPPRESS, help="weights: a preset of `--list`, a hub name (both are fetched), or a local folder")
    group.add_argument("--revision", metavar="COMMIT", default=argparse.SUPPRESS,
                       help="commit, branch or tag of the checkpoint's hub name (default: the one that a preset pins, else the newest)")
    group.add_argument("--setting", dest="settings", metavar="NAME=VALUE", action="append", default=argparse.SUPPRESS,
                       help="a setting of the localizer, for example setting=fast, layer=7, beta=0.5 or min_similarity=0.2 of bottleneck; may be given several times")
    group.add_argument("--device", metavar="NAME", default=argparse.SUPPRESS, help="cpu | cuda | cuda:N; default: the first GPU, else the CPU")


def add_refining(parser: argparse.ArgumentParser) -> None:
    """From heat map to region."""
    group = parser.add_argument_group("from heat map to region")
    group.add_argument("--method", choices=("threshold", "otsu", "kmeans"), default=argparse.SUPPRESS,
                       help="cut at a value, at Otsu's threshold of each map, or into two clusters (default: threshold)")
    group.add_argument("--threshold", type=float, metavar="X", default=argparse.SUPPRESS, help="least value of a region pixel (default: 0.5)")
    group.add_argument("--components", type=int, metavar="N", default=argparse.SUPPRESS, help="keep the N largest connected parts (lungs: 2)")
    group.add_argument("--min-area", type=float, metavar="X", default=argparse.SUPPRESS, help="drop parts with a smaller share of the image")
    group.add_argument("--expand", type=float, metavar="X", default=argparse.SUPPRESS, help="replace each part by its box, scaled by X (1.0 … 1.5)")
    group.add_argument("--soft", action="store_true", default=argparse.SUPPRESS, help="keep the map's values inside the region")
    group.add_argument("--crf", action="store_true", default=argparse.SUPPRESS, help="draw the map to the edges of the image first (dense conditional random field)")
    group.add_argument("--fill", action="store_true", default=argparse.SUPPRESS, help="fill holes of the region")
    group.add_argument("--blur", type=float, metavar="X", default=argparse.SUPPRESS, help="soften the rim by a Gaussian of X times the image's edge (for example 0.02)")
    group.add_argument("--min-peak", type=float, metavar="X", default=argparse.SUPPRESS, help="a map whose largest value is lower is empty (default: 0.1)")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How images are found and read."""
    group = parser.add_argument_group("images")
    group.add_argument("--split", metavar="NAME", default=argparse.SUPPRESS, help="take only rows of this split of an index CSV")
    add_root(group)
    group.add_argument("--intensity", metavar="TEXT", default=argparse.SUPPRESS, help="auto | percentile | window=C,W | minmax (default: auto)")
    add_geometry(group)
    group.add_argument("--strict", action="store_true", default=argparse.SUPPRESS, help="stop at an unreadable file instead of skipping it")


def add_root(group: argparse._ActionsContainer) -> None:
    """Where the paths of a list start."""
    group.add_argument("--root", metavar="FOLDER", default=argparse.SUPPRESS, help="folder that a list's paths start from, and must stay in (default: its own)")


def add_geometry(group: argparse._ActionsContainer) -> None:
    """How images of another shape, and volumes, are brought to images."""
    group.add_argument("--aspect", choices=("pad", "stretch", "crop"), default=argparse.SUPPRESS, help="what happens to another aspect ratio (default: pad)")
    group.add_argument("--slice-axis", type=int, choices=(0, 1, 2), default=argparse.SUPPRESS, help="axis along which a NIfTI volume is sliced (default: 2)")
    group.add_argument("--orientation", choices=("canonical", "stored"), default=argparse.SUPPRESS,
                       help="NIfTI: turn to the radiological view, or leave as stored (default: canonical)")


def reading(options: Mapping[str, Any], **more: Any) -> Any:
    """ReadSettings from the flags that were typed; `more` wins."""
    from mwm.data import ReadSettings

    return ReadSettings(**{**{name: options[name] for name in ("intensity", *GEOMETRY) if name in options}, **more})


def refining(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `add_refining` that were typed."""
    return {name: options[name] for name in REFINING if name in options}
