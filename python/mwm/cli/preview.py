"""Look before training: image, region and mask of a few images, and what the masks hide over the whole set.

  mwm preview IMAGES --prompt "both lungs"
  mwm preview IMAGES --regions REGIONS --high 0.7 --low 0.3 --image-size 224 --patch-size 32

Writes OUT/preview.html (one file) and OUT/preview.png; prints the statistics, with a remedy where the regions do not suit the grid.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mwm.cli.errors import printable
from mwm.cli.flags import named_values
from mwm.cli.regions import add_localizer, add_reading, add_refining, reading, refining


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Images, regions or prompt, policy, grid."""
    from mwm.masking import describe_policy
    from mwm.train.masks import own_names

    parser.add_argument("images", metavar="IMAGES", help="folder, glob, text list or index CSV")
    parser.add_argument("--prompt", metavar="TEXT", help="what to mask more, in words")
    parser.add_argument("--regions", metavar="FOLDER", help=
                        "instead of a prompt: regions made by `mwm localize`, masks with the images' names, or the word masks (the column mask of the index CSV)")
    parser.add_argument("--out", metavar="FOLDER", default="preview", help="where the gallery goes (default: preview)")
    parser.add_argument("--count", type=int, metavar="N", default=8, help="images in the gallery (default: 8)")
    parser.add_argument("--image-size", type=int, nargs="+", metavar="N", default=[224], help="edge, or height and width, in pixels (default: 224)")
    parser.add_argument("--patch-size", type=int, metavar="N", default=32, help="edge of a patch in pixels (default: 32)")
    more = "".join(f" | {name} ({describe_policy(name)})" for name in own_names()).replace("%", "%%")
    parser.add_argument("--policy", metavar="NAME", default="region", help=f"region | uniform | foreground{more} (default: region)")
    parser.add_argument("--mask-setting", dest="mask_settings", metavar="NAME=VALUE", action="append", default=[],
                        help="a further setting of a policy that --policy names; may be given several times")
    parser.add_argument("--foreground", metavar="FOLDER", help="maps of what is not air, for --policy foreground: mwm localize --localizer threshold --prompt body")
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
    from mwm.masking import create_policy, policy_of_run
    from mwm.masking.coverage import MIN_COVER
    from mwm.train.masks import own_names

    name, ratio, more = options.policy, options.mask_ratio, named_values(options.mask_settings, "--mask-setting", "high=0.9")
    if more and name not in own_names():
        raise ValueError(f"preview: --mask-setting must be left out with --policy {name}, whose settings have flags of their own, got {', '.join(more)}.")
    shares = {one: value for one in ("high", "low") if (value := getattr(options, one)) is not None}
    settings: dict[str, Any] = {"empty": options.empty, "min_cover": options.min_cover, **({} if ratio is None else {"overall": ratio}), **shares}
    if name in own_names():  # a policy of one's own takes those flags that it has settings for
        given = {"mask_ratio": ratio, **shares, **{one: settings[one] for one, default in (("empty", "mean"), ("min_cover", MIN_COVER)) if settings[one] != default}}
        policy = policy_of_run(name, {one: value for one, value in given.items() if value is not None}, more)
    elif name == "uniform" and options.foreground is None:
        policy = create_policy("uniform", mask_ratio=0.6 if ratio is None else ratio)
    else:
        policy = create_policy(name, match=create_policy("region", **settings)) if name == "foreground" else create_policy(name, **settings)
    if policy.needs_foreground != (options.foreground is not None):
        raise ValueError(f"preview: foreground must be given with --policy {name if policy.needs_foreground else 'foreground'}, and only there, got "
                         f"{options.foreground!r}. Make it with mwm localize --localizer threshold --prompt body.")
    return policy


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


