"""What a run writes down about itself: config.yaml, run.json, and who may use its folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

import mwm
from mwm.train.checkpoint import NAME, write_text
from mwm.train.config import FREE_ON_RESUME, PretrainConfig, TrainError, read_yaml

_MARKS = ("run.json", NAME)
_LOCK = ".lock"


def check_folder(config: PretrainConfig) -> bool:
    """Whether the run in `config.out` is to be continued; changes nothing.

    Raises:
        TrainError: the folder holds a run and neither overwrite nor resume is set, holds something else, or holds a run
            of other settings.
    """
    run = Path(config.out)
    if run.is_file():
        raise TrainError(f"pretrain: out must be a folder, got the file {run}. Choose another --out.")
    nearest = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):  # told now, not when all images have been read
        raise TrainError(f"pretrain: out must be a folder that can be made and written, got {run}, where {nearest} is none. Choose another --out.")
    if not run.is_dir() or all(path.name == _LOCK for path in run.iterdir()):
        return False
    if not any((run / name).exists() for name in _MARKS) and not _has_resolved(run / "config.yaml"):
        raise TrainError(f"pretrain: out must be a new folder or a run, but {run} holds other files. Choose another --out.")
    if config.overwrite:
        _check_inputs_outside(config, run)
        return False
    if not config.resume:
        raise TrainError(f"pretrain: {run} holds a run already. Continue it with --resume, replace it with --overwrite, or choose another --out.")
    if not (run / "config.yaml").is_file():
        if (run / NAME).exists():  # it would be replaced by a run that begins anew
            raise TrainError(f"pretrain: {run} has a {NAME} but no config.yaml, so that it cannot be continued. Restore config.yaml, or replace the run with --overwrite.")
        return False
    stored = PretrainConfig.from_yaml(run / "config.yaml", out=config.out, resume=True, overwrite=False)
    differ = [name for name in vars(stored) if name not in FREE_ON_RESUME and getattr(stored, name) != getattr(config, name)
              and not (name == "channels" and config.channels is None)]
    if differ:
        name = differ[0]
        more = f" (and {', '.join(differ[1:])})" if differ[1:] else ""
        raise TrainError(f"pretrain: {name} is {getattr(stored, name)!r} in the run and {getattr(config, name)!r} now{more}. A run is continued with its "
                         "own settings: leave them out, or choose another --out.")
    return True


def _has_resolved(path: Path) -> bool:
    """Whether a config.yaml was written by a run: other programs call their files so, too."""
    try:
        return path.is_file() and bool(read_resolved(path.parent))
    except TrainError:
        return False


def _check_inputs_outside(config: PretrainConfig, run: Path) -> None:
    """Refuse to replace a folder that holds what the new run reads."""
    for name in ("images", "regions", "foreground", "localizer_checkpoint"):
        value = getattr(config, name)
        if value and (path := Path(value).expanduser()).exists() and path.resolve().is_relative_to(run.resolve()):
            raise TrainError(f"pretrain: {name} must lie outside of a run that is replaced, got {value} in {run}, all of which --overwrite removes. Choose another --out.")


@contextlib.contextmanager
def alone(config: PretrainConfig, *, continues: bool) -> Iterator[None]:
    """Hold the run's folder for the time of the training; makes it where it is missing. The lock ends with the process, however that ends.

    Raises:
        TrainError: another process trains in it, or has done so since `check_folder` looked.
    """
    run = Path(config.out)
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / _LOCK, "a")
    except OSError as error:
        raise TrainError(f"pretrain: the folder {run} cannot be made ({error.strerror}). Choose another --out.") from error
    with file:
        try:
            import fcntl

            # A lock of the process, not of the open file: loader processes that outlive a killed run must not keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (ImportError, OSError) as error:
            if getattr(error, "errno", None) in (errno.EACCES, errno.EAGAIN):
                raise TrainError(f"pretrain: another process trains in {run} at the moment. Wait for its end, or choose another --out.") from error
        if check_folder(config) != continues:  # another process was here while this one read its images
            raise TrainError(f"pretrain: {run} has become another run's folder since this one began. Look at it, or choose another --out.")
        yield


def claim_folder(config: PretrainConfig, *, continues: bool) -> Path:
    """Make the run's folder; an overwritten run is removed only now, when the new one is ready to begin."""
    run = Path(config.out)
    try:
        if not continues and run.is_dir():
            for path in run.iterdir():
                if path.name == _LOCK:
                    continue
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"pretrain: the folder {run} cannot be made ({error.strerror}). Choose another --out.") from error
    return run


def write_config(run: Path, config: PretrainConfig, resolved: dict[str, Any]) -> None:
    """config.yaml: the settings, and under `resolved` what the run found out."""
    import yaml

    settings = config.replace(resume=False, overwrite=False).to_dict()
    write_text(run / "config.yaml", yaml.safe_dump({**settings, "resolved": resolved}, sort_keys=False, allow_unicode=True))


def read_resolved(run: Path) -> dict[str, Any]:
    """The section `resolved` of a run's config.yaml; empty where there is none."""
    import yaml

    read_yaml(run / "config.yaml")
    return yaml.safe_load((run / "config.yaml").read_text()).get("resolved") or {}


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """What must be the same for a run to continue bit for bit."""
    import numpy
    import timm
    import torchvision

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = _cpu_name()
    return {"mwm": mwm.__version__, "torch": str(torch.__version__), "torchvision": str(torchvision.__version__), "timm": timm.__version__,
            "numpy": numpy.__version__, "python": platform.python_version(), "device": f"{device.type} ({name})",
            "threads": torch.get_num_threads(), "world_size": world_size}


def environment_change(stored: dict[str, Any], present: dict[str, Any]) -> str | None:
    """One sentence on what differs between two environments, or None."""
    differ = [f"{name} {stored.get(name)} -> {present[name]}" for name in present if stored.get(name) != present[name]]
    if not differ:
        return None
    return f"pretrain: the run goes on elsewhere than it began ({', '.join(differ)}): its numbers will not repeat bit for bit."


def write_run_json(run: Path, *, command: str | None, env: dict[str, Any], seed: int, image_list: str, localizer: str | None,
                   status: str, steps: int, seconds: float) -> None:
    """run.json: command, commit, versions, device, threads, seeds, wall time, and hashes of what came in."""
    facts = {"command": command or " ".join(sys.argv), "commit": commit(), **env, "seed": seed, "image_list": image_list, "localizer": localizer,
             "status": status, "steps": steps, "wall_time_seconds": round(seconds, 1)}
    write_text(run / "run.json", json.dumps(facts, indent=2) + "\n")


def read_run_json(run: Path) -> dict[str, Any]:
    """run.json as a dict; empty where there is none."""
    try:
        return json.loads((run / "run.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def list_hash(entries: Iterable[tuple[int, int]]) -> str:
    """Hash of an image list: of the ids and file sizes (bytes), whatever their order."""
    text = "\n".join(f"{id_:08x} {size}" for id_, size in sorted(entries))
    return blake2b(text.encode(), digest_size=16).hexdigest()


def file_size(path: str | Path) -> int:
    """Size in bytes; 0 where the file cannot be looked at."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Commit of the checkout that mwm is imported from; None where it is installed."""
    folder = Path(mwm.__file__).parent
    try:
        subprocess.run(["git", "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py"], check=True, capture_output=True, timeout=10)
        done = subprocess.run(["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], check=True,
                              capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
