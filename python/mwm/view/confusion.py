"""The confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from mwm.view.pixels import INK, MUTED, PAPER, drawable, font, to_array


def confusion_matrix(counts: object, classes: Sequence[str], *, title: str = "") -> Image.Image:
    """Counts with each row shaded by its share, truth downwards, prediction to the right.

    Args:
        counts: number of cases of class row that were called class column. [K, K]
        classes: K names.
        title: one line above the matrix.

    Raises:
        ValueError: the matrix is not square, or the number of names differs.
    """
    table = to_array(counts).astype(float)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or table.shape[0] != len(classes) or not len(classes):
        raise ValueError(f"confusion_matrix: counts must be [K, K] with K = {len(classes)} (the classes), got {list(table.shape)}.")
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    kind, small, big = font(24), font(22), font(30)
    labels = [name if len(name) <= 22 else name[:21] + "…" for name in map(drawable, classes)]
    widest = int(max(kind.getlength(name) for name in labels))
    cell = max(130, widest + 28)
    margin, top_words = 36, 52 if title else 0
    left, top = margin + 44 + widest + 20, margin + top_words + 82
    size = cell * len(classes)
    page = Image.new("RGB", (left + size + margin, top + size + margin), PAPER)
    pen = ImageDraw.Draw(page)
    if title:
        pen.text((margin, margin), drawable(title), fill=INK, font=font(28))
    pen.text((left + size / 2, top - 66), "predicted", fill=MUTED, font=small, anchor="mm")
    aside = Image.new("RGB", (160, 40), PAPER)
    ImageDraw.Draw(aside).text((80, 20), "truth", fill=MUTED, font=small, anchor="mm")
    page.paste(aside.rotate(90, expand=True), (margin, top + size // 2 - 80))
    for i, name in enumerate(labels):
        pen.text((left - 18, top + cell * (i + 0.5)), name, fill=INK, font=kind, anchor="rm")
        pen.text((left + cell * (i + 0.5), top - 26), name, fill=INK, font=kind, anchor="mm")
        for j in range(len(classes)):
            x, y, part = left + cell * j, top + cell * i, share[i, j]
            fill = tuple(round(255 - (255 - c) * (0.06 + 0.94 * part)) for c in (15, 118, 110))
            pen.rectangle([x + 2, y + 2, x + cell - 3, y + cell - 3], fill=fill)
            words = PAPER if part > 0.5 else INK
            pen.text((x + cell / 2, y + cell / 2 - 14), f"{table[i, j]:.0f}", fill=words, font=big, anchor="mm")
            pen.text((x + cell / 2, y + cell / 2 + 22), f"{100 * part:.0f} %", fill=words if part > 0.5 else MUTED, font=small, anchor="mm")
    return page