def run(options: argparse.Namespace, words: list[str]) -> int:
    """Localize where there is a prompt, count, draw, write."""
    if len(options.image_size) > 2 or options.count < 1:
        raise ValueError("preview: image_size must be one number or two (height width), and count at least 1. See `mwm preview --help`.")
    size = (options.image_size[0], options.image_size[-1])
    grid, policy = grid_of(size, options.patch_size), policy_of(options)
    if options.regions is not None and options.prompt is not None:
        raise ValueError("preview: one of prompt and regions must be given, got both. Leave one out.")
    if options.regions is not None and (refine := refining(vars(options))):
        raise ValueError(f"preview: --{next(iter(refine)).replace('_', '-')} must go with a prompt, got finished regions. Give it to mwm localize.")
    if options.regions is None and options.prompt is None and policy.needs_region:
        raise ValueError('preview: a prompt or regions must be given, got neither. Add --prompt "both lungs" or --regions FOLDER, or use --policy uniform.')
    import torch
    from tqdm import tqdm

    from mwm.data import DataError, PretrainDataset, read_list
    from mwm.masking import format_statistics, region_statistics, survey_regions

    given, out = vars(options), Path(options.out)
    read = reading(given, size=size)
    records = list(read_list(options.images, split=given.get("split"), root=given.get("root"), settings=read))
    regions = options.regions or (_localized(given, out) if options.prompt is not None else None)
    dataset = PretrainDataset(records, read, regions, None, foreground=options.foreground)
    samples, skipped = [], []

    def seen() -> Iterator[torch.Tensor]:  # one by one: the regions of all images need not fit into memory
        for index in tqdm(range(len(records)), desc="reading images", unit="img", dynamic_ncols=True):
            try:
                region = dataset[index]["region"]
            except DataError as error:
                if given.get("strict"):
                    raise
                skipped.append(str(error))
                continue
            samples.append(index)
            yield region

    survey = survey_regions(seen(), grid, min_cover=policy.min_cover)
    if not samples:
        raise ValueError(f"preview: images must hold at least one readable file, got {len(skipped)} unreadable ones (first: {skipped[0]}).")
    ids = torch.tensor([records[index].id for index in samples])
    statistics = region_statistics(survey, policy, grid=grid, ids=ids, seed=options.seed)
    # Without regions there is nothing to say of them, and no remedy for their being empty.
    figures, warnings = (format_statistics(statistics), statistics.warnings) if regions is not None else (
        f"hidden:  {100 * statistics.hidden:.1f} % of the patches, by {policy.name}; {len(samples)} images, grid {grid[0]}x{grid[1]}", ())
    print(figures)
    if skipped:
        print(f"skipped {len(skipped)} files:", *map(printable, skipped[:5]), *([f"and {len(skipped) - 5} more"] if len(skipped) > 5 else []), sep="\n  ")
    if bool(survey.inside.flatten(1).any(1).any()) and policy.needs_region:
        policy = policy.with_empty_share(policy.mean_share(survey.inside))
    chosen = torch.linspace(0, len(samples) - 1, min(options.count, len(samples))).round().long().unique().tolist()
    shown = [dataset[samples[k]] for k in chosen]
    active = policy(torch.stack([s["region"] for s in shown]), grid=grid, seed=options.seed, ids=ids[chosen], epoch=0)
    sheet = _gallery(shown, active, survey.inside[chosen] if regions is not None else None)
    _write(options, sheet, figures, warnings, len(samples), _nameless(options, words))
    return 0


def _nameless(options: argparse.Namespace, words: list[str]) -> str:
    """The command for a page that may be shared: folder names can be patients' names."""
    places = {value: word for value, word in ((options.images, "IMAGES"), (options.regions, "REGIONS"), (options.foreground, "FOREGROUND"), (options.out, "OUT"),
                                              (vars(options).get("root"), "ROOT"), (vars(options).get("checkpoint"), "CHECKPOINT")) if value}
    shown = []
    for word in words:
        flag, equals, value = word.partition("=")
        shown.append(f"{flag}={places[value]}" if equals and value in places else places.get(word, word))
    return shlex.join(["mwm", *shown])


def _localized(given: dict[str, Any], out: Path) -> str:
    """Regions of all images from the prompt, in OUT/regions; looking is what a preview is for, so a failed check is told, no obstacle."""
    from mwm.localize import run_localize

    shared = {name: given[name] for name in ("images", "prompt", "split", "root", "strict", "localizer", "checkpoint", "revision", "device", "settings") if name in given}
    run_localize(out=str(out / "regions"), read=reading(given), force=True, **shared, **refining(given))
    return str(out / "regions")


def _gallery(shown: list[dict[str, Any]], active: Any, inside: Any | None) -> Any:
    """One row per image; without regions (`inside` is None) image and mask alone."""
    from mwm import view

    if inside is None:
        sheet = view.Sheet(("Image", "Mask"))
        for sample, visible in zip(shown, active, strict=True):
            sheet.add("", view.picture(sample["image"]), view.Cell(view.mask_picture(sample["image"], visible), f"hidden: {view.percent(float((~visible).float().mean()))}"))
        return sheet
    sheet = view.Sheet(("Image", "Region", "Mask"))
    for sample, visible, patches in zip(shown, active, inside, strict=True):
        region = sample["region"] if sample["region"].ndim == 2 else sample["region"][0]
        hidden = ~visible
        shares = [float(hidden[part].float().mean()) if part.any() else float("nan") for part in (patches, ~patches, patches | True)]
        words = f"hidden: {view.percent(shares[0])} inside, {view.percent(shares[1])} outside, {view.percent(shares[2])} overall"
        sheet.add("", view.picture(sample["image"]), view.Cell(view.overlay(sample["image"], region), f"{int(patches.sum())} of {patches.numel()} patches are region"),
                  view.Cell(view.mask_picture(sample["image"], visible, region=region), words))
    return sheet


def _write(options: argparse.Namespace, sheet: Any, figures: str, warnings: tuple[str, ...], images: int, command: str) -> None:
    from mwm import view

    out = Path(options.out)
    named = f"the prompt “{options.prompt}”" if options.prompt is not None else "the given regions" if options.regions else "no regions"
    line = "The orange line is the region; grey" if named != "no regions" else "Grey"
    page = view.Report("Regions and masks before training", f"{images} images, {named}. {line} patches are hidden from the encoder.")
    page.section("Over all images")
    page.preformatted(figures.split("\nwarning:")[0])
    for warning in warnings:
        page.note(warning, kind="warning")
    page.section("A few of them").sheet(sheet, f"Image, {'region ' if named != 'no regions' else ''}and mask of the first epoch, evenly spaced over the list.")
    page.section("How this was made").command(command)
    written = [view.save(sheet.image(), out / "preview.png"), page.write(out / "preview.html")]
    print(f"wrote {written[1]} and {written[0]}")
