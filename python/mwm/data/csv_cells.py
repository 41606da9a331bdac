"""Names in the CSVs that commands write: what a spreadsheet would compute is written so that it shows it.

A cell that begins with "=", "+", "-" or "@" is a formula to spreadsheets, and the names of files and classes come from whoever made
the data. Source: OWASP, CSV Injection.
"""

from __future__ import annotations

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def file_cell(name: str) -> str:
    """A relative file name as a cell; "./" before it names the same file."""
    return "./" + name if name.startswith(_FORMULA) else name


def text_cell(text: str) -> str:
    """Any other text as a cell, with an apostrophe before it where it would be computed; numbers stay what they are."""
    return "'" + text if text.startswith(_FORMULA) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isprintable()
