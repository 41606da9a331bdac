"""A report in one HTML file: pictures inside (base64), style inside, nothing fetched, nothing run."""

from __future__ import annotations

import html
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mwm.view.chart import Chart
from mwm.view.sheet import Sheet, data_uri
from mwm.view.theme import STYLE


class Report:
    """Sections of words, figures, charts and tables, in the order they are added.

    Words may use `code` and **strong**; everything else is shown as it stands.

    Args:
        title: the heading.
        lead: a sentence or two beneath it.
        kicker: a few words above it.
    """

    def __init__(self, title: str, lead: str = "", *, kicker: str = "mwm · Mask What Matters") -> None:
        self.title, self.lead, self.kicker = title, lead, kicker
        self._parts: list[str] = []
        self._contents: list[tuple[str, str]] = []
        self._open = False
        self._figures = 0

    def section(self, title: str, *paragraphs: str) -> Report:
        """Begin a section; it appears in the contents."""
        if self._open:
            self._parts.append("</section>")
        name = f"part-{len(self._contents) + 1}"
        self._contents.append((name, title))
        self._parts.append(f'<section id="{name}"><h2><span class="count">{len(self._contents)}</span>{html.escape(title)}</h2>')
        self._open = True
        return self.text(*paragraphs)

    def text(self, *paragraphs: str) -> Report:
        """Add paragraphs."""
        self._parts += [f"<p>{_words(p)}</p>" for p in paragraphs]
        return self

    def note(self, words: str, *, kind: str = "note") -> Report:
        """Add a set-off remark; kind is note or warning."""
        if kind not in {"note", "warning"}:
            raise ValueError(f'report: kind must be "note" or "warning", got {kind!r}.')
        self._parts.append(f'<aside class="{kind}">{_words(words)}</aside>')
        return self

    def facts(self, facts: Sequence[tuple[str, str]]) -> Report:
        """Add a band of (figure, what it is)."""
        tiles = "".join(f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(figure)}</dd></div>" for figure, label in facts)
        self._parts.append(f'<dl class="facts">{tiles}</dl>')
        return self

    def sheet(self, sheet: Sheet, caption: str = "") -> Report:
        """Add a grid of pictures."""
        return self._figure(sheet.html(), caption)

    def picture(self, image: Image.Image, caption: str = "", *, alternative: str = "") -> Report:
        """Add one picture."""
        return self._figure(f'<img class="single" src="{data_uri(image)}" alt="{html.escape(alternative or caption, quote=True)}">', caption)

    def chart(self, chart: Chart, caption: str = "") -> Report:
        """Add a chart, drawn as SVG."""
        return self._figure(chart.svg(), caption)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Report:
        """Add a table."""
        head = "".join(f"<th>{_words(h)}</th>" for h in header)
        body = "".join("<tr>" + "".join(f"<td>{_words(c)}</td>" for c in row) + "</tr>" for row in rows)
        return self._figure(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>', caption, numbered=False)

    def command(self, line: str) -> Report:
        """Add a command to type."""
        self._parts.append(f"<pre><code>{html.escape(line)}</code></pre>")
        return self

    def preformatted(self, lines: str) -> Report:
        """Add lines that stand as they were printed."""
        self._parts.append(f"<pre><code>{html.escape(lines)}</code></pre>")
        return self

    def _figure(self, body: str, caption: str, *, numbered: bool = True) -> Report:
        if caption and numbered:
            self._figures += 1
            caption = f"**Figure {self._figures}.** {caption}"
        words = f"<figcaption>{_words(caption)}</figcaption>" if caption else ""
        self._parts.append(f'<figure class="plate">{body}{words}</figure>')
        return self

    def html(self) -> str:
        """The whole page."""
        contents = "".join(f'<li><a href="#{name}">{html.escape(title)}</a></li>' for name, title in self._contents)
        navigation = f'<nav aria-label="Contents"><ol>{contents}</ol></nav>' if len(self._contents) > 2 else ""
        lead = f'<p class="lead">{_words(self.lead)}</p>' if self.lead else ""
        body = "".join(self._parts) + ("</section>" if self._open else "")
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
            f'<meta name="color-scheme" content="light dark"><title>{html.escape(self.title)}</title><style>{STYLE}</style></head>\n'
            f'<body><header><p class="kicker">{html.escape(self.kicker)}</p><h1>{html.escape(self.title)}</h1>{lead}</header>'
            f"{navigation}<main>{body}</main></body></html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page whole or not at all; folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".html")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.html())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path


def _words(text: str) -> str:
    escaped = html.escape(text)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped)
