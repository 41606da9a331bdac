"""Classification with a pre-trained encoder: all weights, a linear probe, or nearest neighbours. The test split is read once, at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mwm.train.export import Encoder
from mwm.transfer import frozen
from mwm.transfer.augment import Augment
from mwm.transfer.config import FinetuneConfig, TransferError
from mwm.transfer.fit import fit, pick_device
from mwm.transfer.images import CaseImages, epoch_rows, step_size
from mwm.transfer.labelled import SPLITS
from mwm.transfer.metrics import auroc, classification_metrics
from mwm.transfer.network import parameter_groups
from mwm.transfer.prepare import prepare
from mwm.transfer.results import Outcome, summary, write_results
from mwm.transfer.tasks import state_file


def run(config: FinetuneConfig, out: Path, command: str | None) -> None:
    """Train a classifier on a pre-trained encoder, measure it and write the results into `out`; see `mwm.transfer.finetune`."""
    began = time.perf_counter()
    ready = prepare(config)
    data, device = ready.data, pick_device(config.device)
    encoder = ready.start.encoder(len(data.classes))
    encoder.model.to(device, memory_format=torch.channels_last)
    sets = {split: CaseImages(data.of(split), ready.decoded, encoder.preprocessing, device) for split in SPLITS}
    if config.linear_probe:
        outcome = frozen.linear(config, encoder, sets, device)
    elif config.knn:
        outcome = frozen.neighbours(config, encoder, sets, device, len(data.classes))
    else:
        outcome = train(config, encoder, sets, device, state=state_file(out))
    figures = {split: classification_metrics(sets[split].labels.cpu().numpy(), outcome.probabilities[split],
                                             [case.patient for case in data.of(split)] if data.patients_known else None,
                                             rounds=config.bootstrap, seed=config.seed) for split in ("val", "test")}
    write_results(out, config, encoder, data, outcome, figures, ready.skipped, seconds=time.perf_counter() - began, command=command)
    if config.progress or command:
        print(summary(figures["test"]))
        print(f"results in {out}")


def train(config: FinetuneConfig, encoder: Encoder, sets: Mapping[str, CaseImages], device: torch.device, *, state: Path | None = None) -> Outcome:
    """AdamW on all weights with `fit`; the epoch with the lowest val loss is kept. Validation and test are computed in fp32, whatever the training is."""
    model, images = encoder.model, sets["train"]
    classes = int(images.labels.max()) + 1
    counts = torch.bincount(images.labels, minlength=classes)
    weight = counts.sum() / (classes * counts) if config.balanced else torch.ones(classes, device=device)
    criterion = nn.CrossEntropyLoss(weight, label_smoothing=config.label_smoothing)
    size = step_size(len(images), config.batch_size)
    if len(images) < 2:
        raise TransferError(f"finetune: train must hold at least two images, got {len(images)}.")
    augment = Augment(config.crop, config.flip, config.seed)

    def batches_of(epoch: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        shares = mixing_shares(config.mixup, len(images) // size, seed=config.seed, epoch=epoch)
        batches = images.batches(size, rows=epoch_rows(len(images), size, seed=config.seed, epoch=epoch), augment=augment, epoch=epoch)
        for (x, y, _), share in zip(batches, shares, strict=True):
            yield (x if share == 1 else share * x + (1 - share) * x.flip(0)), y, share

    def loss_of(network: nn.Module, batch: tuple[Tensor, Tensor, float]) -> Tensor:
        x, y, share = batch
        logits = network(x)
        return criterion(logits, y) if share == 1 else share * criterion(logits, y) + (1 - share) * criterion(logits, y.flip(0))

    def judge(network: nn.Module) -> dict[str, float]:
        logits = predict_logits(network, sets["val"], config.batch_size)
        loss = nn.functional.cross_entropy(logits, sets["val"].labels.cpu(), weight.cpu())
        return {"val_loss": float(loss), "val_auroc": auroc(sets["val"].labels.cpu().numpy(), torch.softmax(logits.double(), 1).numpy())}

    fitted = fit(model, batches_of, loss_of, judge, groups=parameter_groups(encoder, config.lr, config.layer_decay, config.weight_decay), config=config,
                 per_epoch=len(images) // size, device=device, state=state, ids=images.ids.tolist())
    probabilities = {split: torch.softmax(predict_logits(model, sets[split], config.batch_size).double(), 1).numpy() for split in ("val", "test")}
    return Outcome("fine-tuning", probabilities, dict(model.state_dict()), fitted.history, fitted.chosen | {"batch_size": size})


@torch.no_grad()
def predict_logits(model: nn.Module, images: CaseImages, size: int) -> Tensor:
    """Logits of all images in eval mode. float32 [N, K] on the CPU"""
    model.eval()
    return torch.cat([model(x).float() for x, _, _ in images.batches(size)]).cpu()


def mixing_shares(mixup: float, steps: int, *, seed: int, epoch: int) -> list[float]:
    """Share of the first image in every mixed pair of each step, from Beta(mixup, mixup), as in Zhang et al. (2018); 1 where nothing is mixed."""
    if not mixup:
        return [1.0] * steps
    return np.random.default_rng([seed, epoch, 1]).beta(mixup, mixup, steps).tolist()
