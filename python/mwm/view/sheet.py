"""Pictures in rows and columns with words: one description, two outputs (a PNG and a piece of HTML)."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from mwm.view.overlay import SIZE, heat_map, mask_picture, overlay, picture
from mwm.view.pixels import INK, MUTED, PAPER, drawable, font, to_array


@dataclass
class Cell:
    """One picture and the line beneath it."""

    image: Image.Image
    caption: str = ""


@dataclass
class Sheet:
    """Rows of pictures under column headings.

    Attributes:
        columns: one heading per column, or none.
        rows: (label, cells); labels stand above their row and may be empty.
    """

    columns: Sequence[str] = ()
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)

    def add(self, label: str, *cells: Cell | Image.Image) -> Sheet:
        """Append a row; returns the sheet."""
        self.rows.append((label, [c if isinstance(c, Cell) else Cell(c) for c in cells]))
        return self

    def image(self, *, cell: int = 224) -> Image.Image:
        """The sheet as one picture; each column is `cell` pixels wide."""
        if not self.rows:
            raise ValueError("view: a sheet needs at least one row, got none. Add one with sheet.add(label, picture, ...).")
        gap, margin, small, large = 14, 22, font(14), font(15)
        count = max(len(self.columns), *(len(cells) for _, cells in self.rows))
        width = max(2 * margin + count * cell + (count - 1) * gap, 2 * margin + 240)
        strips: list[tuple[int, str, list[tuple[Image.Image, list[str]]]]] = []
        height = margin + (28 if self.columns else 0)
        for label, cells in self.rows:
            drawn = [(_scaled(c.image, cell), _wrapped(drawable(c.caption), small, cell)) for c in cells]
            strips.append((height, label, drawn))
            lines = max((len(words) for _, words in drawn), default=0)
            height += (26 if label else 0) + max((p.height for p, _ in drawn), default=0) + 19 * lines + (8 if lines else 0) + gap
        page = Image.new("RGB", (width, height - gap + margin), PAPER)
        pen = ImageDraw.Draw(page)
        for k, heading in enumerate(self.columns):
            pen.text((margin + k * (cell + gap), margin - 2), drawable(heading), fill=INK, font=large)
        for top, label, drawn in strips:
            if label:
                pen.text((margin, top), drawable(label), fill=MUTED, font=small)
                top += 24
            for k, (tile, words) in enumerate(drawn):
                left = margin + k * (cell + gap)
                page.paste(tile, (left, top))
                for n, line in enumerate(words):
                    pen.text((left, top + tile.height + 5 + 19 * n), line, fill=MUTED, font=small)
        return page

    def html(self) -> str:
        """The sheet as a grid of figures with the pictures inside (base64)."""
        count = max(len(self.columns), *(len(cells) for _, cells in self.rows))
        parts = [f'<div class="sheet" style="--columns:{count}">']
        parts += [f'<div class="heading">{html.escape(heading)}</div>' for heading in self.columns]
        for label, cells in self.rows:
            if label:
                parts.append(f'<div class="label">{html.escape(label)}</div>')
            for k in range(count):
                if k >= len(cells):
                    parts.append("<span></span>")
                    continue
                words = cells[k].caption
                alternative = html.escape(" ".join(filter(None, (label, self.columns[k] if k < len(self.columns) else "", words))) or "picture", quote=True)
                caption = f"<figcaption>{html.escape(words)}</figcaption>" if words else ""
                heading = f' data-heading="{html.escape(self.columns[k], quote=True)}"' if k < len(self.columns) else ""
                parts.append(f'<figure{heading}><img src="{data_uri(cells[k].image)}" alt="{alternative}">{caption}</figure>')
        return "".join([*parts, "</div>"])


def data_uri(image: Image.Image) -> str:
    """A picture as text that an HTML file can carry: JPEG of high quality where that is smaller, PNG otherwise."""
    best = None
    for kind, settings in (("png", {"optimize": True}), ("jpeg", {"quality": 88, "optimize": True})):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, kind, **settings)
        if best is None or buffer.tell() < 0.7 * len(best[1]):
            best = (kind, buffer.getvalue())
    return f"data:image/{best[0]};base64,{base64.b64encode(best[1]).decode()}"


def gallery(images: object, regions: object, active: object, captions: Sequence[str] | None = None, *, shares: object | None = None) -> Sheet:
    """Image, heat map, region and mask of several images, one row each, with the share hidden inside and outside.

    Args:
        images: float in [0, 1]. [B, C, H, W], or a list of [C, H, W] of different sizes
        regions: [B, H, W] or a list of [H, W]
        active: bool, True = visible. [B, Gh, Gw]
        captions: a label per image.
        shares: (hidden inside, hidden outside, hidden) per image, from the policy's own count; NaN where there is no such patch. [B, 3]
    """
    sheet = Sheet(("Image", "Heat map", "Region", "Mask"))
    for k, image in enumerate(images):
        words = ""
        if shares is not None:
            inside, outside, overall = (float(v) for v in to_array(shares)[k])
            words = f"hidden: {percent(inside)} inside, {percent(outside)} outside, {percent(overall)} overall"
        sheet.add(captions[k] if captions else "", Cell(picture(image)), Cell(heat_map(regions[k])), Cell(overlay(image, regions[k])),
                  Cell(mask_picture(image, active[k], region=regions[k]), words))
    return sheet


def reconstruction_sheet(images: object, active: object, reconstruction: object, *, regions: object | None = None,
                         captions: Sequence[str] | None = None, size: int = SIZE) -> Sheet:
    """Original, masked input, reconstruction (visible patches pasted in) and where the error lies, one row per image.

    Args:
        images, reconstruction: float in [0, 1]; values beyond are clamped. [B, C, H, W]
        active: bool, True = visible. [B, Gh, Gw]
        regions: outlined in the masked input where given. [B, H, W]
    """
    sheet = Sheet(("Image", "What the encoder sees", "Reconstruction", "Error, hidden patches"))
    images, reconstruction, active = to_array(images), to_array(reconstruction), to_array(active).astype(bool)
    if images.shape != reconstruction.shape:
        raise ValueError(f"view: reconstruction must have the shape of images {list(images.shape)}, got {list(reconstruction.shape)}.")
    for k, image in enumerate(images):
        rows, columns = image.shape[1] // active.shape[1], image.shape[2] // active.shape[2]
        visible = np.repeat(np.repeat(active[k], rows, 0), columns, 1)
        filled = np.where(visible, image, np.clip(np.nan_to_num(reconstruction[k]), 0, 1))
        error = np.where(visible, 0.0, np.abs(filled - image).mean(0))
        region = None if regions is None else regions[k]
        hidden = f"{percent(1 - active[k].mean())} hidden"
        mean = error[~visible].mean() if (~visible).any() else 0.0
        sheet.add(captions[k] if captions else "", Cell(picture(image, size=size)), Cell(mask_picture(image, active[k], region=region, size=size), hidden),
                  Cell(picture(filled, size=size)), Cell(heat_map(np.clip(2.5 * error, 0, 1), size=size), f"mean absolute error {mean:.3f}"))
    return sheet


def reconstruction_panel(images: object, active: object, reconstruction: object, *, region: object | None = None,
                         captions: Sequence[str] | None = None) -> Image.Image:
    """`reconstruction_sheet` as one picture.

    Args:
        images, reconstruction: [B, C, H, W], float in [0, 1]
        active: bool [B, Gh, Gw]
        region: [B, H, W]
    """
    return reconstruction_sheet(images, active, reconstruction, regions=region, captions=captions).image()


def percent(share: float) -> str:
    """A share as whole per cent; a dash where there is none (a hyphen: Pillow's typeface draws a box for any other)."""
    return "-" if share != share else f"{round(100 * float(share))} %"


def _scaled(image: Image.Image, width: int) -> Image.Image:
    return image.convert("RGB").resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)


def _wrapped(text: str, typeface, width: int) -> list[str]:
    lines: list[str] = []
    for word in re.findall(r"\S+(?: %\S*)?", " ".join(text.split())):  # a number keeps its sign
        if lines and typeface.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
