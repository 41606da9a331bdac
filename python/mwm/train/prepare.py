"""Everything that is found out before the first step: images, statistics, regions, the policy. Writes nothing."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mwm import masking
from mwm.data import JointTransform, PretrainDataset, ReadSettings, Record, UnreadableImage, open_regions, read_list
from mwm.data.csv_cells import file_cell, text_cell
from mwm.train.checkpoint import write_text
from mwm.train.config import PretrainConfig, TrainError
from mwm.train.export import Preprocessing
from mwm.train.loader import joint_batch
from mwm.train.masks import create_policy
from mwm.train.record import check_folder, file_size, list_hash, read_resolved
from mwm.train.survey import Survey, survey


@dataclass(frozen=True)
class Prepared:
    """What a run works on.

    Attributes:
        config: the settings, with the regions that a prompt led to.
        continues: whether a run of this folder goes on.
        records: readable images, in the order of the list.
        preprocessing: how they are fed.
        policy: draws the masks, the share of empty regions set.
        batch: images of a joint batch.
        image_list: hash of the list.
        localizer: fingerprint of the localizer, where there was a prompt.
        skipped: (relative name, reason) of the files left out.
        resolved: the section of that name in config.yaml.
    """

    config: PretrainConfig
    continues: bool
    records: list[Record]
    preprocessing: Preprocessing
    policy: masking.Policy
    batch: int
    image_list: str
    localizer: str | None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    resolved: dict[str, Any] = field(default_factory=dict)

    def source(self) -> PretrainDataset:
        """The images and regions, not augmented."""
        return open_source(self.config, self.records)

    def transform(self) -> JointTransform:
        """Crop and flip of a view."""
        return JointTransform(self.config.size, crop_scale=self.config.crop_scale, flip=self.config.flip)

    def samples(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first images, not augmented: images [n, C, H, W] in [0, 1], regions [n, H, W] or [n, 2, H, W], ids [n]."""
        source = _uncached(self.config, self.records[:count])
        picked = [source[i] for i in range(len(source))]
        return (torch.stack([s["image"] for s in picked]), torch.stack([s["region"] for s in picked]),
                torch.tensor([int(s["id"]) for s in picked], dtype=torch.int64))

    def write_skipped(self, run: Path) -> None:
        """skipped.csv: file, reason."""
        if self.skipped:
            buffer = io.StringIO()
            csv.writer(buffer, lineterminator="\n").writerows([("file", "reason"), *((file_cell(name), text_cell(reason)) for name, reason in self.skipped)])
            write_text(run / "skipped.csv", buffer.getvalue())

    def report_skipped(self) -> None:
        """Say at the end what was left out."""
        if self.skipped:
            print(f"skipped: {len(self.skipped)} files that cannot be read or have no region; skipped.csv lists them with the reasons.")


@dataclass(frozen=True)
class Listed:
    """The images of a run before any but one is read.

    Attributes:
        config: the settings, with the channels of the images.
        continues: whether a run of this folder goes on.
        records: the images, in the order of the list.
        stored: the section `resolved` of the run that goes on; else empty.
        moved: whether its regions lie elsewhere now.
    """

    config: PretrainConfig
    continues: bool
    records: list[Record]
    stored: dict[str, Any]
    moved: bool = False


def list_images(config: PretrainConfig) -> Listed:
    """Look at the folder of the run and at the list of images; quick, so that a wrong setting is told at once.

    Raises:
        TrainError: the folder cannot be used, or the run in it has other settings.
        DataError: there are no images.
    """
    continues = check_folder(config)
    records = list(read_list(config.images, split=config.split, settings=read_settings(config)))
    create_policy(config)  # refuses shares that do not go together
    if continues:
        before = PretrainConfig.from_yaml(Path(config.out) / "config.yaml")
        moved = any(_elsewhere(getattr(config, name), getattr(before, name)) for name in ("regions", "foreground"))
        config = config.replace(regions=config.regions or before.regions, foreground=config.foreground or before.foreground, channels=before.channels)
        return Listed(config, True, records, read_resolved(Path(config.out)), moved)
    return Listed(config.replace(channels=config.channels or _channels(config, records)), False, records, {})


def prepare(listed: Listed, localize: Callable[[PretrainConfig], Any] | None, world_size: int) -> Prepared:
    """Localize where there is a prompt, and read every image once.

    Args:
        listed: the images.
        localize: as in `pretrain`.
        world_size: number of processes.

    Raises:
        TrainError: the run cannot start; the folder `config.out` is as before.
    """
    config, records = listed.config, listed.records
    joint_batch(len(records), config.batch_size, world_size)
    if listed.stored:
        return _continued(config, records, listed.stored, world_size, moved=listed.moved)
    localizer = None
    if config.reads_regions and config.regions is None:
        if localize is None:
            raise TrainError("pretrain: regions must be given where no localizer is, got a prompt alone. Make them with `mwm localize`, then pass --regions.")
        found = localize(config)
        regions, localizer = found if isinstance(found, tuple) else (found, None)
        config = config.replace(regions=str(regions))
    if config.reads_regions:
        localizer = localizer or getattr(open_regions(config.regions), "meta", {}).get("localizer")
    policy = create_policy(config)
    seen = survey(_uncached(config, records), policy, config.grid, unreadable=UnreadableImage, workers=config.workers, strict=config.strict,
                  progress=config.progress, names=[r.name for r in records])
    skipped = [(records[i], reason) for i, reason in seen.skipped]
    records = [records[i] for i in seen.kept]
    policy, statistics = _complete(config, policy, seen, records)
    preprocessing = Preprocessing(config.size, config.channels, seen.mean, seen.std, read_settings(config).to_dict())
    image_list = list_hash((r.id, file_size(r.path)) for r in records)
    resolved = {"images": len(records), "image_list": image_list, "localizer": localizer, "regions": _digest(seen), "mean": list(seen.mean), "std": list(seen.std),
                "read": preprocessing.read, "policy": policy.to_dict(), "masks": statistics, "skipped": [r.id for r, _ in skipped]}
    return Prepared(config, False, records, preprocessing, policy, joint_batch(len(records), config.batch_size, world_size), image_list, localizer,
                    [(r.name, reason) for r, reason in skipped], resolved)


