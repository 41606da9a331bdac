"""Masks of new images by a trained network: PNG at the size of the image, NIfTI on the voxels of the volume."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from mwm import view
from mwm.data import DataError, ReadSettings, Record, SkippedFiles, UnreadableImage, read_list
from mwm.data.csv_cells import file_cell
from mwm.data.image import decode
from mwm.data.masks import stem_of
from mwm.data.volumes import is_volume, write_volume
from mwm.train.export import Encoder, full_model, head_keys, refuse_larger
from mwm.transfer.config import TransferError
from mwm.transfer.fit import pick_device
from mwm.transfer.images import threads
from mwm.transfer.pyramid import SegmentationNetwork, mask_network
from mwm.transfer.results import new_results, open_results
from mwm.transfer.segment_images import read_settings, to_source
from mwm.transfer.segment_masks import MaskClasses
from mwm.transfer.segment_results import own_names
from mwm.transfer.stored import FACTS, StoredModel, read_model, read_weights

Answer = tuple[NDArray[np.uint8], NDArray[np.float32]]


class Segmenter:
    """A trained mask network of a folder of results.

    Args:
        results: Folder that `mwm finetune --task segment` wrote.
        device: auto | cpu | cuda | cuda:N

    Attributes:
        classes: What the labels mean.
        settings: How images are read.

    Raises:
        TransferError: the folder holds no such network, or it is damaged.
    """

    def __init__(self, results: str | Path, device: str = "auto") -> None:
        self.model: StoredModel = read_model(results)
        if self.model.task != "segment":
            raise TransferError(f"predict: RESULTS must be of task segment, got {self.model.task}. Give another folder.")
        width, norm = self.model.facts.get("head_width"), self.model.facts.get("head_norm")
        try:
            self.classes = MaskClasses.from_json(json.dumps(self.model.facts["mask_classes"]))
            self.classes.check()
            whole = isinstance(width, int) and 8 <= width <= 2048 and width % 8 == 0 and norm in ("group", "batch")
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise TransferError(f"predict: model.json of {Path(results).name} must tell mask_classes, head_width and head_norm of the network, got others. Run mwm finetune again.")
        self.settings = read_settings(self.model.preprocessing)
        self.device = pick_device(device)
        weights = read_weights(results)
        refuse_larger(self.model.encoder, self.model.preprocessing.channels, weights)
        plain = full_model(self.model.encoder, self.model.preprocessing.channels, 1)
        encoder = Encoder(plain, self.model.encoder, head_keys(self.model.encoder, plain), (), self.model.preprocessing)
        self.network: SegmentationNetwork = mask_network(encoder, len(self.classes.names) + 1, width=width, norm=norm)
        try:
            self.network.load_state_dict(own_names(weights))
        except RuntimeError as error:
            raise TransferError(f"predict: the weights of {Path(results).name} do not fit {self.model.encoder}. Use the timm or torchvision version that wrote them, or run "
                                "mwm finetune again.") from error
        self.network.to(self.device, memory_format=torch.channels_last).eval()

    @torch.no_grad()
    def __call__(self, images: Sequence[Record | str | Path], *, batch_size: int = 16, workers: int = 0) -> Iterator[Answer | UnreadableImage]:
        """Labels and probabilities of images, in order, each at the size of its file.

        Args:
            images: Files, or records (slices of volumes).
            batch_size: Images per step.
            workers: Threads that read; 0 = one per CPU, at most 8.

        Yields:
            Labels (0 = background, k = class k) uint8 [h, w] and probabilities float32 [K + 1, h, w], background first; or why an image cannot be read.
        """
        preprocessing = self.model.preprocessing

        def read(image: Record | str | Path):
            try:
                return decode(image, self.settings, channels=preprocessing.channels)
            except UnreadableImage as error:
                return error

        with ThreadPoolExecutor(threads(workers)) as pool:
            for start in range(0, len(images), batch_size):
                found = list(pool.map(read, images[start : start + batch_size]))
                good = [item for item in found if not isinstance(item, UnreadableImage)]
                answers = iter(())
                if good:
                    batch = preprocessing.normalise(torch.stack([item[0].clamp(0, 1) for item in good]).to(self.device))
                    answers = iter(self.network(batch.contiguous(memory_format=torch.channels_last)).cpu())
                for item in found:
                    if isinstance(item, UnreadableImage):
                        yield item
                        continue
                    logits = to_source(next(answers), item[1], self.settings, item[2])
                    yield logits.argmax(0).to(torch.uint8).numpy(), torch.softmax(logits, 0).numpy()


def predict_masks(results: str | Path, images: str | Path | Sequence[Record], out: str | Path, *, probabilities: bool = False, split: str | None = None,
                  batch_size: int = 16, workers: int = 0, device: str = "auto", strict: bool = False, overwrite: bool = False, progress: bool = True) -> Path:
    """Write masks of images into a folder.

    `masks/` mirrors the paths of the images: PNG at the size of the image as it is shown (0 and 255 for one foreground, else the values that masks.json
    lists), for NIfTI a volume of the source's shape and affine with 1 for one foreground. `probabilities/` holds, where asked for, round(255 p) as PNG, or
    p as float32 NIfTI, one file per class. predictions.csv lists pixels per class and the highest probability of any foreground; skipped.csv what cannot be read.

    Args:
        results: Folder that `mwm finetune --task segment` wrote.
        images: Folder, glob, list, index CSV, or records.
        out: New folder.
        probabilities: Write them too.
        split: Only this split of an index CSV.
        batch_size: Images per step.
        workers: Threads that read; 0 = one per CPU, at most 8.
        device: auto | cpu | cuda | cuda:N
        strict: Raise at an unreadable image instead of leaving it out.
        overwrite: Replace a folder that an earlier call made.
        progress: Show a bar.

    Returns:
        `out`.

    Raises:
        TransferError, DataError: the network or the images cannot be used; the message says what to do.
        FileExistsError: `out` exists.
        UnreadableImage: with `strict`.
    """
    out = Path(out)
    if (out / FACTS).exists():
        raise FileExistsError(f"predict: out must be a folder for masks, got {out}, which holds a trained model. Choose another.")
    open_results(out, overwrite=overwrite, command="predict")
    segmenter = Segmenter(results, device)
    records = list(read_list(images, split=split, settings=segmenter.settings))
    if any(Path(record.name).is_absolute() or ".." in Path(record.name).parts for record in records):
        raise DataError("predict: names of images must be relative paths inside their folder, got others. Pass a folder or a list.")
    skipped, classes = SkippedFiles(), segmenter.classes
    with new_results(out) as folder:
        writer = _Writer(folder, classes, segmenter.settings, probabilities=probabilities)
        answers = segmenter(records, batch_size=batch_size, workers=workers)
        bar = tqdm(total=len(records), desc="masks", unit="image", leave=False, disable=not progress)
        for path, group in groupby(records, key=lambda record: record.path):
            volume: dict[str, tuple[NDArray, NDArray | None]] = {}
            for record in group:
                answer = next(answers)
                bar.update()
                if isinstance(answer, UnreadableImage):
                    if strict:
                        raise answer
                    skipped.add(record.name, str(answer))
                elif is_volume(path) and record.frame:
                    volume[record.frame] = answer[0], answer[1] if probabilities else None
                    writer.note(record, writer.place(stem_of(record.name.rpartition("#")[0]), path), answer)
                else:
                    writer.picture(record, *answer)
            if volume:
                writer.volume(path, record.name.rpartition("#")[0], volume)
        bar.close()
        if not writer.rows:
            raise TransferError(f"predict: IMAGES must hold readable images, got {len(records)} that are not. The first: {next(iter(skipped))[1]}")
        writer.finish()
        skipped.write(folder / "skipped.csv")
        (folder / "metrics.json").write_text(json.dumps({"task": "segment", "method": "prediction", "images": len(writer.rows), "skipped": len(skipped)}, indent=2) + "\n")
    return out


class _Writer:
    """Where the masks of each image go, and what predictions.csv says of them."""

    def __init__(self, folder: Path, classes: MaskClasses, settings: ReadSettings, *, probabilities: bool) -> None:
        self.folder, self.classes, self.settings, self.probabilities = folder, classes, replace(settings, size=None), probabilities
        self.rows: list[list[object]] = []
        self.places: dict[str, Path] = {}

    def place(self, stem: str, source: Path) -> str:
        """Path of the mask of a file, without its ending, relative to masks/; two files of one stem keep their endings."""
        owner = self.places.setdefault(stem, source)
        return stem if owner == source else f"{stem}{source.name[len(stem_of(source.name)):]}"

    def note(self, record: Record, place: str, answer: Answer) -> None:
        labels, chances = answer
        ending = ".png" if not (record.frame and is_volume(record.path)) else record.path.name[len(stem_of(record.path.name)):]
        counts = np.bincount(labels.ravel(), minlength=len(self.classes.names) + 1)[1:]
        self.rows.append([file_cell(record.name), f"masks/{place}{ending}", *counts.tolist(), f"{1 - chances[0].min():.6f}"])

    def picture(self, record: Record, labels: NDArray, chances: NDArray) -> None:
        name = record.name if record.frame is None else record.name.rpartition("#")[0]
        place = self.place(stem_of(name), record.path) + (f"_{record.frame}" if record.frame else "")
        self.note(record, place, (labels, chances))
        values = np.array([0, *self.classes.written], np.uint8)
        view.save(Image.fromarray(values[labels]), self.folder / "masks" / f"{place}.png")
        if self.probabilities:
            for suffix, plane in zip(self._suffixes(), chances[1:], strict=True):
                view.save(Image.fromarray(np.rint(plane * 255).astype(np.uint8)), self.folder / "probabilities" / f"{place}{suffix}.png")

    def volume(self, source: Path, name: str, slices: dict[str, tuple[NDArray, NDArray | None]]) -> None:
        place, ending = self.place(stem_of(name), source), source.name[len(stem_of(source.name)):]
        values = np.array([0, *self.classes.labels], np.uint8 if max(self.classes.labels) < 256 else np.uint16)
        write_volume(source, {frame: values[labels] for frame, (labels, _) in slices.items()}, self.folder / "masks" / f"{place}{ending}", self.settings)
        if self.probabilities:
            for k, suffix in enumerate(self._suffixes(), 1):
                write_volume(source, {frame: chances[k] for frame, (_, chances) in slices.items()}, self.folder / "probabilities" / f"{place}{suffix}{ending}", self.settings)

    def _suffixes(self) -> list[str]:
        """What stands behind the name of a file of probabilities, per class."""
        names = [re.sub(r"[^\w-]+", "_", name) for name in self.classes.names]
        if len(set(names)) < len(names):
            names = [str(k) for k in range(1, len(names) + 1)]
        return [""] if len(names) == 1 else [f"_{name}" for name in names]

    def finish(self) -> None:
        with (self.folder / "predictions.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "mask", *(f"pixels_{name}" for name in self.classes.names), "highest_probability"])
            writer.writerows(self.rows)
        legend = {"png": dict(zip(self.classes.names, self.classes.written, strict=True)), "nifti": dict(zip(self.classes.names, self.classes.labels, strict=True)),
                  "background": 0}
        (self.folder / "masks.json").write_text(json.dumps(legend, indent=2) + "\n")
