"""Classification with a pre-trained encoder: a linear probe, or all weights. The test split is read once, at the end."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from mwm.data import ReadSettings
from mwm.train import load_encoder
from mwm.train.export import Encoder
from mwm.transfer.config import FinetuneConfig, TransferError
from mwm.transfer.images import CaseImages, batches, decode_cases
from mwm.transfer.labelled import Labelled, read_labelled
from mwm.transfer.metrics import auroc, classification_metrics
from mwm.transfer.network import PooledFeatures, extract, parameter_groups
from mwm.transfer.probe import STRENGTHS, fit_logistic, recalibrate_batchnorm
from mwm.transfer.results import Outcome, summary, write_results


def run(config: FinetuneConfig, out: Path, command: str | None) -> None:
    """Train a classifier on a pre-trained encoder, measure it and write the results into `out`; see `mwm.transfer.finetune`."""
    began = time.perf_counter()
    source = Path(config.run)
    stored = ReadSettings.from_dict(load_encoder(source).preprocessing.read)
    settings = stored if config.intensity is None else replace(stored, intensity=config.intensity)
    data = read_labelled(config.data, labels=config.label_names, val_share=config.val_share, test_share=config.test_share, seed=config.seed,
                         allow_leak=config.allow_leak, settings=settings)
    torch.manual_seed(config.seed)
    encoder = load_encoder(source, num_classes=len(data.classes))
    device = _device(config.device)
    encoder.model.to(device, memory_format=torch.channels_last)
    differences = settings.differences(stored)
    if differences:
        encoder = replace(encoder, preprocessing=replace(encoder.preprocessing, read=settings.to_dict()))
        data = replace(data, notes=(*data.notes, *differences))
    decoded, skipped = decode_cases(data.cases, encoder.preprocessing, strict=config.strict, progress=config.progress)
    data = data.keep(decoded)
    sets = {split: CaseImages(data.of(split), decoded, encoder.preprocessing, seed=config.seed) for split in ("train", "val", "test")}
    if config.progress:
        counts = ", ".join(f"{len(s)} {name}" for name, s in sets.items())
        print(f"{encoder.name}: {len(data.classes)} classes ({', '.join(data.classes)}), {counts} images")
        for note in data.notes:
            print(f"note: {note}")
    outcome = _probe(config, encoder, data, sets, device) if config.linear_probe else _train(config, encoder, data, sets, device)
    figures = {split: classification_metrics(np.array([c.label for c in data.of(split)]), outcome.probabilities[split],
                                             [c.patient for c in data.of(split)] if data.patients_known else None,
                                             rounds=config.bootstrap, seed=config.seed) for split in ("val", "test")}
    write_results(out, config, encoder, data, outcome, figures, skipped, seconds=time.perf_counter() - began, command=command)
    if config.progress or command:
        print(summary(figures["test"]))
        print(f"results in {out}")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TransferError(f"finetune: device must be auto, cpu, cuda or cuda:N, got {name!r}.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TransferError(f"finetune: device must be present, got {name!r} on a machine without CUDA. Use cpu.")
    return device


def _probe(config: FinetuneConfig, encoder: Encoder, data: Labelled, sets: dict[str, CaseImages], device: torch.device) -> Outcome:
    """Standardised pooled features and a logistic regression; C by the val split, then fitted to train and val together."""
    features = PooledFeatures(encoder.model).to(device)
    load = lambda split: _bar(batches(sets[split], config.batch_size, workers=config.workers), sets[split], config, split)  # noqa: E731
    recalibrate_batchnorm(features, (batch[0].to(device) for batch in load("train")))
    labels = {split: np.array([case.label for case in data.of(split)]) for split in sets}
    x = {split: extract(features, load(split), device).double().numpy() for split in ("train", "val")}
    if not all(np.isfinite(values).all() for values in x.values()):
        raise TransferError("finetune: features of the encoder must be finite, got NaN. Pre-train again; the run has diverged.")
    scores = {c: auroc(labels["val"], fit_logistic(x["train"], labels["train"], c).predict_proba(x["val"])) for c in STRENGTHS}
    strength = max(scores, key=lambda c: (scores[c], -c))
    val = fit_logistic(x["train"], labels["train"], strength).predict_proba(x["val"])
    final = fit_logistic(np.concatenate([x["train"], x["val"]]), np.concatenate([labels["train"], labels["val"]]), strength)
    test = final.predict_proba(extract(features, load("test"), device).double().numpy())
    scaler, regression = final[0], final[1]
    weights = {"mean": scaler.mean_, "scale": scaler.scale_, "weight": regression.coef_, "bias": regression.intercept_}
    return Outcome("linear probe", {"val": val, "test": test}, {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in weights.items()}, "probe.safetensors",
                   [{"C": c, "val_auroc": s} for c, s in scores.items()],
                   {"C": strength, "features": x["train"].shape[1], "batch_norm": "statistics of the training images, unlabelled"})


def _train(config: FinetuneConfig, encoder: Encoder, data: Labelled, sets: dict[str, CaseImages], device: torch.device) -> Outcome:
    """AdamW on all weights, one-cycle cosine; the epoch with the lowest val loss is kept."""
    model = encoder.model
    counts = np.bincount([case.label for case in data.of("train")], minlength=len(data.classes))
    weight = torch.tensor(counts.sum() / (len(counts) * counts) if config.balanced else np.ones(len(counts)), dtype=torch.float32, device=device)
    loss_of = nn.CrossEntropyLoss(weight, label_smoothing=config.label_smoothing)
    optimizer = torch.optim.AdamW(parameter_groups(encoder, config.lr, config.layer_decay, config.weight_decay))
    images = CaseImages(data.of("train"), sets["train"].decoded, encoder.preprocessing, crop=config.crop, flip=config.flip, seed=config.seed)
    size = min(config.batch_size, len(images))
    if size < 2:
        raise TransferError(f"finetune: train must hold at least two images, got {len(images)}.")
    per_epoch = len(images) // size
    total, warm = config.epochs * per_epoch, max(1, min(per_epoch, config.epochs * per_epoch // 5))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / warm, 0.5 * (1 + math.cos(math.pi * s / total))))
    best, kept, waited, history = math.inf, {}, 0, []
    for epoch in range(config.epochs):
        model.train()
        images.epoch, sum_loss = epoch, 0.0
        # The rest of an epoch is dropped (another one each time): batch norm needs full batches.
        order = np.random.default_rng([config.seed, epoch]).permutation(len(images))[: per_epoch * size]
        for x, y, _ in _bar(batches(images, size, order=order.tolist(), workers=config.workers), order, config, f"epoch {epoch + 1}", size):
            loss = loss_of(model(x.to(device, memory_format=torch.channels_last)), y.to(device))
            if not torch.isfinite(loss):
                raise TransferError(f"finetune: loss must be finite, got {loss.item()} in epoch {epoch + 1}. Lower --lr.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            sum_loss += loss.item()
        logits, truth = _logits(model, sets["val"], config, device)
        val_loss = float(nn.functional.cross_entropy(logits, truth, weight.cpu()))
        history.append({"epoch": epoch + 1, "train_loss": sum_loss / per_epoch, "val_loss": val_loss,
                        "val_auroc": auroc(truth.numpy(), _softmax(logits)), "lr": optimizer.param_groups[-1]["lr"]})
        if val_loss < best - 1e-4:
            best, kept, waited = val_loss, copy.deepcopy(model.state_dict()), 0
        else:
            waited += 1
        if waited >= config.patience:
            break
    if not kept:
        raise TransferError("finetune: loss on val must be finite, got NaN in every epoch. Lower --lr.")
    model.load_state_dict(kept)
    probabilities = {split: _softmax(_logits(model, sets[split], config, device)[0]) for split in ("val", "test")}
    chosen = min(history, key=lambda row: row["val_loss"])["epoch"]
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    return Outcome("fine-tuning", probabilities, state, "model.safetensors", history, {"epoch": chosen, "epochs": len(history)})


@torch.no_grad()
def _logits(model: nn.Module, images: CaseImages, config: FinetuneConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    model.eval()
    rows = [(model(x.to(device, memory_format=torch.channels_last)).float().cpu(), y) for x, y, _ in batches(images, config.batch_size, workers=config.workers)]
    return torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])


def _softmax(logits: Tensor) -> NDArray:
    return torch.softmax(logits.double(), 1).numpy()


def _bar(loader: Any, rows: Any, config: FinetuneConfig, words: str, size: int | None = None) -> Any:
    steps = -(-len(rows) // (size or config.batch_size))
    return tqdm(loader, total=steps, desc=words, unit="batch", leave=False, disable=not config.progress)
