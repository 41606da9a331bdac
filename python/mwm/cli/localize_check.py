"""Does the map follow the text? The prompt's map against those of a neutral, an absent and a random text, of other words for the same, of the image's middle, and of another seed.

  mwm localize check IMAGES --prompt "both lungs" --localizer bottleneck --checkpoint biomedclip
  mwm localize check IMAGES --prompt-set brain_mri_tumour:P1 --localizer clipseg --checkpoint FOLDER

Prints pass, weak or fail, and writes OUT/check.png with 12 images and OUT/check.json. No labels are read. Two figures, means over the images:
correlation over pixels, and mass shift (sum |a - b| / sum (a + b): 0 for equal maps, 1 where one is empty or both lie apart).
  fail  the absent or the random text gives the same map (mass shift < 0.05, or correlation >= 0.9 with mass shift < 0.35), or one that differs no
        more than two seeds or the prompt in other words do, or nine maps in ten show nothing
  weak  that map is much alike (neither mass shift >= 0.35, nor >= 0.1 with correlation <= 0.7), the neutral text gives the same map, the prompt in other
        words gives another one, two seeds correlate by less than 0.5, or the map correlates with the image's middle by 0.8 or more
The figures are printed beside these limits; --limit NAME=VALUE changes one (reasons: mwm.localize.check_limits).
A localizer that refuses a text follows it. `mwm localize` runs this on 16 images first where a localizer answers any text.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mwm.cli.regions import add_localizer, add_prompts, add_reading, reading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Images, prompts, contrasts."""
    parser.add_argument("images", metavar="IMAGES", help="folder, glob, text list or index CSV")
    add_prompts(parser)
    parser.add_argument("--neutral", metavar="TEXT", default="a medical image", help="a text that fits every image (default: a medical image)")
    parser.add_argument("--absent", metavar="TEXT", help="a text that fits none (default: the prompt set's, else: sitting on a chair)")
    parser.add_argument("--count", type=int, metavar="N", default=16, help="images to look at, evenly spaced over the list (default: 16)")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of the random text (default: 0)")
    parser.add_argument("--limit", dest="limits", metavar="NAME=VALUE", action="append", default=[],
                        help="another limit, for example same=0.95 or apart=0.3; may be given several times (names: check.json, limits)")
    parser.add_argument("--out", metavar="FOLDER", default="check", help="where check.png and check.json go (default: check)")
    add_localizer(parser)
    add_reading(parser)


def run(options: argparse.Namespace, words: list[str]) -> int:
    """Check, print, draw; exit code 0 for pass and weak, 2 for fail."""
    import json

    from mwm import view
    from mwm.data import read_list
    from mwm.localize.check import check_localizer
    from mwm.localize.check_limits import CheckLimits
    from mwm.localize.command import open_localizer

    given = vars(options)
    read = reading(given)
    localizer, found = open_localizer(given, read)
    records = list(read_list(options.images, split=given.get("split"), root=given.get("root"), settings=read))
    report = check_localizer(localizer, records, given.get("prompt"), read=read, neutral=options.neutral, absent=options.absent or (found.absent if found else None),
                             count=options.count, seed=options.seed, limits=CheckLimits.changed(options.limits))
    print(report)
    out = Path(options.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    picture = view.save(sheet(report).image(cell=150), out / "check.png")
    (out / "check.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    print(f"wrote {picture} and {out / 'check.json'}")
    return 2 if report.verdict == "fail" else 0


def sheet(report: Any) -> Any:
    """A row per image: the prompt's map and those of the other texts over the image, in one scale of colours."""
    from mwm import view

    texts = {contrast.kind: contrast.text for contrast in report.contrasts}
    kinds = [kind for kind in ("neutral", "absent", "random") if kind in texts]
    page = view.Sheet(("Image", "Prompt", *(kind.capitalize() for kind in kinds)))
    for k, one in enumerate(report.shown):
        cells = [view.Cell(view.picture(one.image)), view.Cell(view.heat_map(one.prompt, image=one.image), report.prompt[:60] if k == 0 else "")]
        for kind in kinds:
            heat = one.others[kind]
            words = "refused" if heat is None else texts[kind][:60] if k == 0 else ""
            cells.append(view.Cell(view.picture(one.image) if heat is None else view.heat_map(heat, image=one.image), words))
        page.add("", *cells)
    return page
