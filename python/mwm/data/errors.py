"""What the data room raises."""

from __future__ import annotations


class DataError(ValueError):
    """Images, lists or settings do not fit; the message is one sentence that says what to do."""


class UnreadableImage(DataError):
    """One file cannot be read; a data set skips it, counts it and lists it."""
