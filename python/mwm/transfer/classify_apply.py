"""A trained classifier applied to images: one row of probabilities each."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mwm.data import ReadSettings, SkippedFiles, read_list
from mwm.data.csv_cells import file_cell, text_cell
from mwm.train.export import full_model, refuse_larger
from mwm.transfer.config import TransferError
from mwm.transfer.fit import pick_device
from mwm.transfer.frozen import logistic_probabilities
from mwm.transfer.images import CaseImages, decode_cases
from mwm.transfer.knn import knn_probabilities
from mwm.transfer.labelled import Case
from mwm.transfer.network import PooledFeatures
from mwm.transfer.results import new_results, open_results
from mwm.transfer.stored import read_model, read_weights

_CHUNK = 512  # images in memory at once


def predict_classes(results: str | Path, images: str | Path, out: str | Path, *, split: str | None = None, batch_size: int = 16, workers: int = 0, device: str = "auto",
                    strict: bool = False, overwrite: bool = False, progress: bool = True) -> Path:
    """Write predictions.csv (file, predicted, p_CLASS …) of images into a folder, and skipped.csv where files cannot be read.

    Args:
        results: Folder that `mwm finetune --task classify` wrote.
        images: Folder, glob, list or index CSV.
        out: New folder.
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
        TransferError, DataError: the model or the images cannot be used; the message says what to do.
        FileExistsError: `out` exists.
        UnreadableImage: with `strict`.
    """
    out = Path(out)
    open_results(out, overwrite=overwrite, command="predict")
    stored, place = read_model(results), pick_device(device)
    answer = load_classifier(results, place)
    records = read_list(images, split=split, settings=ReadSettings.from_dict(stored.preprocessing.read))
    skipped = SkippedFiles()
    with new_results(out) as folder:
        with (folder / "predictions.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "predicted", *(f"p_{name}" for name in stored.classes)])
            bar = tqdm(total=len(records), desc="predicting", unit="image", leave=False, disable=not progress)
            for start in range(0, len(records), _CHUNK):
                part = [Case(record, 0, "", "") for record in records[start : start + _CHUNK]]
                decoded, left_out = decode_cases(part, stored.preprocessing, strict=strict, workers=workers)
                for name, reason in left_out:
                    skipped.add(name, reason)
                cases = CaseImages([case for case in part if case.record.name in decoded], decoded, stored.preprocessing, place)
                for x, _, rows in cases.batches(batch_size):
                    for k, row in zip(rows.tolist(), answer(x).cpu(), strict=True):
                        writer.writerow([file_cell(cases.cases[k].record.name), text_cell(stored.classes[int(row.argmax())]), *(f"{p:.6f}" for p in row.tolist())])
                bar.update(len(part))
            bar.close()
        if len(skipped) == len(records):
            raise TransferError(f"predict: IMAGES must hold readable images, got {len(records)} that are not. The first: {skipped.rows[0][1]}")
        skipped.write(folder / "skipped.csv")
        facts = {"task": "classify", "method": "prediction", "classes": list(stored.classes), "images": len(records) - len(skipped), "skipped": len(skipped)}
        (folder / "metrics.json").write_text(json.dumps(facts, indent=2) + "\n")
    return out


def load_classifier(results: str | Path, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """The classifier of a folder of results.

    Args:
        results: Written by `finetune`.
        device: Where it computes.

    Returns:
        A function from images, normalised as model.json's preprocessing says, float32 [B, C, H, W], to probabilities, float64 [B, classes].

    Raises:
        TransferError: the folder is not whole, or the weights do not fit.
    """
    stored, weights = read_model(results), read_weights(results)
    whole = stored.method == "fine-tuning"
    refuse_larger(stored.encoder, stored.preprocessing.channels, weights)
    model = full_model(stored.encoder, stored.preprocessing.channels, len(stored.classes))
    try:
        outcome = model.load_state_dict(weights, strict=whole)
    except RuntimeError as error:
        raise TransferError(f"predict: the weights of {Path(results).name} do not fit {stored.encoder} ({str(error).splitlines()[-1].strip()[:160]}). Use the timm or torchvision "
                            "version that metrics.json's mwm was installed with.") from error
    if outcome.unexpected_keys:
        raise TransferError(f"predict: the weights of {Path(results).name} do not fit {stored.encoder}, which lacks {outcome.unexpected_keys[0]}. Run mwm finetune again.")
    body: nn.Module = (model if whole else PooledFeatures(model)).to(device, memory_format=torch.channels_last).eval()
    if whole:
        return torch.no_grad()(lambda images: torch.softmax(body(images).double(), 1))
    if stored.method == "linear probe":
        head = _tensors(results, "probe.safetensors", ("mean", "scale", "weight", "bias"), device)
        rows = 1 if len(stored.classes) == 2 else len(stored.classes)
        if not (head["weight"].ndim == 2 and len(head["weight"]) == len(head["bias"]) == rows and head["weight"].shape[1] == head["mean"].numel() == head["scale"].numel()):
            raise TransferError(f"predict: probe.safetensors of {Path(results).name} does not fit its {len(stored.classes)} classes. Run mwm finetune again.")
        return torch.no_grad()(lambda images: logistic_probabilities(body(images), head))
    if stored.method == "k-NN":
        bank = _tensors(results, "knn.safetensors", ("features", "labels"), device)
        k, temperature = stored.facts.get("k"), stored.facts.get("temperature")
        if not (isinstance(k, int) and k >= 1 and isinstance(temperature, float) and 0 < temperature < float("inf")):
            raise TransferError(f"predict: model.json of {Path(results).name} must tell k and temperature, got {k!r} and {temperature!r}. Run mwm finetune again.")
        if bank["features"].ndim != 2 or not 0 < len(bank["features"]) == bank["labels"].numel():
            raise TransferError(f"predict: knn.safetensors of {Path(results).name} must hold one label per row of features. Run mwm finetune again.")
        if not 0 <= int(bank["labels"].min()) <= int(bank["labels"].max()) < len(stored.classes):
            raise TransferError(f"predict: labels in knn.safetensors must be below {len(stored.classes)} (the classes), got {int(bank['labels'].max())}. Run mwm finetune again.")
        return torch.no_grad()(lambda images: knn_probabilities(bank["features"], bank["labels"], body(images), k, len(stored.classes), temperature=temperature))
    raise TransferError(f"predict: method must be fine-tuning, linear probe or k-NN, got {stored.method!r}. Use the version of mwm that wrote it.")


def _tensors(results: str | Path, name: str, keys: tuple[str, ...], device: torch.device | str) -> dict[str, Tensor]:
    """The tensors that a method needs beside the network."""
    found = read_weights(results, name)
    lacking = [key for key in keys if key not in found]
    if lacking:
        raise TransferError(f"predict: {name} of {Path(results).name} must hold {', '.join(keys)}, got none named {lacking[0]}. Run mwm finetune again.")
    return {key: found[key].to(device) for key in keys}
