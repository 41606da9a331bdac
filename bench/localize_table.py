"""Regions of everything that needs no download, against masks: `localize.csv` and `localize.md`.

    python -m mwm.bench.localize_table DATA --out bench/results [--limit 60]

DATA holds the folders of `_SETS`, each with an index.csv of the package's schema. Models with random weights are the floor: what a map is worth that knows
nothing. The image's middle is another. `tiny` has learnt from other images of some sets, so its rows are of test images only.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mwm.bench.random_clip import random_clip
from torch import Tensor

from mwm.data import ReadSettings, match_size, read_image, read_list, read_record_mask
from mwm.data.mask_metrics import pointing_hit
from mwm.localize import RefineSettings, create_localizer, refine
from mwm.localize.checkpoints import quiet_transformers
from mwm.localize.evaluate import FIGURES, GridSettings, image_row, summarise
from mwm.localize.map_figures import centre_prior
from mwm.localize.protocol import PromptRefused

_SETS = (  # folder, split, target, prompt, what `threshold` is asked instead, parts
    ("brain_mri", "test", "tumour", "brain tumour", "body", None),
    ("brain_mri_lgg_nc", "test", "tumour", "brain tumour", "body", None),
    ("chest_xray", "test", "lungs", "both lungs", "lungs", 2),
    ("chest_ct_nodule", None, "nodule", "lung nodule", "lungs", None),
    ("chest_ct_lesion_nc", "test", "infection", "lung infection", "lungs", None),
)
_SEEDS = (0, 1, 2)
_COLUMNS = ("data_set", "split", "target", "localizer", "refinement", "images", "patients", "empty", "marked_negatives",
            *(f"{name}{end}" for name in FIGURES for end in ("", "_low", "_high")), "image_size", "patch_size", "torch", "commit", "date")


class _Middle:
    """The map that looks at nothing."""

    name = "middle"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return centre_prior(*images.shape[2:]).expand(len(images), -1, -1)


def random_clipseg(folder: Path, seed: int) -> Path:
    """A small CLIPSeg with random weights, saved with its processor; weights are large enough for the text to matter."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegProcessor, CLIPTokenizer, ViTImageProcessor

    folder.mkdir(parents=True)
    letters = [letter + end for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz"] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    CLIPSegProcessor(ViTImageProcessor(size={"height": 224, "width": 224}), tokenizer).save_pretrained(folder)
    width = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4}
    torch.manual_seed(seed)
    model = CLIPSegForImageSegmentation(CLIPSegConfig(
        text_config={**width, "vocab_size": len(letters), "bos_token_id": len(letters) - 2, "eos_token_id": len(letters) - 1, "pad_token_id": len(letters) - 1},
        vision_config={**width, "image_size": 224, "patch_size": 16}, projection_dim=128, reduce_dim=32, extract_layers=[1, 2, 3], decoder_num_attention_heads=4,
        decoder_intermediate_size=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    return folder


def rivals(folder: Path) -> list[tuple[str, Callable[[], list[Any]], dict[str, Any]]]:
    """Name, localizers (of which the map is asked in turn, one per seed) and refinement."""
    def clipseg() -> list[Any]:
        return [create_localizer("clipseg", checkpoint=random_clipseg(folder / f"clipseg{seed}", seed), device="cpu") for seed in _SEEDS]

    def bottleneck() -> list[Any]:
        sizes = {"width": 192, "depth": 6, "heads": 3, "text_width": 128, "text_depth": 2}
        return [create_localizer("bottleneck", checkpoint=random_clip(folder / f"clip{seed}", seed=seed, **sizes), device="cpu", setting="fast") for seed in _SEEDS]

    return [
        ("tiny", lambda: [create_localizer("tiny", device="cpu")], {}),
        ("threshold", lambda: [create_localizer("threshold", device="cpu")], {}),
        ("edges", lambda: [create_localizer("edges", device="cpu")], {"method": "kmeans"}),
        ("middle of the image", lambda: [_Middle()], {}),
        ("clipseg, random weights", clipseg, {"method": "kmeans"}),
        ("bottleneck, random weights", bottleneck, {"method": "kmeans"}),
    ]


def rows(data: Path, limit: int, grid: GridSettings, folder: Path) -> Any:
    """Yield a row of the table at a time."""
    facts = {"torch": torch.__version__.split("+")[0], "commit": _commit(), "date": datetime.date.today().isoformat(), "image_size": grid.image_size, "patch_size": grid.patch_size}
    with quiet_transformers(bars=False):
        ready = [(name, make(), settings) for name, make, settings in rivals(folder)]
    for data_set, split, target, prompt, instead, parts in _SETS:
        index = data / data_set / "index.csv"
        if not index.is_file():
            continue
        records = [record for record in read_list(index, split=split) if record.mask is not None]
        records = [records[k] for k in sorted({round(k * (len(records) - 1) / max(1, limit - 1)) for k in range(limit)})]
        images = [read_image(record) for record in records]
        truths = [match_size(read_record_mask(record.mask, record, ReadSettings()), tuple(image.shape[1:]), "mask") for record, image in zip(records, images, strict=True)]
        for name, localizers, settings in ready:
            refinement = RefineSettings(**settings, components=parts)
            try:
                found = [[_row(one(image[None], [instead if name == "threshold" else prompt])[0], truth, refinement, grid) for one in localizers]
                         for image, truth in zip(images, truths, strict=True)]
            except PromptRefused:
                continue
            mean = [{figure: sum(row[figure] for row in seeds) / len(seeds) for figure in FIGURES} for seeds in found]
            summary = summarise(mean, [record.patient for record in records])
            flat = {f"{figure}{end}": _short(summary[figure][key]) for figure in FIGURES for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))}
            told = f"{refinement.method}, {parts} parts" if parts else refinement.method
            empty = sum(row["area"] == 0 for seeds in found for row in seeds if row["roi_area"] > 0) / max(1, sum(row["roi_area"] > 0 for seeds in found for row in seeds))
            yield {"data_set": data_set, "split": split or "all", "target": target, "localizer": name, "refinement": told, "images": summary["images"],
                   "patients": summary["patients"], "empty": _short(empty), "marked_negatives": _short(summary["marked_negatives"])} | flat | facts


