"""What every task does before it trains: read the list, decode the images once, refuse leaks, draw the share of labels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from mwm.data import ReadSettings, SkippedFiles, read_image
from mwm.data.signature import look_alikes, signature
from mwm.transfer.config import FinetuneConfig, TransferError
from mwm.transfer.fractions import keep_fraction, unit
from mwm.transfer.images import decode_cases, threads
from mwm.transfer.labelled import SPLITS, Labelled, lone_patients, read_labelled
from mwm.transfer.start import Start, open_start


@dataclass(frozen=True)
class Prepared:
    """Checked data and where to start.

    Attributes:
        start: The network and its preprocessing; `start.encoder(num_classes)` builds it.
        data: Cases and notes.
        decoded: Images by name, int16 [C, H, W] in 0 … LEVELS.
        skipped: Files that cannot be read.
    """

    start: Start
    data: Labelled
    decoded: dict[str, Tensor]
    skipped: SkippedFiles


def prepare(config: FinetuneConfig, need: str = "label") -> Prepared:
    """Read and check the data of a task.

    Args:
        config: What to do.
        need: What the task learns from: label, mask or boxes.

    Raises:
        TransferError: the data do not fit the task, or leak from one split into another.
    """
    start = open_start(config)
    settings = ReadSettings.from_dict(start.preprocessing.read)
    data = read_labelled(config.data, need=need, labels=config.label_names, masks=config.masks if need == "mask" else None, val_share=config.val_share,
                         test_share=config.test_share, seed=config.seed, allow_leak=config.allow_leak, settings=settings)
    data = replace(data, notes=(*data.notes, *start.notes))
    decoded, skipped = decode_cases(data.cases, start.preprocessing, strict=config.strict, progress=config.progress, workers=config.workers)
    data = data.keep(decoded)
    data = replace(data, notes=(*data.notes, *refuse_leaks(data, settings, allow=config.allow_leak, workers=config.workers)))
    start = start.fed(decoded, data.of("train"))
    data = few_labels(data, config)
    data = replace(data, notes=(*data.notes, *lone_patients(data)))
    if config.progress:
        counts = ", ".join(f"{len(data.of(split))} {split}" for split in SPLITS)
        print(f"{start.name}: {len(data.classes)} classes ({', '.join(data.classes)}), {counts} images")
        for note in data.notes:
            print(f"note: {note}")
    return Prepared(start, data, decoded, skipped)


def refuse_leaks(data: Labelled, settings: ReadSettings, *, allow: bool, workers: int = 0) -> list[str]:
    """Refuse near-identical images in two splits, or note them where they are allowed.

    Images are read again, without a border or a crop: the borders of padded images are alike, whatever lies between them.

    Args:
        data: With splits; all images readable.
        settings: How they are read; size and aspect are not used.
        allow: Note instead of refusing.
        workers: Threads; 0 = one per CPU, at most 8.

    Raises:
        TransferError: with the number of pairs and the first of them.
    """
    cases, plain = data.cases, replace(settings, aspect="stretch", size=(64, 64))
    with ThreadPoolExecutor(threads(workers)) as pool:
        signatures = list(pool.map(lambda case: signature(read_image(case.record, plain, channels=1)), cases))
    found = look_alikes(np.stack(signatures), [unit(case) for case in cases], [case.split for case in cases])
    if not found:
        return []
    first, second = cases[found[0].first], cases[found[0].second]
    if not allow:
        raise TransferError(f"finetune: images of two splits must differ, got {len(found)} near-identical pairs (the first: {first.record.name} in {first.split}, "
                            f"{second.record.name} in {second.split}). Put both into one split, remove one, or add --allow-leak.")
    return [f"LEAK allowed: {len(found)} pairs of near-identical images lie in two splits; figures of the test are too good."]


def few_labels(data: Labelled, config: FinetuneConfig) -> Labelled:
    """The data with the labels of a share of the training patients (`label_fraction`) and a note that says so; the other training images are left out."""
    if config.label_fraction >= 1:
        return data
    train = data.of("train")
    kept = keep_fraction(train, config.label_fraction, seed=config.seed)
    ids = {case.record.id for case in kept}
    cases = tuple(case for case in data.cases if case.split != "train" or case.record.id in ids)
    what = "patients" if data.patients_known else "images"
    note = (f"Labels of {len({unit(c) for c in kept})} of {len({unit(c) for c in train})} training {what} are used (label_fraction {config.label_fraction}, seed {config.seed}); "
            "the val split is whole.")
    return replace(data, cases=cases, notes=(*data.notes, note))
