"""PNG: the SVG as points, by the real library; what it lacks is said."""

import struct
import sys
import zlib
from collections import Counter

import pytest

from spindle.errors import InputError
from spindle.timeline import render_png, render_svg
from spindle.timeline.colors import fills
from spindle.timeline.png import to_png
from spindle.timeline.svg import FONT
from tests.timeline.timeline_samples import made_up_run, planned

Color = tuple[int, int, int]


def size_of(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def colors_of(png: bytes) -> Counter[Color]:
    """Points of each color, of a file of eight bits for red, green, blue and alpha."""
    width, height = size_of(png)
    assert png[24:29] == bytes([8, 6, 0, 0, 0])
    at, packed = 8, b""
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        packed += png[at + 8 : at + 8 + length] if png[at + 4 : at + 8] == b"IDAT" else b""
        at += length + 12
    raw, found, above = zlib.decompress(packed), Counter[Color](), bytearray(4 * width)
    for y in range(height):
        start = y * (4 * width + 1)
        row = unfiltered(raw[start], raw[start + 1 : start + 1 + 4 * width], above)
        found.update((row[x], row[x + 1], row[x + 2]) for x in range(0, 4 * width, 4))
        above = row
    return found


def unfiltered(kind: int, line: bytes, above: bytearray) -> bytearray:
    """One row, by the five filters of the PNG standard."""
    row = bytearray(line)
    for i, value in enumerate(line):
        left, up, corner = (row[i - 4], above[i], above[i - 4]) if i >= 4 else (0, above[i], 0)
        nearest = min((left, up, corner), key=lambda v: abs(left + up - corner - v))
        row[i] = (value + (0, left, up, (left + up) // 2, nearest)[kind]) % 256
    return row


def test_a_picture_of_a_plan_and_a_run() -> None:
    """Twice the points of the SVG's width and height; every component's color fills some of them."""
    plan, predicted = planned(8)
    run = made_up_run(plan, predicted)
    svg = render_svg(plan, predicted=predicted, measured=run, title="two tasks")
    wide, high = size_of(render_png(plan, predicted=predicted, measured=run, title="two tasks"))
    assert f'viewBox="0 0 {wide / 2:g} {high / 2:g}"' in svg
    found = colors_of(to_png(svg, font=FONT, zoom=0.5))
    white = found.pop((255, 255, 255))
    assert white > 0.2 * found.total()
    for fill in fills(4):
        assert found[int(fill[1:3], 16), int(fill[3:5], 16), int(fill[5:7], 16)] > 5


def test_text_is_drawn() -> None:
    """A title changes the points, though the picture has the same size."""
    plan = planned(2)[0]
    first, second = (render_png(plan, title=title) for title in ("one", "two"))
    assert size_of(first) == size_of(second)
    assert first != second


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(InputError, match=r"pip install 'spindle\[png\]', or write an SVG file"):
        render_png(planned(2)[0])


def test_without_fonts() -> None:
    """A picture without its text is refused, not written."""
    with pytest.raises(InputError, match="needs one of the fonts 'Nobody Has This', and none is installed; install"):
        to_png(render_svg(planned(2)[0]), font="'Nobody Has This'")
