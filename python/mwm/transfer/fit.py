"""The training loop of every task: AdamW, warm-up and cosine, autocast, early stopping, best weights, and resuming at an epoch's start."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mwm.train import checkpoint, distributed
from mwm.transfer.config import FREE_ON_RESUME, FinetuneConfig, TransferError

CLIP = 5.0
"""Largest gradient norm."""

_LEAST_GAIN = 1e-4  # a smaller drop of a loss is noise


@dataclass(frozen=True)
class Fitted:
    """What a fit leaves beside the weights in the model.

    Attributes:
        history: One row per epoch: epoch, train_loss, lr, seconds, and what `judge` returned.
        chosen: The epoch that was kept (from 1), how many ran, and its value.
    """

    history: list[dict[str, float]]
    chosen: dict[str, Any]


def pick_device(name: str) -> torch.device:
    """The device that a setting names; "auto" is CUDA where there is one.

    Raises:
        TransferError: there is no such device.
    """
    try:
        return distributed.pick_device(name, "finetune")
    except ValueError as error:
        raise TransferError(str(error)) from error


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The context in which a forward pass runs in "fp32", "bf16" or "fp16".

    Raises:
        TransferError: fp16 on a CPU.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    if precision == "fp16" and device.type != "cuda":
        raise TransferError(f"finetune: precision must be fp32 or bf16 on {device.type}, got 'fp16'. Take bf16.")
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def rate(step: int, total: int, warm: int) -> float:
    """Share of the learning rate in a step (from 0): linear over `warm` steps, and a cosine over all."""
    return min((step + 1) / warm if warm else 1.0, 0.5 * (1 + math.cos(math.pi * step / total)))


def fit(model: nn.Module, batches_of: Callable[[int], Iterable[Any]], loss_of: Callable[[nn.Module, Any], Tensor], judge: Callable[[nn.Module], dict[str, float]], *,
        groups: list[dict[str, Any]], config: FinetuneConfig, per_epoch: int, device: torch.device, state: Path | None = None, better: str = "val_loss",
        checkpoint_seconds: float = 60.0, ids: Sequence[int] = ()) -> Fitted:
    """Train `model` in place; afterwards it holds the best epoch's weights and is in eval mode.

    No step waits for the device: losses are summed there and read once per epoch. Where `batches_of` is a pure function of the epoch, a fit that was
    killed and is called again with `config.resume` reaches the same weights, bit for bit on a CPU.

    Args:
        model: On its device.
        batches_of: epoch (from 0) -> the batches of that epoch, `per_epoch` of them.
        loss_of: (model, batch) -> scalar loss; runs under autocast.
        judge: model -> figures of the validation split, `better` among them; called after each epoch in eval mode without gradients.
        groups: Parameter groups for AdamW, each with `params`, `lr` and `weight_decay`.
        config: Of which epochs, patience, warmup_epochs, precision, resume and progress are used.
        per_epoch: Steps of an epoch.
        device: Of the model.
        state: File for the state to resume from; None keeps none. The caller removes it when the results are written.
        better: Name of the figure that chooses; lower is better for a name that ends in "loss", else higher.
        checkpoint_seconds: Least time between two states.
        ids: Of the training images, in order; the state of a fit to other images is refused.

    Raises:
        TransferError: the loss or every validation figure is not finite, or the state belongs to other settings, images or first weights.
    """
    total = config.epochs * per_epoch
    warm = min(round(config.warmup_epochs * per_epoch), max(1, total // 5))
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, fused=True if device.type == "cuda" else None)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    autocast(config.precision, device)  # refused before the first batch is made
    progress = _Progress(model, optimizer, scaler, better, [int(i) for i in ids])
    if config.resume and state is not None and state.is_file():
        progress.restore(checkpoint.load(state), config, device)
    parameters = [p for group in groups for p in group["params"]]
    saved = time.monotonic()
    bar = tqdm(total=total, initial=progress.epoch * per_epoch, desc="training", unit="step", leave=False, disable=not config.progress)
    while progress.epoch < config.epochs and progress.waited < config.patience:
        began, epoch = time.monotonic(), progress.epoch
        model.train()
        sum_loss, steps = torch.zeros((), device=device), 0
        for batch in batches_of(epoch):
            share = rate(min(epoch * per_epoch + steps, total - 1), total, warm)
            for group, base in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = base * share
            with autocast(config.precision, device):
                loss = loss_of(model, batch)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, CLIP)
            scaler.step(optimizer)
            scaler.update()
            sum_loss += loss.detach()
            steps += 1
            bar.update()
        mean_loss = sum_loss.item() / max(1, steps)
        if not math.isfinite(mean_loss):
            raise TransferError(f"finetune: loss must be finite, got {mean_loss} in epoch {epoch + 1}. Lower --lr.")
        model.eval()
        with torch.no_grad():
            figures = judge(model)
        progress.end_epoch({"epoch": epoch + 1, "train_loss": mean_loss, **figures, "lr": optimizer.param_groups[-1]["lr"],
                            "seconds": round(time.monotonic() - began, 3)})
        bar.set_postfix_str(f"epoch {epoch + 1}, loss {mean_loss:.3f}, {better.replace('_', ' ')} {figures[better]:.3f}")
        if state is not None and time.monotonic() - saved >= checkpoint_seconds:
            checkpoint.save(state, progress.state(config, device))
            saved = time.monotonic()
    bar.close()
    if not progress.best:
        raise TransferError(f"finetune: {better} must be finite, got NaN in every epoch. Lower --lr.")
    model.load_state_dict(progress.best)
    model.eval()
    row = progress.history[progress.best_epoch - 1]
    return Fitted(progress.history, {"epoch": progress.best_epoch, "epochs": len(progress.history), better: row[better]})


def _digest(model: nn.Module) -> str:
    """Hash of the parameters; buffers are left out: some are computed on the device, where the last bit may differ from run to run."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in model.named_parameters():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


