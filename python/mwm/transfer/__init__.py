"""From a pre-trained encoder to a task: fine-tuning, linear probes, predictions, and figures with intervals over patients."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "FinetuneConfig": "mwm.transfer.config",
    "PredictConfig": "mwm.transfer.apply",
    "ProbeResult": "mwm.transfer.probe",
    "TransferError": "mwm.transfer.config",
    "classification_metrics": "mwm.transfer.metrics",
    "finetune": "mwm.transfer.tasks",
    "linear_probe": "mwm.transfer.probe",
    "load_classifier": "mwm.transfer.classify_apply",
    "pixel_statistics": "mwm.transfer.probe",
    "predict": "mwm.transfer.apply",
    "recalibrate_batchnorm": "mwm.transfer.probe",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mwm.transfer' has no attribute {name!r}; its public names are {', '.join(__all__)}")
