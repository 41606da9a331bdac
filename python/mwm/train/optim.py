"""Optimizer, parameter groups and schedules; every value is a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from mwm.train.config import PretrainConfig


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay of every step: linear warm-up, then cosine; cosine decay of weight decay.

    Attributes:
        steps: optimizer steps of the run.
        warmup: steps of linear warm-up.
        peak_lr, end_lr: learning rate after the warm-up and at the end.
        start_decay, end_decay: weight decay at the start and at the end.
    """

    steps: int
    warmup: int
    peak_lr: float
    end_lr: float
    start_decay: float
    end_decay: float

    @classmethod
    def of(cls, config: PretrainConfig, steps_per_epoch: int, batch_size: int) -> Schedule:
        """The schedule of a run; learning rates scale with batch_size / 256."""
        warmup = config.warmup_epochs if config.warmup_epochs is not None else 0.08 * config.epochs
        scale = batch_size / 256
        return cls(config.epochs * steps_per_epoch, round(warmup * steps_per_epoch), config.base_lr * scale, config.min_lr * scale,
                   config.weight_decay, config.weight_decay_end)

    def lr(self, step: int) -> float:
        """Learning rate of step `step`, from 0."""
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        return _cosine(self.peak_lr, self.end_lr, (step - self.warmup) / max(1, self.steps - self.warmup))

    def weight_decay(self, step: int) -> float:
        """Weight decay of step `step`, from 0."""
        return _cosine(self.start_decay, self.end_decay, step / max(1, self.steps))

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the optimizer's groups for step `step`; groups marked `decays` = False keep weight decay 0."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr(step)
            group["weight_decay"] = self.weight_decay(step) if group["decays"] else 0.0


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def parameter_groups(model: nn.Module) -> list[dict]:
    """Two groups: weights, which decay; biases, norms and tokens, which do not.

    A parameter does not decay when it has at most one axis, is called a mask token or layer scale (which torchvision gives three axes), or belongs to a norm.
    """
    norms = {f"{name}." for name, module in model.named_modules()
             if "Norm" in type(module).__name__ and next(module.children(), None) is None}
    decays, stays = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        free = parameter.ndim <= 1 or name.endswith(("mask_token", "layer_scale")) or any(name.startswith(norm) for norm in norms)
        (stays if free else decays).append(parameter)
    return [{"params": decays, "decays": True}, {"params": stays, "decays": False}]


def create_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """LAMB (timm's) or AdamW over `parameter_groups(model)`.

    The second beta is 0.95 with batch norm in the encoder and 0.999 else (the paper's choice for ResNet and ConvNeXt).
    """
    batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.net.modules())
    betas = (0.9, config.beta2 if config.beta2 is not None else (0.95 if batch_norm else 0.999))
    groups = parameter_groups(model)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.base_lr, betas=betas, weight_decay=0.0)
    from timm.optim import Lamb

    return Lamb(groups, lr=config.base_lr, betas=betas, weight_decay=0.0, max_grad_norm=None)
