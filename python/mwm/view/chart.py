"""Charts from a handful of shapes, drawn as SVG (for the report) or as a picture (for a PNG)."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

from mwm.view.pixels import HAIRLINE, INK, MUTED, PAPER, SERIES, drawable, font

_COLOURS = {"ink": INK, "muted": MUTED, "line": HAIRLINE, "paper": PAPER, **{f"s{k}": c for k, c in enumerate(SERIES)}}


@dataclass
class Chart:
    """Shapes on a canvas of `width` x `height` units; colours are roles (ink, muted, line, s0 … s4), so a page may restyle them."""

    width: int
    height: int
    title: str = ""
    shapes: list[tuple] = field(default_factory=list)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.0, opacity: float = 1.0) -> None:
        self.shapes.append(("line", [(float(x), float(y)) for x, y in points], colour, width, opacity))

    def box(self, x: float, y: float, width: float, height: float, colour: str, opacity: float = 1.0) -> None:
        self.shapes.append(("box", (float(x), float(y), float(width), float(height)), colour, opacity))

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        self.shapes.append(("dot", (float(x), float(y), float(radius)), colour))

    def text(self, x: float, y: float, words: str, *, colour: str = "muted", size: int = 13, anchor: str = "start") -> None:
        """Words with their middle line at y; anchor is start, middle or end."""
        self.shapes.append(("text", (float(x), float(y)), words, colour, size, anchor))

    def svg(self) -> str:
        """The chart as an SVG element; colours are CSS variables with the light theme as fallback."""
        paint = {role: f"var(--{role},{value})" for role, value in _COLOURS.items()}
        parts = [f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{html.escape(self.title, quote=True)}" '
                 f'xmlns="http://www.w3.org/2000/svg" style="max-width:{self.width}px">']
        for kind, *rest in self.shapes:
            if kind == "line":
                points, colour, width, opacity = rest
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
                parts.append(f'<polyline points="{path}" style="fill:none;stroke:{paint[colour]};stroke-width:{width};stroke-opacity:{opacity}" '
                             'stroke-linejoin="round" stroke-linecap="round"/>')
            elif kind == "box":
                (x, y, width, height), colour, opacity = rest
                parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" style="fill:{paint[colour]};fill-opacity:{opacity}"/>')
            elif kind == "dot":
                (x, y, radius), colour = rest
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" style="fill:{paint[colour]}"/>')
            else:
                (x, y), words, colour, size, anchor = rest
                parts.append(f'<text x="{x:.1f}" y="{y:.1f}" dominant-baseline="central" text-anchor="{anchor}" '
                             f'style="fill:{paint[colour]};font-size:{size}px">{html.escape(words)}</text>')
        return "".join([*parts, "</svg>"])

    def image(self, *, scale: float = 2.0) -> Image.Image:
        """The chart as a picture on white with a margin, drawn large and reduced for smooth lines."""
        over, margin = 2 * scale, round(20 * scale)
        page = Image.new("RGB", (round(self.width * over), round(self.height * over)), PAPER)
        pen = ImageDraw.Draw(page)
        for kind, *rest in self.shapes:
            if kind == "line":
                points, colour, width, opacity = rest
                pen.line([(x * over, y * over) for x, y in points], fill=_mixed(colour, opacity), width=max(1, round(width * over)), joint="curve")
            elif kind == "box":
                (x, y, width, height), colour, opacity = rest
                if width > 0 and height > 0:
                    pen.rectangle([x * over, y * over, (x + width) * over, (y + height) * over], fill=_mixed(colour, opacity))
            elif kind == "dot":
                (x, y, radius), colour = rest
                pen.ellipse([(x - radius) * over, (y - radius) * over, (x + radius) * over, (y + radius) * over], fill=_COLOURS[colour])
            else:
                (x, y), words, colour, size, anchor = rest
                pen.text((x * over, y * over), drawable(words), fill=_COLOURS[colour], font=font(round(size * over)),
                         anchor={"start": "lm", "middle": "mm", "end": "rm"}[anchor])
        small = page.resize((round(self.width * scale), round(self.height * scale)), Image.Resampling.LANCZOS)
        framed = Image.new("RGB", (small.width + 2 * margin, small.height + 2 * margin), PAPER)
        framed.paste(small, (margin, margin))
        return framed


def _mixed(role: str, opacity: float) -> tuple[int, int, int]:
    value = _COLOURS[role].lstrip("#")
    return tuple(round(int(value[k : k + 2], 16) * opacity + 255 * (1 - opacity)) for k in (0, 2, 4))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5, 5 times a power of ten) that cover [low, high] in about `count` steps."""
    span = max(high - low, 1e-12)
    raw = span / max(count, 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Tick labels, all with as many decimals as the one that needs most."""
    decimals = max((len(f"{v:.6f}".rstrip("0").split(".")[1]) for v in values), default=0)
    return [f"{v:.{decimals}f}" for v in values]
