"""From a pre-trained pyramid to files that timm, torchvision and `load_encoder` read: the keys of the full plain model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mwm
from mwm.train.checkpoint import write_atomic, write_text
from mwm.train.config import MAX_CHANNELS, TrainError

ENCODER = "encoder.safetensors"
_TORCHVISION = "torchvision/"
_TORCHVISION_HEADS = ("fc.", "classifier.")


@dataclass(frozen=True)
class Preprocessing:
    """How a run fed its images; what uses its encoder does the same.

    Attributes:
        size: height and width, pixels.
        channels: channels of an image.
        mean, std: of the training images, per channel, on values in [0, 1].
        read: settings of `mwm.data.ReadSettings`.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From the plain values of a file."""
        return cls(tuple(values["size"]), values["channels"], tuple(values["mean"]), tuple(values["std"]), dict(values["read"]))

    def check(self) -> None:
        """Numbers that decide how much memory is taken must be sane before anything is built.

        Raises:
            ValueError: one is not.
        """
        sane = {
            "size": len(self.size) == 2 and all(isinstance(edge, int) and 0 < edge <= 8192 for edge in self.size),
            "channels": isinstance(self.channels, int) and 0 < self.channels <= MAX_CHANNELS,
            "mean": len(self.mean) == self.channels and all(map(math.isfinite, self.mean)),
            "std": len(self.std) == self.channels and all(math.isfinite(std) and std > 0 for std in self.std),
        }
        for name, holds in sane.items():
            if not holds:
                raise ValueError(f"preprocessing.{name} is out of range")

    def normalise(self, images: Tensor) -> Tensor:
        """(images - mean) / std. [B, C, H, W] -> [B, C, H, W]"""
        mean, std = (torch.tensor(values, dtype=images.dtype).view(-1, 1, 1).to(images.device, non_blocking=True) for values in (self.mean, self.std))
        return (images - mean) / std


@dataclass(frozen=True)
class Encoder:
    """A full plain model with a run's weights.

    Attributes:
        model: dense; its head is freshly initialised.
        name: what made it: a timm name or "torchvision/NAME".
        head: names of the parameters of the head, which the run did not train.
        untrained: names of other tensors that the run did not train.
        preprocessing: how to feed it.
    """

    model: nn.Module
    name: str
    head: tuple[str, ...]
    untrained: tuple[str, ...]
    preprocessing: Preprocessing


def full_model(name: str, in_chans: int, num_classes: int) -> nn.Module:
    """The full plain model that an encoder name stands for, randomly initialised.

    Args:
        name: a timm name or "torchvision/NAME".
        in_chans: channels of the image.
        num_classes: outputs of the head.

    Raises:
        TrainError: the name is unknown.
    """
    if name.startswith(_TORCHVISION):
        from torchvision import models

        # Classifiers alone: segmentation and detection models would fetch weights of their backbones, and a name may come from a foreign file.
        if name[len(_TORCHVISION):] not in models.list_models(module=models):
            raise TrainError(f"encoder: {name!r} is no classification model of torchvision. `torchvision.models.list_models(torchvision.models)` lists them.")
        model = models.get_model(name[len(_TORCHVISION):], weights=None, num_classes=num_classes)
        return _with_channels(model, in_chans)
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:3]
        raise TrainError(f"encoder: {name!r} is no model of timm{'; near are ' + ', '.join(near) if near else ''}. "
                         "`timm.list_models()` lists them; torchvision's are torchvision/NAME.")
    return timm.create_model(name, in_chans=in_chans, num_classes=num_classes)


def head_keys(name: str, model: nn.Module) -> tuple[str, ...]:
    """Names of the state-dict entries of the classifier, which pre-training does not make."""
    if name.startswith(_TORCHVISION):
        prefixes = _TORCHVISION_HEADS
    else:
        classifier = model.pretrained_cfg["classifier"]
        prefixes = tuple(f"{part}." for part in ([classifier] if isinstance(classifier, str) else classifier))
    return tuple(key for key in model.state_dict() if key.startswith(prefixes))


def name_map(encoder: nn.Module, full: nn.Module) -> dict[str, str]:
    """For every state-dict entry of the pyramid its name in the full model.

    A pyramid is cut out of the full model: the same modules, with dots of the names joined to underscores and perhaps
    a prefix before.

    Raises:
        TrainError: an entry has no counterpart of its shape.
    """
    whole = {key.replace(".", "_"): key for key in full.state_dict()}
    state = encoder.state_dict()
    prefixes = {""} | {key[: at + 1] for key in state for at in range(len(key)) if key[at] == "."}
    best = max(sorted(prefixes, key=len), key=lambda p: sum(key[len(p):].replace(".", "_") in whole for key in state if key.startswith(p)))
    names = {}
    for key, value in state.items():
        target = whole.get(key[len(best):].replace(".", "_")) if key.startswith(best) else None
        if target is None or full.state_dict()[target].shape != value.shape:
            raise TrainError(f"export: {key} of the encoder has no counterpart in the full model. Name the encoder as timm or torchvision do.")
        names[key] = target
    return names


def export(run: Path, name: str, encoder: nn.Module, preprocessing: Preprocessing, *, seed: int,
           facts: Mapping[str, str] | None = None) -> list[str]:
    """Write encoder.safetensors, and for timm names config.json and model.safetensors.

    Both weight files hold every entry of the full model but its classifier; entries that no feature map reaches (a
    last norm, a 1x1 before the classifier) keep their initial values and are listed under `untrained` in the metadata.

    Args:
        run: folder of the run.
        name: the encoder's name.
        encoder: the pyramid, sparsified or not.
        preprocessing: how the images were fed.
        seed: of the initial values of what is not trained.
        facts: further metadata.

    Returns:
        Names of the entries that are not trained.
    """
    from safetensors.torch import save

    full = _seeded_full_model(name, preprocessing.channels, seed)
    head = set(head_keys(name, full))
    names = name_map(encoder, full)
    trained = {names[key]: value for key, value in encoder.state_dict().items()}
    state = {key: trained.get(key, value).detach().cpu().contiguous().clone() for key, value in full.state_dict().items() if key not in head}
    untrained = [key for key in state if key not in trained]
    metadata = {"format": "pt", "mwm_version": mwm.__version__, "encoder": name, "channels": str(preprocessing.channels),
                "preprocessing": json.dumps(asdict(preprocessing)), "untrained": json.dumps(untrained), **(facts or {})}
    content = save(state, metadata=metadata)
    write_atomic(run / ENCODER, lambda file: file.write(content))
    if not name.startswith(_TORCHVISION):
        write_atomic(run / "model.safetensors", lambda file: file.write(content))
        write_text(run / "config.json", json.dumps(_timm_config(name, full, preprocessing), indent=2) + "\n")
    return untrained


def load_encoder(run: str | Path, num_classes: int = 1) -> Encoder:
    """The full plain model with a run's weights, ready to fine-tune.

    Args:
        run: folder of a run, or its encoder.safetensors.
        num_classes: outputs of the fresh head.

    Raises:
        TrainError: there is no encoder, or it does not fit the model it names.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(run)
    path = path / ENCODER if path.is_dir() else path
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise TrainError(f"load_encoder: {path} must be an encoder written by mwm pretrain, got {error}. Give the run's "
                         "folder; a run that is not finished has none yet (mwm pretrain --resume).") from error
    if "encoder" not in metadata or "preprocessing" not in metadata:
        raise TrainError(f"load_encoder: {path.parent.name}/{path.name} must carry the metadata that mwm pretrain writes, got none. Give a run's folder.")
    try:
        preprocessing = Preprocessing.from_dict(json.loads(metadata["preprocessing"]))
        preprocessing.check()
        untrained = tuple(json.loads(metadata["untrained"]))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        raise TrainError(f"load_encoder: {path.parent.name}/{path.name} must carry the metadata that mwm pretrain writes, got others ({type(error).__name__}: {error}). "
                         "Give a run's folder.") from error
    name = metadata["encoder"]
    refuse_larger(name, preprocessing.channels, state)
    model = full_model(name, preprocessing.channels, num_classes)
    head = head_keys(name, model)
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise TrainError(f"load_encoder: the weights do not fit {name} ({str(error).splitlines()[-1].strip()}). "
                         "Use the timm or torchvision version that run.json names.") from error
    if set(result.missing_keys) != set(head) or result.unexpected_keys:
        raise TrainError(f"load_encoder: the weights do not fit {name} ({len(result.missing_keys)} entries missing, {len(result.unexpected_keys)} too many). "
                         "Use the timm or torchvision version that run.json names.")
    return Encoder(model, name, head, untrained, preprocessing)


