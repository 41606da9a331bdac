"""Errors of this room: each is one sentence that says what to do."""

from __future__ import annotations


class DataError(ValueError):
    """Images, lists, masks or regions do not fit; the message says what to do."""


class UnreadableImage(DataError):
    """One file cannot be read as an image; a run leaves it out, counts it and lists it."""


class MissingRegion(UnreadableImage):
    """An image has no region where regions are read; it is left out, counted and listed like an unreadable one."""
