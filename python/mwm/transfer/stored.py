"""A trained model in a folder of results: model.safetensors with the plain names of its library, and model.json that says how to build and feed it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

import mwm
from mwm.train.export import Preprocessing
from mwm.transfer.config import TransferError

FACTS, WEIGHTS = "model.json", "model.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class StoredModel:
    """What model.json holds.

    Attributes:
        task: classify, segment or detect.
        method: How it was trained, for example "fine-tuning".
        encoder: A timm name or "torchvision/NAME".
        classes: Names, in the order of outputs.
        preprocessing: How to feed it.
        facts: What else the task needs to build the network again.
    """

    task: str
    method: str
    encoder: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    facts: dict[str, Any] = field(default_factory=dict)


def write_model(folder: Path, model: StoredModel, weights: Mapping[str, Tensor] | None, name: str = WEIGHTS) -> None:
    """Write model.json, and the weights where there are any.

    Args:
        folder: Of the results.
        model: What to say.
        weights: By the names of the plain library model; None leaves the file out (`store_weights` off).
        name: File name of the weights.
    """
    values = asdict(model) | {"format": FORMAT, "mwm_version": mwm.__version__, "weights": name if weights is not None else None}
    (folder / FACTS).write_text(json.dumps(values, indent=2) + "\n")
    if weights is not None:
        metadata = {"format": "pt", "encoder": model.encoder, "classes": json.dumps(list(model.classes)), "mwm_version": mwm.__version__, "task": model.task,
                    "preprocessing": json.dumps(asdict(model.preprocessing))}
        write_tensors(folder / name, weights, metadata)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, written by Python: what the library raises on a full disk is no OSError and has no errno."""
    from safetensors.torch import save

    path.write_bytes(save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, metadata=metadata))


def read_model(results: str | Path) -> StoredModel:
    """What model.json of a folder of results says.

    Raises:
        TransferError: there is none, or it is not whole.
    """
    path = Path(results) / FACTS
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise TransferError(f"predict: {path.parent.name}/{FACTS} must be of format {FORMAT}, got {values['format']}. Use the version of mwm that wrote it.")
        model = StoredModel(values["task"], values["method"], values["encoder"], tuple(values["classes"]), Preprocessing.from_dict(values["preprocessing"]), values["facts"])
        _check(model)
        return model
    except OSError as error:
        raise TransferError(f"predict: RESULTS must be a folder that mwm finetune wrote, got {path.parent} without {FACTS}. Give the folder that holds metrics.json.") from error
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, TransferError):
            raise
        raise TransferError(f"predict: {path.parent.name}/{FACTS} is damaged ({type(error).__name__}: {error}). Run mwm finetune again.") from error


def _check(model: StoredModel) -> None:
    """Numbers that decide how much memory is taken must be sane before anything is built.

    Raises:
        ValueError: one is not.
    """
    model.preprocessing.check()
    sane = {
        "task": isinstance(model.task, str),
        "method": isinstance(model.method, str),
        "encoder": isinstance(model.encoder, str),
        "classes": len(model.classes) <= 65536 and all(isinstance(name, str) for name in model.classes),
        "facts": isinstance(model.facts, dict),
    }
    for name, holds in sane.items():
        if not holds:
            raise ValueError(f"{name} is out of range")


def read_weights(results: str | Path, name: str = WEIGHTS) -> dict[str, Tensor]:
    """The weights of a folder of results.

    Raises:
        TransferError: they are not there, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(results) / name
    if not path.is_file():
        raise TransferError(f"predict: RESULTS must hold {name}, got {path.parent} without it. Run mwm finetune again, with --store-weights.")
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise TransferError(f"predict: {path.parent.name}/{name} is damaged ({error}). Run mwm finetune again.") from error
