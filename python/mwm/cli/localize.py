"""Turn a prompt and images into regions, one per image, for `mwm pretrain --regions`. A second run finds them done.

  mwm localize IMAGES --prompt "both lungs" --out regions
  mwm localize IMAGES --prompt "liver" --localizer clipseg --checkpoint FOLDER_OR_HUB_NAME --out regions
  mwm localize IMAGES --prompt-set brain_mri_tumour:P2 --not "eye" --localizer bottleneck --checkpoint biomedclip --setting setting=fast --out regions
  mwm localize IMAGES --localizer maps --maps MASKS --expand 1.2 --out regions
  mwm localize --vocabulary        what the shipped localizer understands
  mwm localize --list              the localizers

  mwm localize check IMAGES --prompt TEXT     does the map follow the text? without labels
  mwm localize choose IMAGES --prompt TEXT    settings by agreement and stability, or by masks
  mwm localize eval REGIONS MASKS             how good regions are, where there are masks
  mwm localize train IMAGES MASKS             fine-tune a CLIPSeg head on masks, or CLIP towers on captions

A localizer that answers any text is checked on 16 images first; --force goes on where its maps do not follow the text.
"""

from __future__ import annotations

import argparse

from mwm.cli.regions import GEOMETRY, add_localizer, add_prompts, add_reading, add_refining, reading

SUBCOMMANDS = {"check": "mwm.cli.localize_check", "choose": "mwm.cli.localize_choose", "eval": "mwm.cli.localize_eval", "train": "mwm.cli.localize_train"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Images, prompt, localizer, refinement."""
    parser.add_argument("images", metavar="IMAGES", nargs="?", default=argparse.SUPPRESS, help="folder, glob, text list or index CSV")
    add_prompts(parser)
    parser.add_argument("--out", metavar="FOLDER", default=argparse.SUPPRESS, help="where the regions go (default: regions)")
    parser.add_argument("--maps", metavar="FOLDER", default=argparse.SUPPRESS, help="masks that you have, for --localizer maps")
    parser.add_argument("--batch-size", type=int, metavar="N", default=argparse.SUPPRESS, help="images per call of the localizer (default: 8)")
    parser.add_argument("--workers", type=int, metavar="N", default=argparse.SUPPRESS, help="threads that read images ahead (default: 2)")
    parser.add_argument("--sam", metavar="NAME", default=argparse.SUPPRESS, help="redraw the parts of each region with this SAM: a preset (--list), a local folder, or a hub name")
    parser.add_argument("--sam-revision", metavar="COMMIT", default=argparse.SUPPRESS, help="commit, branch or tag of the SAM's hub name")
    parser.add_argument("--sam-boxes", choices=("component", "joint"), default=argparse.SUPPRESS, help="a box per part, or one around all (default: component)")
    parser.add_argument("--vocabulary", action="store_true", default=argparse.SUPPRESS, help="print the words that the localizer tiny knows")
    parser.add_argument("--list", action="store_true", default=argparse.SUPPRESS, help="print the localizers")
    parser.add_argument("--force", action="store_true", default=argparse.SUPPRESS, help="go on where the check says that the maps do not follow the text")
    add_localizer(parser)
    add_refining(parser)
    add_reading(parser)


def run(options: argparse.Namespace, words: list[str]) -> int:
    """Localize and say what was found."""
    from mwm.localize import run_localize

    given = vars(options)
    if "images" not in given and not given.get("vocabulary") and not given.get("list"):
        raise ValueError("localize: IMAGES must be a folder, glob, text list or index CSV, got none. Type `mwm localize IMAGES --prompt TEXT`.")
    if "maps" in given:
        if given.get("localizer", "maps") != "maps":
            raise ValueError(f"localize: --maps must go with --localizer maps, got --localizer {given['localizer']}. Leave one of them out.")
        given.update(localizer="maps", checkpoint=given.pop("maps"))
    read = reading(given)
    run_localize(read=read, **{name: value for name, value in given.items() if name not in ("intensity", *GEOMETRY)})
    return 0