def read_settings(config: PretrainConfig) -> ReadSettings:
    """How the images of a configuration are read."""
    return ReadSettings.from_dict({"intensity": config.intensity, "size": config.size, **config.read})


def open_source(config: PretrainConfig, records: list[Record]) -> PretrainDataset:
    """Images and regions, read and resized, not augmented."""
    cache = None if config.cache == "device" else config.cache
    return PretrainDataset(records, read_settings(config), config.regions if config.reads_regions else None, cache=cache, channels=config.channels,
                           foreground=config.foreground)


def _uncached(config: PretrainConfig, records: list[Record]) -> PretrainDataset:
    """As `open_source`, without the cache in memory, for what reads once."""
    return open_source(config.replace(cache=None) if config.cache == "ram" else config, records)


def _elsewhere(path: str | None, before: str | None) -> bool:
    """Whether a path is given, and another one than before."""
    return path is not None and (before is None or Path(path).expanduser().resolve() != Path(before).expanduser().resolve())


def _continued(config: PretrainConfig, records: list[Record], stored: dict[str, Any], world_size: int, *, moved: bool) -> Prepared:
    """The same, from what the run wrote down when it began; regions that were moved are read once, and must be the same."""
    absent = [name for name in ("skipped", "image_list", "images", "mean", "std", "read", "policy", "localizer", "regions") if name not in stored]
    if absent:
        raise TrainError(f"pretrain: config.yaml lacks {absent[0]!r} in its section `resolved`, which mwm pretrain writes. Restore it, or start anew with --overwrite.")
    left_out = set(stored["skipped"])
    skipped, records = [r for r in records if r.id in left_out], [r for r in records if r.id not in left_out]
    image_list = list_hash((r.id, file_size(r.path)) for r in records)
    if image_list != stored["image_list"]:
        raise TrainError(f"pretrain: the images are not those the run began with ({len(records)} now, {stored['images']} then, or files changed). Restore "
                         "them, or choose another --out.")
    policy = masking.policy_from_dict(stored["policy"])
    if moved:
        seen = survey(_uncached(config, records), policy, config.grid, unreadable=UnreadableImage, workers=config.workers, strict=True, progress=config.progress,
                      names=[r.name for r in records])
        if stored["regions"] is None or _digest(seen) != stored["regions"]:
            raise TrainError("pretrain: the regions are not those the run began with, or nothing tells that they are. Leave out --regions to take them from where they were, "
                             "or choose another --out.")
    preprocessing = Preprocessing(config.size, config.channels, tuple(stored["mean"]), tuple(stored["std"]), stored["read"])
    return Prepared(config, True, records, preprocessing, policy,
                    joint_batch(len(records), config.batch_size, world_size), image_list, stored["localizer"],
                    [(r.name, "unreadable when the run began") for r in skipped], stored)


def _complete(config: PretrainConfig, policy: masking.Policy, seen: Survey, records: list[Record]) -> tuple[masking.Policy, dict[str, Any]]:
    """Set the share of empty regions, once and for all, and print what the masks will be."""
    if seen.regions is None:
        share = policy.hidden_share(torch.zeros((1, *config.grid), dtype=torch.bool)).item()
        print(f"hidden:  {share:.1%} of the patches, {'uniformly' if policy.name == 'uniform' else f'by {policy.name}'}; grid {config.grid[0]}x{config.grid[1]}")
        if config.mask == "auto" and (texts := sum(record.prompt is not None for record in records)):
            print(f"warning: {texts} of {len(records)} images have a prompt in the index, and nothing reads it: masks are uniform. Add --prompt TEXT (for the images "
                  "that have none; theirs go first), or --mask uniform if that is meant.")
        return policy, {"hidden": share}
    policy = policy.with_empty_share(policy.mean_share(seen.regions.inside))
    statistics = masking.region_statistics(seen.regions, policy, grid=config.grid, ids=torch.tensor([r.id for r in records]), seed=config.seed)
    print(masking.format_statistics(statistics))
    return policy, _plain(asdict(statistics))


def _digest(seen: Survey) -> str | None:
    """Hash of all regions as the policy sees them; None where it sees none."""
    if seen.regions is None:
        return None
    return blake2b(seen.regions.share.contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def _channels(config: PretrainConfig, records: list[Record]) -> int:
    """Channels of the first image that can be read."""
    source = PretrainDataset(records, read_settings(config))
    for index in range(len(records)):
        try:
            return source[index]["image"].shape[0]
        except UnreadableImage:
            continue
    raise TrainError(f"pretrain: images must hold at least one readable file, got {len(records)} unreadable ones. Look at the files.")


def _plain(values: Any) -> Any:
    """Tuples as lists, so that YAML and JSON give back what was written."""
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    return [_plain(value) for value in values] if isinstance(values, (list, tuple)) else values