class _Progress:
    """Where a fit stands after an epoch: weights, moments, history, the best epoch so far."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, better: str, ids: list[int]) -> None:
        self.model, self.optimizer, self.scaler, self.better, self.ids = model, optimizer, scaler, better, ids
        self.epoch, self.waited, self.best_epoch, self.history = 0, 0, 0, []
        self.best: dict[str, Tensor] = {}
        self.start = _digest(model)

    def end_epoch(self, row: dict[str, float]) -> None:
        self.history.append(row)
        self.epoch += 1
        before = self.history[self.best_epoch - 1][self.better] if self.best_epoch else None
        if self._improves(row[self.better], before):
            self.waited, self.best_epoch = 0, self.epoch
            for key, value in self.model.state_dict().items():
                if key in self.best:
                    self.best[key].copy_(value)
                else:
                    self.best[key] = value.detach().clone()
        else:
            self.waited += 1

    def _improves(self, value: float, before: float | None) -> bool:
        if not math.isfinite(value):
            return False
        if before is None:
            return True
        return value < before - _LEAST_GAIN if self.better.endswith("loss") else value > before

    def state(self, config: FinetuneConfig, device: torch.device) -> dict[str, Any]:
        cpu = lambda tensors: {key: value.detach().cpu() for key, value in tensors.items()}  # noqa: E731
        return {"format": checkpoint.FORMAT, "kind": "finetune", "config": config.to_dict(), "ids": self.ids, "start": self.start, "epoch": self.epoch, "waited": self.waited,
                "best_epoch": self.best_epoch, "history": self.history, "model": cpu(self.model.state_dict()), "best": cpu(self.best), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "random": torch.get_rng_state(), "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}

    def restore(self, stored: dict[str, Any], config: FinetuneConfig, device: torch.device) -> None:
        now = config.to_dict()
        if stored.get("kind") != "finetune":
            raise TransferError("finetune: resume must find the state of a fine-tuning run, got another. Leave out --resume to start anew.")
        changed = [name for name in now if name not in FREE_ON_RESUME and stored["config"].get(name) != now[name]]
        if changed:
            name = changed[0]
            raise TransferError(f"finetune: {name} must be {stored['config'].get(name)!r} as when the run began, got {now[name]!r}. Repeat the setting, or leave out "
                                "--resume to start anew.")
        if stored.get("ids", self.ids) != self.ids:
            raise TransferError("finetune: DATA must hold the training images of the interrupted run, got others. Repeat the setting, or leave out --resume to start anew.")
        if stored.get("start", self.start) != self.start:
            raise TransferError("finetune: first weights must be those of the interrupted run, got others (of another RUN, or of one that was trained on). Give that RUN again, "
                                "or leave out --resume to start anew.")
        checkpoint.load_into(self.model, stored["model"], "the state of the interrupted run")
        self.optimizer.load_state_dict(stored["optimizer"])
        self.scaler.load_state_dict(stored["scaler"])
        self.best = {key: value.to(device) for key, value in stored["best"].items()}
        self.epoch, self.waited, self.best_epoch, self.history = stored["epoch"], stored["waited"], stored["best_epoch"], stored["history"]
        torch.set_rng_state(stored["random"])
        if stored["random_cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(stored["random_cuda"], device)
