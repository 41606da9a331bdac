"""`finetune`: one door to every task. The task's module is imported when it is asked for."""

from __future__ import annotations

import importlib
from pathlib import Path

from mwm.transfer.config import FinetuneConfig, TransferError
from mwm.transfer.results import open_results

#: Where each task's `run(config, out, command)` lives. It writes its results into `out` through `results.new_results`.
RUN = {"classify": "mwm.transfer.classify:run", "segment": "mwm.transfer.segment:run", "detect": "mwm.transfer.detect:run"}


def finetune(config: FinetuneConfig, *, command: str | None = None) -> Path:
    """Train a network for a task on a pre-trained encoder and measure it.

    Training images fit it, the val split chooses, the test split is read once. Splits that DATA lacks are made by patient. Images are read,
    sized and normalised as the run's config says.

    Args:
        config: What to do.
        command: The command line, for metrics.json.

    Returns:
        Folder with metrics.json, predictions, pictures and the weights (model.safetensors, with model.json for `mwm predict`).

    Raises:
        TransferError: the data or the run do not fit; the message says what to do.
        FileExistsError: the folder of the results exists and neither `overwrite` nor `resume` is on.
    """
    out = results_folder(config)
    if config.resume and (out / "metrics.json").is_file():
        print(f"{out} is finished; nothing to do.")
        return out
    open_results(out, overwrite=config.overwrite)
    state = state_file(out)
    if not config.resume and state.is_file():
        state.unlink()
    load(RUN, config.task)(config, out, command)
    state.unlink(missing_ok=True)
    return out


def results_folder(config: FinetuneConfig) -> Path:
    """`out`, or where the results of a run go by default."""
    if config.out:
        return Path(config.out)
    if config.run is None:
        raise TransferError("finetune: out must be a folder where no RUN is given, got none.")
    source = Path(config.run)
    base = source if source.is_dir() else source.parent
    return base / ("linear-probe" if config.linear_probe else "knn" if config.knn else "finetune" if config.task == "classify" else config.task)


def state_file(out: Path) -> Path:
    """Where an interrupted run keeps what `resume` needs: beside `out`, which appears when it is whole."""
    return out.with_name(f".{out.name}.state")


def load(table: dict[str, str], task: str):
    """The function that a table names for a task."""
    module, _, name = table[task].partition(":")
    return getattr(importlib.import_module(module), name)
