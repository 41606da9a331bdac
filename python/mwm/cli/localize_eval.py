"""How good regions are, where there are masks: Dice, IoU, surface Dice, pointing game, and what masking uses of them, patches of the grid.

  mwm localize eval REGIONS DATA/index.csv                       masks in the CSV's column `mask`
  mwm localize eval REGIONS MASKS --images IMAGES                masks named like the images
  mwm localize eval REGIONS DATA/index.csv --split test --image-size 224 --patch-size 32

REGIONS is a folder made by `mwm localize`, or a folder of masks. Prints a table with 95 % intervals over patients, and writes OUT/metrics.json, OUT/images.csv and
OUT/gallery.png (best, median and worst). Means are over images whose mask is not empty. `excess` is the share of the mask's patches inside the region
less the share of all patches inside: 0 for a region at a random place, for none and for the whole image. Regions of a localizer that learnt from masks are called so
(supervised region source).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mwm.cli.regions import add_reading, reading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Regions, masks, grid."""
    parser.add_argument("regions", metavar="REGIONS", help="folder made by `mwm localize`, or a folder of masks named like the images")
    parser.add_argument("masks", metavar="MASKS", help="index CSV with a column `mask`, or a folder of masks named like the images (then --images)")
    parser.add_argument("--images", metavar="IMAGES", help="the images, as `mwm localize` saw them: folder, glob, text list or index CSV")
    parser.add_argument("--image-size", type=int, metavar="N", default=224, help="edge of the image in pre-training (default: 224)")
    parser.add_argument("--patch-size", type=int, metavar="N", default=32, help="edge of a patch in pixels (default: 32)")
    parser.add_argument("--min-cover", type=float, metavar="X", default=0.25, help="covered share from which a patch counts (default: 0.25)")
    parser.add_argument("--tolerance", type=float, metavar="X", default=2.0, help="of the surface Dice, in pixels of the image (default: 2)")
    parser.add_argument("--out", metavar="FOLDER", default="eval", help="where the figures and the gallery go (default: eval)")
    add_reading(parser)


def run(options: argparse.Namespace, words: list[str]) -> int:
    """Compare, print, write, draw."""
    import dataclasses
    import json

    from mwm import view
    from mwm.data import read_list
    from mwm.localize.evaluate import GridSettings, evaluate_regions

    given = vars(options)
    read = reading(given)
    folder = options.masks if Path(options.masks).expanduser().is_dir() else None
    if folder is not None and options.images is None:
        raise ValueError("eval: --images must be given with a folder of masks, got none. Name the images as mwm localize saw them, or give an index CSV with a column mask.")
    records = list(read_list(options.images or options.masks, split=given.get("split"), root=given.get("root"), settings=read))
    grid = GridSettings(options.image_size, options.patch_size, options.min_cover, given.get("aspect", "pad"))
    found = evaluate_regions(options.regions, records, folder, read=read, grid=grid, tolerance=options.tolerance)
    print(found)
    out = Path(options.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    told = {"regions": found.summary, "grid": dataclasses.asdict(grid), "tolerance": found.tolerance, "source": found.source}
    (out / "metrics.json").write_text(json.dumps(told, indent=1) + "\n")
    found.write_rows(out / "images.csv")
    if any(found.examples().values()):
        picture = view.save(gallery(found, options.regions, records, folder, read).image(cell=200), out / "gallery.png")
        print(f"wrote {picture}, {out / 'metrics.json'} and {out / 'images.csv'}")
    return 0


def gallery(found: Any, regions: Any, records: list[Any], masks: str | None, read: Any, count: int = 3) -> Any:
    """Image, mask and region of the best, the median and the worst images; no names."""
    from mwm import view
    from mwm.data import MaskFolder, match_size, open_regions, read_image, read_record_mask

    store, folder = open_regions(regions), None if masks is None else MaskFolder(masks)
    by_name = {record.name: record for record in records}
    page = view.Sheet(("Image", "Mask", "Region"))
    for kind, rows in found.examples(count).items():
        for k in rows:
            row = found.rows[k]
            record = by_name[row["file"]]
            image = read_image(record, read)
            size = (image.shape[1], image.shape[2])
            truth = match_size(read_record_mask(folder.find(record) if folder else record.mask, record, read), size, "mask")
            region = match_size(store.region(record, read), size, "region")
            words = f"Dice {row['dice']:.2f}, {view.percent(row['roi_inside'])} of its patches inside" + ("" if bool((region > 0).any()) else "; empty")
            page.add(kind, view.Cell(view.picture(image)), view.Cell(view.overlay(image, truth), f"{100 * row['roi_area']:.1f} % of the image"),
                     view.Cell(view.overlay(image, region), words))
    return page