def refuse_larger(name: str, in_chans: int, weights: Mapping[str, Tensor]) -> None:
    """Refuse a network far larger than the weights that are there for it, before it takes the memory: the name may come from a foreign file.

    Args:
        name: a timm name or "torchvision/NAME".
        in_chans: channels of the image.
        weights: what a file holds for it, perhaps with a head, or without.

    Raises:
        TrainError: the network has more than four times the numbers, or its name is unknown.
    """
    try:
        with torch.device("meta"):
            needed = sum(value.numel() for value in full_model(name, in_chans, 1).state_dict().values())
    except (RuntimeError, NotImplementedError):  # a network that computes with its own values while it is built
        return
    there = sum(value.numel() for value in weights.values())
    if needed > 4 * there + 2**20:
        raise TrainError(f"encoder: the weights do not fit {name}, which has {needed:,} numbers where the file holds {there:,}. Is the file whole, and of this network?")


def _seeded_full_model(name: str, in_chans: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return full_model(name, in_chans, 1)


def _with_channels(model: nn.Module, in_chans: int) -> nn.Module:
    """Exchange the first convolution of a torchvision model for one with other input channels."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels != in_chans:
                parent = model.get_submodule(name.rpartition(".")[0])
                conv = nn.Conv2d(in_chans, module.out_channels, module.kernel_size, module.stride, module.padding, module.dilation, module.groups,
                                 module.bias is not None, module.padding_mode)
                setattr(parent, name.rpartition(".")[2], conv)
            break
    return model


def _timm_config(name: str, full: nn.Module, preprocessing: Preprocessing) -> dict[str, Any]:
    source = full.pretrained_cfg
    return {
        "architecture": name.partition(".")[0],
        "num_classes": 0,
        "num_features": full.num_features,
        "model_args": {"in_chans": preprocessing.channels},
        "pretrained_cfg": {
            "input_size": [preprocessing.channels, *preprocessing.size],
            "fixed_input_size": False,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": 0,
            "pool_size": None,
            "first_conv": source.get("first_conv"),
            "classifier": source["classifier"],
            "custom_load": False,
        },
    }
