"""`finetune`: one door to every task. The task's module is imported when it is asked for."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from mwm.transfer.config import FREE_ON_RESUME, FinetuneConfig, TransferError
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
        TransferError: the data or the run do not fit, or `resume` meets finished results of other settings; the message says what to do.
        FileExistsError: the folder of the results exists and neither `overwrite` nor `resume` is on.
    """
    out = results_folder(config)
    if config.resume and (out / "metrics.json").is_file():
        _refuse_other(out, config)
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
    out = out.resolve()
    return out.with_name(f".{out.name}.state")


def _refuse_other(out: Path, config: FinetuneConfig) -> None:
    """Refuse to take finished results of other settings for the ones that are asked for.

    Raises:
        TransferError: a setting differs that changes numbers, or metrics.json is damaged.
    """
    try:
        stored = json.loads((out / "metrics.json").read_text())["config"]
        now = config.to_dict()
        changed = [name for name in now if name not in FREE_ON_RESUME and name in stored and _plain(name, stored[name]) != _plain(name, now[name])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TransferError(f"finetune: metrics.json of {out} must be of a finished run, got a damaged one ({type(error).__name__}). Choose another folder, or add --overwrite "
                            "in place of --resume.") from error
    if changed:
        name = changed[0]
        raise TransferError(f"finetune: {name} must be {stored[name]!r} as in the finished results of {out}, got {getattr(config, name)!r}. Choose another --out, or add "
                            "--overwrite in place of --resume.")


def _plain(name: str, value: Any) -> Any:
    """A value as it is compared: a file may have moved, its name stays."""
    return Path(value).name if name in ("init", "masks", "images") and value else value


def load(table: dict[str, str], task: str):
    """The function that a table names for a task."""
    module, _, name = table[task].partition(":")
    return getattr(importlib.import_module(module), name)
