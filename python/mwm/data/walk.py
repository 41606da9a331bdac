"""Finding files below a folder without leaving it or walking in circles."""

from __future__ import annotations

import errno
import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import DataError
from .limits import MAX_DEPTH, MAX_FILES

_MAGIC = frozenset("*?[")


def walk(folder: Path, root: Path) -> Iterator[Path]:
    """Files below a folder, in the order of their paths; hidden ones and macOS resource forks are left out.

    Links are followed while they stay inside `root`.

    Args:
        folder: Where to start.
        root: Resolved folder that every file must lie in.

    Raises:
        DataError: a link leaves `root` or leads back to a folder above it, or there are too many files or levels.
    """
    seen = 0
    stack: list[tuple[Path, tuple[tuple[int, int], ...]]] = [(folder, (_identity(folder),))]
    while stack:
        here, above = stack.pop()
        try:
            with os.scandir(here) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"images: the folder {here.name!r} cannot be listed ({error.strerror}). Correct its permissions, or leave it out.") from error
        below = []
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            path = here / entry.name
            if entry.is_symlink():
                check_inside(path, root)
            if entry.is_dir():
                identity = _identity(path)
                if identity in above:
                    raise DataError(f"images: the link {path.relative_to(folder).as_posix()!r} leads back to a folder above it. Remove this loop.")
                if len(above) >= MAX_DEPTH:
                    raise DataError(f"images: folders must be nested at most {MAX_DEPTH} deep, got more at {path.relative_to(folder).as_posix()[:80]!r}. Flatten them.")
                below.append((path, (*above, identity)))
            elif entry.is_file():
                seen += 1
                if seen > MAX_FILES:
                    raise DataError(f"images: a folder must hold at most {MAX_FILES:,} files, got more. Give a text list of those you mean.")
                yield path
        stack.extend(reversed(below))


def expand_glob(pattern: str) -> tuple[Path, list[Path]]:
    """Files that a pattern matches; `*`, `?` and `[…]` match within a name, `**` any number of folders.

    Returns:
        The last folder before the first wildcard, which names are relative to, and the matches.

    Raises:
        DataError: as `walk`.
    """
    parts = Path(pattern).expanduser().parts
    first = next(k for k, part in enumerate(parts) if _MAGIC & set(part))
    folder, rest = Path(*parts[:first]), parts[first:]
    if not folder.is_dir():
        return folder, []
    return folder, [path for path in walk(folder, folder.resolve()) if _matches(path.relative_to(folder).parts, rest)]


def has_wildcard(text: str) -> bool:
    """Whether a path is a pattern."""
    return bool(_MAGIC & set(text))


def check_inside(path: Path, root: Path) -> None:
    """Refuse a path that lies, links followed, outside a folder.

    Args:
        path: Any path.
        root: Resolved folder.

    Raises:
        DataError: it lies outside, its links go in circles, or the system refuses its name.
    """
    try:
        real = path.resolve()
        path.stat()
    except FileNotFoundError:
        return  # a missing file is not an intruder; reading it says that it is missing
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno != errno.ELOOP:
            raise DataError(f"images: {path.name[:60]!r} must be the name of a file that can be opened, got: {error.strerror}. Look at the list of images.") from error
        raise DataError(f"images: the links of {path.name!r} go in circles. Remove this loop.") from error
    if not real.is_relative_to(root):
        raise DataError(f"images: {path.name!r} is a link to a place outside {root.name or root}. Copy the file into it, or give root, a folder that holds both.")


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[k:], pattern[1:]) for k in range(len(parts) + 1)) if len(pattern) > 1 else bool(parts)
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
