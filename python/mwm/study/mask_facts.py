"""What the masks of an arm really hid: the share of the true regions' area that pre-training could not see, beside the share of all patches.

An arm that is to hide what matters and does not cannot show that it matters. The masks are pure functions of (seed, image, epoch), so they are drawn again, crops included,
after a cell has been pre-trained. The masks of the data set are read for this count alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mwm.data import DataError, JointTransform, PretrainDataset, UnreadableImage, read_list
from mwm.masking import Policy, inside_grid, policy_from_dict
from mwm.study.cell_files import Cell, read_facts
from mwm.study.cells import make_regions
from mwm.study.config import StudyConfig
from mwm.study.sources import arm as arm_named
from mwm.train import PretrainConfig, TrainError
from mwm.train.checkpoint import write_text
from mwm.train.prepare import list_images, open_source, prepare, read_settings
from mwm.train.record import read_resolved

COLUMNS = ("data_set", "arm", "fold", "hidden", "hidden_inside", "patches_inside", "patches", "images")
STORED = "mask_facts"
EPOCHS = 4
_MOST = 512
"""Epochs and images of a cell whose masks are drawn again: enough for a mean, and seconds on any data set."""


def mask_facts(out: str | Path, *, draw: bool = True) -> list[dict[str, Any]]:
    """Facts of every finished pre-training whose data set has masks; drawn once and kept in OUT/mask_facts.

    Args:
        out: Folder of the study.
        draw: Whether to draw those that are missing, seconds a cell; else only those that are there.

    Returns:
        By `COLUMNS`: mean hidden share of all patches; mean share of the true region's area that is hidden; mean number of patches that the true region covers (by the run's
        `min_cover`), of how many; images with a mask. Cells whose images or regions are not there any more, and data sets without masks, are left out.
    """
    root, rows = Path(out), []
    for data, arm, fold in _pretrained(root):
        path = root / STORED / data / str(fold) / f"{arm}.json"
        if draw and not path.is_file():
            try:
                facts = _drawn_again(root, data, arm, fold)
            except (DataError, TrainError, OSError):
                facts = {}  # images or regions are not there any more, which is no reason to keep the tables back
            if facts:
                _store(path, data, arm, fold, facts)
        held = read_facts(path.parent, path.name)
        if held.get("images"):
            rows.append({name: held.get(name) for name in COLUMNS})
    return rows


def draw_ahead(cells: Sequence[Cell], config: StudyConfig, out: str | Path, device: str, *, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """The same facts of cells that have not been pre-trained: their regions are made, their masks drawn, and nothing is trained.

    Args:
        cells: Of the study; arms without pre-training are left out.
        config: Of the study.
        out: Folder of the study, with the folds; facts and regions stay there and are used by its cells.
        device: Where localizers run.
        say: Takes one line per cell.

    Raises:
        ValueError: Regions cannot be made, or images cannot be read.
    """
    root, rows = Path(out), []
    for cell in dict.fromkeys(Cell(cell.data, cell.arm, cell.fold, ()) for cell in cells if arm_named(cell.arm).pretrain):
        path = root / STORED / cell.data / str(cell.fold) / f"{cell.arm}.json"
        if not path.is_file():
            fields = make_regions(config, root, cell.data, cell.arm, cell.fold, device)
            # A folder that no run has: nothing is written, and a run of the cell that is there already is not asked.
            settings = config.pretrain_config(cell.data, images=str(root / "folds" / cell.data / f"{cell.fold}.pretrain.csv"), out=str(path.with_suffix("")), seed=cell.fold,
                                              device=device, progress=False, **fields)
            with contextlib.redirect_stdout(io.StringIO()):  # what a run says of its own masks
                prepared = prepare(list_images(settings), None, 1)
            _store(path, cell.data, cell.arm, cell.fold, hidden_inside(prepared.config, prepared.policy, skipped=prepared.resolved["skipped"]))
        held = read_facts(path.parent, path.name)
        if held.get("images"):
            rows.append({name: held.get(name) for name in COLUMNS})
            say(f"{cell.name}: {held['hidden']:.3f} of the patches hidden, {held['hidden_inside']:.3f} of the true region's area")
        else:
            say(f"{cell.name}: no image has a mask of its true region, so that nothing can be counted")
    return rows


def hidden_inside(config: PretrainConfig, policy: Policy, *, skipped: Collection[int] = ()) -> dict[str, Any]:
    """Draw the masks of a run again and count.

    Args:
        config: Of the run.
        policy: Of the run, its share of empty regions set.
        skipped: Ids of images that the run left out.

    Returns:
        The figures of `mask_facts`; {"images": 0} where no image has a mask.

    Raises:
        DataError: Images or regions are not there.
    """
    records = [record for record in read_list(config.images, split=config.split, settings=read_settings(config)) if record.mask is not None and record.id not in skipped]
    records = records[:: max(1, math.ceil(len(records) / _MOST))]
    if not records:
        return {"images": 0}
    images, truth = open_source(config.replace(cache=None), records), PretrainDataset(records, read_settings(config), "masks", channels=config.channels)
    transform = JointTransform(config.size, crop_scale=config.crop_scale, flip=config.flip)
    sums, views, seen = dict.fromkeys(("hidden", "hidden_inside", "patches_inside"), 0.0), 0, 0
    for k, record in enumerate(records):
        try:
            sample, true = images[k], truth[k]["region"]
        except UnreadableImage:
            continue
        several = sample["region"].ndim == 3  # with the foreground
        seen += 1
        for epoch in range(EPOCHS):
            _, moved = transform(sample["image"], torch.cat([sample["region"] if several else sample["region"][None], true[None]]), seed=config.seed, id=record.id, epoch=epoch)
            region = moved[:-1] if several else moved[0]
            active = policy(region[None] if policy.needs_region else None, grid=config.grid, seed=config.seed, ids=torch.tensor([record.id]), epoch=epoch)
            inside, share = inside_grid(moved[-1:], config.grid, min_cover=config.min_cover)
            if share is None or not float(share.sum()) > 0:
                continue  # no region, or a crop without it
            views += 1
            sums["hidden"] += float((~active).double().mean())
            sums["hidden_inside"] += float((share * ~active).sum() / share.sum())
            sums["patches_inside"] += int(inside.sum())
    if not views:
        return {"images": 0}
    return {**{name: value / views for name, value in sums.items()}, "patches": config.grid[0] * config.grid[1], "images": seen}


def _drawn_again(root: Path, data: str, arm: str, fold: int) -> dict[str, Any]:
    """Of a cell, from its config.yaml and what lies in OUT now, wherever it lay then."""
    file = root / "cells" / data / arm / str(fold) / "run" / "config.yaml"
    stored = read_resolved(file.parent)
    if "policy" not in stored:
        return {}  # of an archive, which says no more
    config = PretrainConfig.from_yaml(file)
    places = {name: str(root / "regions" / data / str(fold) / Path(value).name) for name in ("regions", "foreground") if (value := getattr(config, name)) not in (None, "masks")}
    config = config.replace(images=str(root / "folds" / data / f"{fold}.pretrain.csv"), **places)
    return hidden_inside(config, policy_from_dict(stored["policy"]), skipped=stored.get("skipped") or ())


def _store(path: Path, data: str, arm: str, fold: int, facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"data_set": data, "arm": arm, "fold": fold, **facts}, indent=1) + "\n")


def _pretrained(root: Path) -> Iterator[tuple[str, str, int]]:
    for path in sorted((root / "cells").glob("*/*/*/cell.json"), key=lambda path: (path.parts[-4], path.parts[-3], path.parts[-2].zfill(6))):
        data, arm, fold = path.parts[-4:-1]
        if fold.isdigit() and read_facts(path.parent, path.name).get("status") == "done" and (path.parent / "run" / "config.yaml").is_file():
            yield data, arm, int(fold)
