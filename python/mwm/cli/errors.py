"""From an exception to one sentence and an exit code."""

from __future__ import annotations

import errno
import os
import sys

EXPLAINED, UNFORESEEN, INTERRUPTED = 2, 1, 130


def report(error: Exception) -> int:
    """Print the sentence on stderr; returns the exit code."""
    words, code = sentence(error)
    words = printable(words)
    rank = os.environ.get("RANK")  # under torchrun: who says it
    # One write, so that two processes cannot run into one line.
    sys.stderr.write(f"mwm: {words}\n" if rank is None else f"mwm: [process {rank}] {words}\n")
    return code


def printable(text: str) -> str:
    """A text without what moves the cursor or colours the terminal: file names and cells of a CSV may hold such characters."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def sentence(error: Exception) -> tuple[str, int]:
    """What to tell the user about an exception, and the exit code: 2 where the message says what to do, else 1."""
    if isinstance(error, OSError):
        return _file_error(error), EXPLAINED
    words = _own_words(error)
    if isinstance(error, ModuleNotFoundError):
        return f"the Python package {error.name!r} is missing. Install it with `pip install {error.name}`.", EXPLAINED
    if isinstance(error, ValueError | TypeError | ImportError) or type(error).__name__ in {"BackendError", "Refusal"} or type(error).__module__.startswith("mwm."):
        return words, EXPLAINED
    if isinstance(error, MemoryError) or "out of memory" in words.lower() or "can't allocate memory" in words.lower():
        return "the memory does not suffice. Use a smaller --batch-size, --image-size or --decoder-width.", EXPLAINED
    return f"unforeseen {type(error).__name__}: {words} Run the command again with --debug to see where, and report it.", UNFORESEEN


def _own_words(error: Exception) -> str:
    words = str(error).strip() or type(error).__name__
    if words.startswith("Caught ") and "worker process" in words:
        # A loader worker's error arrives with its traceback as text; the last line holds the message.
        last = words.splitlines()[-1]
        words = last.split(": ", 1)[1] if ": " in last else last
    return words


def _file_error(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"the disk is full{where}. What was written before is whole; free space and run the command again (pretrain: with --resume)."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission{where}. Choose another folder or change its permissions."
    if error.errno == errno.ENOENT:
        return f"there is no such file or folder{where}. Check the path."
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
        return f"{error.strerror.lower()}{where}. A folder is needed where a file is, or the other way round: choose another path."
    if error.strerror:
        return f"{error.strerror.lower()}{where}."
    return str(error)
