"""What a detector learns from: an index CSV with boxes or masks, or COCO files; splits, classes and what is wrong with them."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mwm.data import ReadSettings, Record, assign_ids, read_list
from mwm.transfer.coco import CocoImage, read_coco
from mwm.transfer.config import FinetuneConfig, TransferError
from mwm.transfer.detect_images import Scene
from mwm.transfer.detect_objects import Objects, objects_of_case, objects_of_coco
from mwm.transfer.labelled import SPLITS, Case, Labelled, complete_splits, read_labelled

Describe = Callable[[Case, tuple[int, int]], Objects]

_SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test"}
_NAME = re.compile(r"(?:instances_|annotations_)?(train|training|val|valid|validation|test|testing)\d*", re.IGNORECASE)
_ANY = ("_annotations.coco.json", "annotations.json", "instances.json", "coco.json", "ground_truth.json")


def read_detection(config: FinetuneConfig, settings: ReadSettings) -> tuple[Labelled, Describe]:
    """The images of DATA with their splits, and how to find the objects of each.

    Args:
        config: Of which data, images, masks, labels, shares, seed and allow_leak are used.
        settings: How images are read.

    Raises:
        TransferError: there are neither boxes nor masks, or the splits do not fit.
    """
    path = Path(config.data)
    files = coco_files(path)
    if files:
        return _from_coco(config, path, files)
    index = path / "index.csv" if (path / "index.csv").is_file() else path
    if not index.is_file() and config.masks is None:
        raise TransferError(f"finetune: DATA must be an index CSV, a COCO JSON, or a folder that holds index.csv or COCO files such as train.json, got {path}.")
    need = "boxes" if any(record.boxes for record in read_list(index, settings=settings)) else "mask"
    data = read_labelled(index, need=need, labels=config.label_names, val_share=config.val_share, test_share=config.test_share, seed=config.seed,
                         allow_leak=config.allow_leak, masks=config.masks, settings=settings)
    names = data.classes
    return data, lambda case, size: objects_of_case(case, size, settings, names[case.label] if case.label >= 0 else "")


def coco_files(path: Path) -> list[tuple[str, Path]]:
    """The COCO files of DATA with their splits, "" where a file holds all; none where DATA is something else.

    A folder may hold train.json, val.json, test.json, or annotations/instances_train2017.json and so on, or train/_annotations.coco.json and so
    on, or one file for all: annotations.json, instances.json, coco.json.
    """
    if path.suffix.lower() == ".json":
        return [("", path)]
    if not path.is_dir() or (path / "index.csv").is_file():
        return []
    found: dict[str, Path] = {}
    for folder in (path, path / "annotations", *(path / name for name in _SPLIT_NAMES)):
        for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            named = _NAME.fullmatch(file.stem)
            word = named.group(1) if named else folder.name if file.name in _ANY and folder != path else ""
            split = _SPLIT_NAMES.get(word.lower(), "")
            if not split:
                continue
            if split in found:
                raise TransferError(f"finetune: DATA must hold one COCO file per split, got {found[split].name} and {file.name} for {split}. Remove one.")
            found[split] = file
    if found:
        return [(split, found[split]) for split in SPLITS if split in found]
    whole = [folder / name for folder in (path, path / "annotations") for name in _ANY if (folder / name).is_file()]
    return [("", whole[0])] if whole else []


def detection_records(config: FinetuneConfig, settings: ReadSettings) -> Sequence[Record]:
    """The images of DATA, whatever it is, before anything is asked of their splits and objects."""
    path = Path(config.data)
    files = coco_files(path)
    return [record for record, _, _ in _coco_entries(config, path, files)] if files else read_list(path, settings=settings)


def _coco_entries(config: FinetuneConfig, path: Path, files: Sequence[tuple[str, Path]]) -> list[tuple[Record, CocoImage, str]]:
    """Image, what the file says of it, and its split, of all files."""
    base = (Path(config.images) if config.images else path if path.is_dir() else path.parent).resolve()
    entries: list[tuple[Record, CocoImage, str]] = []
    where: dict[str, str] = {}
    for split, file in files:
        root = Path(config.images) if config.images else _images_of(file)
        for image in read_coco(file, root):
            full = root.resolve() / image.file
            name = full.relative_to(base).as_posix() if full.is_relative_to(base) else image.file
            if name in where:
                raise TransferError(f"finetune: an image must be in one split only, got {image.file} in {where[name]} and {split or file.name}. Remove it from one.")
            where[name] = split or file.name
            entries.append((Record(full, name, 0), image, split or image.split))
    if not entries:
        raise TransferError("finetune: DATA must hold images, got COCO files without any.")
    return entries


def _from_coco(config: FinetuneConfig, path: Path, files: Sequence[tuple[str, Path]]) -> tuple[Labelled, Describe]:
    entries = _coco_entries(config, path, files)
    names = sorted({name for _, image, _ in entries for name in image.labels})
    notes: list[str] = []
    if config.label_names is not None:
        absent = sorted(set(config.label_names) - set(names))
        if absent:
            raise TransferError(f"finetune: labels must occur in DATA, got {', '.join(absent)}. It has {', '.join(names[:8])}.")
        kept = [entry for entry in entries if not entry[1].labels or set(entry[1].labels) & set(config.label_names)]
        if len(kept) < len(entries):
            notes.append(f"{len(entries) - len(kept)} images that hold objects of other classes only are left out.")
        entries, names = kept, sorted(config.label_names)
    records = assign_ids([record for record, _, _ in entries])
    images: dict[str, CocoImage] = {}
    cases = []
    for record, (_, image, split) in zip(records, entries, strict=True):
        known = [names.index(name) for name in image.labels if name in names]
        word = split.lower()
        if word and word not in _SPLIT_NAMES:
            raise TransferError(f"finetune: split of {image.file} must be train, val or test, got {split!r}. Correct it.")
        images[record.name] = image if len(known) == len(image.labels) else _only(image, names)
        cases.append(Case(record, min(known, default=-1), image.patient, _SPLIT_NAMES.get(word, "")))
    data = complete_splits(cases, names, need="boxes", val_share=config.val_share, test_share=config.test_share, seed=config.seed, allow_leak=config.allow_leak,
                           notes=notes)
    return data, lambda case, size: objects_of_coco(images[case.record.name], size)


def _images_of(file: Path) -> Path:
    """Folder of the images of a COCO file: the first of the usual places that holds its first image."""
    folder = file.parent
    places = [folder, folder / "images", folder.parent, folder.parent / "images", *(base / file.stem.removeprefix("instances_") for base in (folder, folder.parent))]
    try:
        rows = json.loads(file.read_bytes()).get("images") or []
        first = rows[0]["file_name"]
        return next((place for place in places if (place / first).is_file()), folder)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError):
        return folder  # read_coco says what is wrong with the file


def _only(image: CocoImage, names: Sequence[str]) -> CocoImage:
    keep = [k for k, name in enumerate(image.labels) if name in names]
    pick = lambda values: tuple(values[k] for k in keep)  # noqa: E731
    return replace(image, labels=pick(image.labels), boxes=image.boxes[keep], masks=pick(image.masks), crowd=pick(image.crowd))


def check_objects(data: Labelled, scenes: Mapping[str, Scene], *, masks: bool) -> tuple[Labelled, bool]:
    """Refuse data that a detector cannot learn from, and note what was changed or is lacking.

    Args:
        data: With splits.
        scenes: By name.
        masks: Whether masks are wanted. Images with objects that lack one are left out where they are few; where they are half and more, boxes alone are learnt.

    Returns:
        The data with the classes of the objects, and whether masks are learnt.

    Raises:
        TransferError: train, val or test holds no object, or a class only occurs outside train.
    """
    notes = []
    bare = {case.record.name for case in data.cases if _lacks_masks(scenes[case.record.name].objects)}
    marked = sum(bool(scenes[case.record.name].objects.names) for case in data.cases)
    if masks and bare and 2 * len(bare) < marked:
        notes.append(f"{len(bare)} of {marked} images hold objects without a mask and are left out; --no-detect-masks keeps them.")
        data = replace(data, cases=tuple(case for case in data.cases if case.record.name not in bare))
    elif masks and bare:
        notes.append(f"{len(bare)} of {marked} images hold objects without a mask: boxes alone are learnt (Faster R-CNN).")
        masks = False
    objects = {split: [scenes[case.record.name].objects for case in data.of(split)] for split in SPLITS}
    present = {split: {name for item in objects[split] for name, crowd in zip(item.names, item.crowd, strict=True) if not crowd} for split in SPLITS}
    for split in SPLITS:
        if not present[split]:
            raise TransferError(f"finetune: images of {split} must hold objects, got {len(objects[split])} images without any. Annotate some, or put other patients into {split}.")
    for split in ("val", "test"):
        unseen = sorted(present[split] - present["train"])
        if unseen:
            near = difflib.get_close_matches(unseen[0], sorted(present["train"]), 1, 0.6)
            raise TransferError(f"finetune: classes of the objects of {split} must occur in train, got {unseen[0]!r}, which does not"
                                f"{f'; is it {near[0]!r}?' if near else '.'} Train has {', '.join(sorted(present['train'])[:8])}.")
        notes += [f"No object of {split} is of class {name!r}: its AP there is not defined." for name in sorted(present["train"] - present[split])]
    everything = [item for split in SPLITS for item in objects[split]]
    for count, words in ((sum(item.clipped for item in everything), "boxes reached beyond their image and were cut to it."),
                         (sum(item.maskless for item in everything), "boxes hold no pixel of their mask and are left out."),
                         (sum(not any(not c for c in item.crowd) for item in everything), "images hold no object: they are negatives.")):
        if count:
            notes.append(f"{count} {words}")
    lost = sum(sum(not c for c in item.crowd) - len(scenes[case.record.name].names) for case, item in zip(data.of("train"), objects["train"], strict=True))
    if lost:
        notes.append(f"{lost} training objects are cut off or smaller than a pixel at the network's size and are not learnt.")
    if not any(scenes[case.record.name].names for case in data.of("train")):
        raise TransferError("finetune: objects of train must show at the network's size, got none that does. Take a larger --image-size, or --aspect pad.")
    classes = tuple(sorted(present["train"]))
    return replace(data, classes=classes, notes=(*data.notes, *notes)), masks


def _lacks_masks(objects: Objects) -> bool:
    """Whether an object that is no crowd has no mask."""
    return any(rle is None and not crowd for rle, crowd in zip(objects.masks, objects.crowd, strict=True))
