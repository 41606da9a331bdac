"""Errors of this room: each is one sentence that says what to do."""

from __future__ import annotations


class StudyError(ValueError):
    """A study that cannot start or go on; the message says what to do."""
