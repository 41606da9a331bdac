"""Choose settings: without labels, by agreement over paraphrases and stability; or with masks, by Dice. Never both at once.

  mwm localize choose IMAGES --prompt-set brain_mri_tumour:P1 --vary method=threshold,otsu,kmeans --vary expand=1,1.2
  mwm localize choose IMAGES --prompt-set chest_xray_lungs --vary level=P1,P2,P3 --vary layer=7,8,9 --vary beta=0.1,1 --localizer bottleneck --checkpoint biomedclip
  mwm localize choose DATA/index.csv --split val --prompt "both lungs" --masks masks        with labels: the column mask; or --masks FOLDER

--vary names a setting of the refinement (threshold, method, crf …), `level` of the prompt set, or a setting of the localizer. Without --masks no label is read:
agreement and stability are Dice within an image, corrected for chance by the Dice between different images; candidates with more than half of the regions empty or
full are out. With --masks only Dice counts, and the images that were used must not be used to report results. Writes OUT/choose.json, which says which it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mwm.cli.regions import add_localizer, add_prompts, add_reading, reading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Images, prompts, what to vary."""
    parser.add_argument("images", metavar="IMAGES", help="folder, glob, text list or index CSV")
    add_prompts(parser)
    parser.add_argument("--vary", metavar="NAME=V1,V2", action="append", default=[], help="values to try; may be given several times (default: method and threshold)")
    parser.add_argument("--masks", metavar="WHERE", help="choose with labels: a folder of masks named like the images, or the word masks (the column mask of the index CSV)")
    parser.add_argument("--count", type=int, metavar="N", default=16, help="images to look at, evenly spaced over the list (default: 16)")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of the noise on copies of the images (default: 0)")
    parser.add_argument("--out", metavar="FOLDER", default="choose", help="where choose.json goes (default: choose)")
    add_localizer(parser)
    add_reading(parser)


def run(options: argparse.Namespace, words: list[str]) -> int:
    """Judge, print, write."""
    import json

    from mwm.data import MaskFolder, read_list
    from mwm.localize.choose import candidates_of, choose_settings
    from mwm.localize.command import localizer_settings, open_localizer
    from mwm.localize.prompt_sets import resolve_prompts

    given = vars(options)
    read = reading(given)
    vary = varied(options.vary)
    name = given.get("prompt_set")
    base = given.get("prompt")
    if (name is None) == (base is None):
        raise ValueError("choose: one of --prompt and --prompt-set must be given. A set has the paraphrases whose agreement is measured.")
    if "level" in vary and name is None:
        raise ValueError("choose: --vary level must go with --prompt-set, got a single prompt.")
    fixed = localizer_settings(given.get("settings"))
    records = list(read_list(options.images, split=given.get("split"), root=given.get("root"), settings=read))

    def make(settings: dict) -> object:
        return open_localizer({name: given.get(name) for name in ("localizer", "checkpoint", "revision", "device", "negatives")} | {"settings": fixed | settings}, read)[0]

    def prompts(level: str | None) -> list[str]:
        if name is None:
            return [base]
        return resolve_prompts(f"{name.partition(':')[0] if level else name}{':' + level if level else ''}")[1]

    masks = None if options.masks is None else "masks" if options.masks == "masks" else MaskFolder(options.masks)
    found = choose_settings(make, records, prompts, candidates_of(vary), masks=masks, read=read, count=options.count, seed=options.seed)
    print(found)
    out = Path(options.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    (out / "choose.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    print(f"best: {found.best.flags()}\nwrote {out / 'choose.json'}")
    return 0


def varied(texts: list[str]) -> dict[str, list]:
    """--vary NAME=V1,V2 … as lists of YAML values; the cut of the map where nothing was typed."""
    import yaml

    if not texts:
        return {"method": ["threshold", "otsu", "kmeans"], "threshold": [0.3, 0.5, 0.7]}
    found: dict[str, list] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not name.strip().isidentifier() or name.strip() in found:
            raise ValueError(f"choose: --vary must be NAME=V1,V2 with a name given once, got {text!r}. For example --vary threshold=0.3,0.5.")
        try:
            found[name.strip()] = [yaml.safe_load(value) for value in values.split(",") if value.strip()]
        except yaml.YAMLError as error:
            raise ValueError(f"choose: --vary must have plain values, got {text!r}.") from error
    return found
