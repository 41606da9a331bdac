"""Flags and calls that localize, preview and pretrain share: how a prompt becomes regions, and how images are read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

REFINING = ("method", "threshold", "components", "min_area", "expand", "soft")


def add_localizer(parser: argparse.ArgumentParser) -> None:
    """Which localizer, with which weights."""
    group = parser.add_argument_group("localizer")
    group.add_argument("--localizer", metavar="NAME", default=argparse.SUPPRESS,
                       help="tiny (shipped; a listed vocabulary), clipseg (any prompt; needs --checkpoint), maps (masks you have) (default: tiny)")
    group.add_argument("--checkpoint", metavar="NAME", default=argparse.SUPPRESS, help="weights for clipseg: a local folder, or a hub name, which is fetched")
    group.add_argument("--device", metavar="NAME", default=argparse.SUPPRESS, help="cpu | cuda | cuda:N; default: the first GPU, else the CPU")


def add_refining(parser: argparse.ArgumentParser) -> None:
    """From heat map to region."""
    group = parser.add_argument_group("from heat map to region")
    group.add_argument("--method", choices=("threshold", "kmeans"), default=argparse.SUPPRESS, help="cut at a value, or into two clusters (default: threshold)")
    group.add_argument("--threshold", type=float, metavar="X", default=argparse.SUPPRESS, help="least value of a region pixel (default: 0.5)")
    group.add_argument("--components", type=int, metavar="N", default=argparse.SUPPRESS, help="keep the N largest connected parts (lungs: 2)")
    group.add_argument("--min-area", type=float, metavar="X", default=argparse.SUPPRESS, help="drop parts with a smaller share of the image")
    group.add_argument("--expand", type=float, metavar="X", default=argparse.SUPPRESS, help="replace each part by its box, scaled by X (1.0 … 1.5)")
    group.add_argument("--soft", action="store_true", default=argparse.SUPPRESS, help="keep the map's values inside the region")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How images are found and read."""
    group = parser.add_argument_group("images")
    group.add_argument("--split", metavar="NAME", default=argparse.SUPPRESS, help="take only rows of this split of an index CSV")
    group.add_argument("--intensity", metavar="TEXT", default=argparse.SUPPRESS, help="auto | percentile | window=C,W | minmax (default: auto)")
    group.add_argument("--strict", action="store_true", default=argparse.SUPPRESS, help="stop at an unreadable file instead of skipping it")


def refining(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `add_refining` that were typed."""
    return {name: options[name] for name in REFINING if name in options}
