"""The dense network of a task: pooled features for a probe, learning rates by depth for fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mwm.train.export import Encoder
from mwm.transfer.config import TransferError


class PooledFeatures(nn.Module):
    """Mean over the image of the last feature map before the classifier. [B, C, H, W] -> [B, K]"""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if hasattr(model, "forward_features"):
            self.body, self.features = model, model.forward_features
        elif isinstance(getattr(model, "features", None), nn.Module):
            self.body = self.features = model.features
        else:
            parts = list(model.named_children())
            names = [name for name, _ in parts]
            if "avgpool" not in names:
                raise TransferError(f"finetune: encoder must have forward_features, features or avgpool, got {type(model).__name__} without them. "
                                    "Leave out --linear-probe.")
            self.body = self.features = nn.Sequential(*(part for _, part in parts[: names.index("avgpool")]))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, K], the last map averaged over positions"""
        y = self.features(images)
        if y.ndim != 4:
            raise TransferError(f"finetune: features of the encoder must be maps [B, K, H, W], got {list(y.shape)}. Leave out --linear-probe.")
        return y.mean((2, 3))


@torch.no_grad()
def extract(features: nn.Module, loader: Iterable[tuple[Tensor, ...]], device: torch.device) -> Tensor:
    """Features of all images of a loader. -> float32 [N, K] on the CPU"""
    features.eval()
    return torch.cat([features(batch[0].to(device)).float().cpu() for batch in loader])


def stage_of(name: str) -> str:
    """Stage that a parameter belongs to: the first part of its name, or two where the first only collects."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in {"stages", "features", "blocks"} and len(parts) > 2 else parts[0]


def parameter_groups(encoder: Encoder, lr: float, layer_decay: float, weight_decay: float) -> list[dict]:
    """Groups for AdamW: each stage before the head learns `layer_decay` times slower than the next; norms and biases do not decay.

    Args:
        encoder: A loaded encoder; its head learns at `lr`.
        lr: Learning rate of the head.
        layer_decay: Factor per stage.
        weight_decay: Of weights with two or more dimensions.
    """
    head = set(encoder.head)
    stages = list(dict.fromkeys(stage_of(name) for name, _ in encoder.model.named_parameters() if name not in head))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in encoder.model.named_parameters():
        depth = 0 if name in head else len(stages) - stages.index(stage_of(name)) - 1
        key = (lr * layer_decay**depth, weight_decay if parameter.ndim > 1 else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]
