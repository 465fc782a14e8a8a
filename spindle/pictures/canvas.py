"""Canvas: marks of a picture in, an SVG file out; and how much room a text takes.

The text's width is an estimate from above: the fonts of readers differ, and nothing may overlap with any of them.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from html import escape

from spindle.timeline.svg import FONT, text_at
from spindle.words.harmless import harmless

INK = "#1b2027"
WIDE = frozenset("mwMW@%")
NARROW = frozenset("ijlt.,:;|!'()[]fI ")
MARGIN = 12.0
BOLD = 1.15  # width of bold letters over that of others


def width_of(text: str, size: float) -> float:
    """Pixels that a text takes at a font size, at most."""
    return sum(map(_em, text)) * size


def _em(letter: str) -> float:
    if unicodedata.east_asian_width(letter) in "WF":
        return 1.05
    if letter in WIDE:
        return 0.98
    return 0.4 if letter in NARROW else 0.72 if letter.isupper() else 0.62


def cut(text: str, width: float, size: float) -> str:
    """The text, with "..." in place of its middle where it is wider than `width` pixels: both ends tell names apart."""
    if width_of(text, size) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        head = (kept + 1) // 2
        shorter = f"{text[:head]}...{text[len(text) - kept + head :]}"
        if width_of(shorter, size) <= width:
            return shorter
    return text[:1]


def svg(parts: Iterable[str], *, width: float, height: float, title: str, description: str) -> str:
    """A file of its own on white; `title` and `description` are what a screen reader says.

    Titles may be names of files: what XML or UTF-8 has no sign for is written out or becomes a question mark.
    """
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" color="{INK}" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img" font-family="{FONT}" font-size="11">'
        f"<title>{escape(harmless(title))}</title><desc>{escape(description)}</desc>"
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )
    return text.encode("utf-8", "replace").decode()


def heading(title: str, notes: Sequence[str], *, width: float) -> tuple[list[str], float]:
    """A title with lines of notes below it, folded to `width`; and the y below them."""
    parts = [text_at(MARGIN, 24, cut(harmless(title), width - 2 * MARGIN, 15 * BOLD), size=15, weight="600")]
    y = 24.0
    for note in notes:
        for line in folded(note, width - 2 * MARGIN, 11):
            y += 16
            parts.append(text_at(MARGIN, y, line, opacity=0.8))
    return parts, y + 10


def folded(text: str, width: float, size: float) -> list[str]:
    """The text in lines of at most `width` pixels, broken at spaces; a word that is wider is cut."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and width_of(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(cut(word, width, size))
    return lines


def legend(entries: Sequence[tuple[str, str]], y: float, *, width: float) -> tuple[list[str], float]:
    """Rows of (mark, text) from y on, and the y below them; marks lie in a square of 14 pixels whose corner is 0, 0."""
    parts: list[str] = []
    x = MARGIN
    for mark, text in entries:
        shown = cut(text, width - 2 * MARGIN - 20, 11)
        taken = 20 + width_of(shown, 11) + 16
        if x + taken - 16 > width - MARGIN and x > MARGIN:
            x, y = MARGIN, y + 20
        parts.append(f'<g transform="translate({x:.1f} {y:.1f})">{mark}</g>')
        parts.append(text_at(x + 20, y + 11, shown))
        x += taken
    return parts, y + 24