def _row(heat: Tensor, truth: Tensor, refinement: RefineSettings, grid: GridSettings) -> dict[str, float]:
    """Figures of a map's region; the pointing game is the map's own: where its highest value lies."""
    return image_row(truth, refine(heat, refinement), grid) | {"pointing": pointing_hit(truth.numpy() >= 0.5, heat.numpy())}


def page(table: list[dict[str, str]]) -> str:
    """The rows as Markdown, one table per set."""
    first = table[0]
    edge = int(first["image_size"]) // int(first["patch_size"])
    lines = ["# Regions without any download, against masks", "",
             f"`python -m mwm.bench.localize_table DATA`, commit {first['commit']}, {first['date']}. Means over images with something to find, 95 % intervals over patients.",
             f"Patches: {edge}x{edge} of {first['patch_size']} px. *Inside* is the share of the mask's patches that are region; *excess* is that less the share of all",
             "patches that are region: 0 = no better than the same region at a random place; a region of a third of the grid that holds a small target has 0.67, so read it",
             "beside *patches*. Models with random weights (means over three seeds) and the image's middle are the floor; they, `edges` and `threshold` have seen no label.",
             "*Pointing*: whether the map's highest value lies in the mask. `threshold` is asked for the body (brain) or the lungs.",
             "`tiny` has learnt, with masks, from other patients of brain_mri and chest_xray, and with made-up masks from chest_ct; it refuses targets that it does not know,",
             "which have no row. Sets ending in _nc are for evaluation only and no part of the package.", ""]
    for data_set in dict.fromkeys(row["data_set"] for row in table):
        chosen = [row for row in table if row["data_set"] == data_set]
        head = chosen[0]
        patients = f" of {head['patients']} patients or blocks of slices" if head["patients"] else ""
        lines += [f"## {data_set}: {head['target']}", "",
                  f"{head['images']} images{patients}, split {head['split']}; the mask covers {100 * float(head['roi_area']):.1f} % of the image on average.", "",
                  "| localizer | cut | Dice | IoU | NSD 2 px | pointing | inside | patches | excess | area | empty |", "|---|---|---|---|---|---|---|---|---|---|---|"]
        for row in chosen:
            def cell(name: str, row: dict[str, str] = row) -> str:
                interval = f" [{float(row[name + '_low']):.2f}, {float(row[name + '_high']):.2f}]" if row[name + "_low"] != "" else ""
                return "–" if row[name] == "" else f"{float(row[name]):.2f}{interval}"
            lines.append(f"| {row['localizer']} | {row['refinement']} | {cell('dice')} | {cell('iou')} | {cell('nsd')} | {cell('pointing')} | {cell('roi_inside')} | "
                         f"{cell('region_patches')} | {cell('excess')} | {100 * float(row['area']):.1f} % | {100 * float(row['empty']):.0f} % |")
        lines.append("")
    return "\n".join(lines)


def _short(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.4g}"


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Measure and write; every row is on disk when it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--limit", type=int, default=60, help="images of a set, evenly spaced")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, (options.out / "localize.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, _COLUMNS)
        writer.writeheader()
        for row in rows(options.data, options.limit, GridSettings(), Path(folder)):
            writer.writerow(row)
            stream.flush()
            print(*(f"{row[name]}" for name in ("data_set", "localizer", "dice", "roi_inside", "region_patches", "excess")), sep="  ", flush=True)
    with (options.out / "localize.csv").open(encoding="utf-8") as stream:
        (options.out / "localize.md").write_text(page(list(csv.DictReader(stream))), encoding="utf-8")


if __name__ == "__main__":
    main()
