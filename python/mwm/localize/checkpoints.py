"""Where the weights of a localizer come from: a local folder or a hub name, read without running code of theirs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from torch import Tensor

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_MAX_EDGE = 4096  # pixels of an input; a hostile size would take all memory
_NO_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"  # read by transformers
_CONTENT = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")


def local_folder(checkpoint: str, name: str, example: str, configs: tuple[str, ...] = ("config.json",)) -> Path | None:
    """The folder that a checkpoint names, or None for a hub name.

    Args:
        checkpoint: A folder, or owner/model.
        name: The localizer, for messages.
        example: A hub name, for messages.
        configs: Files of which the folder must hold one.

    Raises:
        ValueError: it is neither, or the folder holds no model.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        if not any((path / config).is_file() for config in configs):
            raise ValueError(f"{name}: checkpoint must be a folder with {' or '.join(configs)}, got {checkpoint!r} without one. Give the folder that save_pretrained wrote.")
        special = next((found.name for pattern in _CONTENT for found in path.glob(pattern) if found.exists() and not found.is_file() and not found.is_dir()), None)
        if special is not None:  # a pipe waits for its writer, a device never ends
            raise ValueError(f"{name}: checkpoint must hold regular files, got {special!r} in {checkpoint!r}, which is a pipe or device. Remove it.")
        return path
    if path.exists() or not _HUB_NAME.fullmatch(checkpoint):
        raise ValueError(f"{name}: checkpoint must be a local folder or a hub name owner/model, got {checkpoint!r}. For example {example}.")
    return None


def hub_answers() -> bool:
    """Whether there is a way to the hub. Its own client tries for half a minute before it says no; a copy on disk serves without."""
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urlopen(Request(address, method="HEAD"), timeout=5).close()
    except HTTPError:
        return True
    except URLError as error:
        return not isinstance(error.reason, (socket.gaierror, ConnectionError, TimeoutError))
    except (TimeoutError, ConnectionError):
        return False
    return True


@contextlib.contextmanager
def quiet_transformers(*, bars: bool) -> Iterator[None]:
    """No warnings of transformers on the way; progress bars only where something is downloaded; no thread that asks the hub to convert a repository to safetensors."""
    from transformers.utils import logging

    verbosity, shown, conversion = logging.get_verbosity(), logging.is_progress_bar_enabled(), os.environ.get(_NO_CONVERSION)
    logging.set_verbosity_error()
    os.environ[_NO_CONVERSION] = "1"
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if conversion is None:
            os.environ.pop(_NO_CONVERSION, None)
        else:
            os.environ[_NO_CONVERSION] = conversion
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def image_settings(processor: Any) -> tuple[tuple[int, int], Tensor, Tensor, str]:
    """Input size, mean and std [3, 1, 1] and interpolation of a checkpoint's image processor.

    Raises:
        ValueError: one of them is no such thing, or the size is beyond 4096.
    """
    try:
        size = processor.size
        edge = (size["height"], size["width"]) if "height" in size else (size["shortest_edge"],) * 2
        edge = int(edge[0]), int(edge[1])
        mean, std = (torch.tensor(list(values), dtype=torch.float32).reshape(3, 1, 1) for values in (processor.image_mean, processor.image_std))
        resample = int(processor.resample)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"checkpoint: its image processor must tell size, image_mean, image_std and resample, got something else ({first_line(error)}). "
                         "Download or save it again.") from error
    if not all(1 <= length <= _MAX_EDGE for length in edge) or not bool((torch.isfinite(mean) & torch.isfinite(std) & (std > 0)).all()):
        raise ValueError(f"checkpoint: its image processor must have a size in 1 … {_MAX_EDGE}, finite means and positive deviations, got {edge}, {mean.flatten().tolist()} and "
                         f"{std.flatten().tolist()}. Download or save it again.")
    return edge, mean, std, "bicubic" if resample == 3 else "bilinear"


def check_sizes(processor: Any, name: str, source: str) -> None:
    """Refuse an image processor that would resize or pad to absurd sizes, which take all memory.

    Raises:
        ValueError: an edge is no number in 1 … 4096.
    """
    images = getattr(processor, "image_processor", processor)
    for attribute in ("size", "pad_size", "crop_size", "mask_size", "mask_pad_size"):
        stored = getattr(images, attribute, None)
        named = dict(stored) if hasattr(stored, "__iter__") else {"edge": stored}  # a dict, or transformers' SizeDict
        edges = [edge for key, edge in named.items() if edge is not None and not key.endswith("pixels")]
        if not all(isinstance(edge, int) and 1 <= edge <= _MAX_EDGE for edge in edges):
            raise ValueError(f"{name}: {attribute} of the image processor must be in 1 … {_MAX_EDGE} pixels, got {str(stored)[:80]} in {source!r}. Download or save it again.")


def content_hash(folder: Path) -> str:
    """Hash of the weights, configuration and vocabulary in a folder."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted({path for pattern in _CONTENT for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).digest())
    return digest.hexdigest()


def commit_of(source: str, revision: str | None = None) -> str:
    """The commit of a hub model that was just read, from where its configuration lies in the hub's cache; the revision itself where it lies elsewhere.

    Args:
        source: Hub name.
        revision: Commit, branch or tag that it was read at; None for the newest.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else revision or "main"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without its full stop."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200].rstrip(".")
