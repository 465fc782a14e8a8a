"""Curves as SVG: a panel for each part of the model, seconds of a layer over numbers of devices, on logarithmic axes.

Curves of a panel differ in color, in the form of their points and in their dashes. A filled point was measured.
"""

from collections.abc import Iterator, Sequence

from spindle.pictures.axes import Axis, device_axis, frame, log_ticks
from spindle.pictures.canvas import BOLD, MARGIN, cut, heading, legend, svg
from spindle.pictures.curves import Curve, Panel
from spindle.timeline.colors import lines
from spindle.timeline.svg import text_at
from spindle.timeline.words import count, seconds

WIDTH, HEIGHT = 296.0, 150.0  # of a panel, and of what its axes enclose
LEFT, SPACE = 54.0, 20.0  # for labels; between panels
COLUMNS = 3
CURVES = 4  # of a panel; more are shown in a further one
LEAST_RATIO = 6.0  # of the ends of an axis of seconds
LINE = 14.0
DASHES = ("", "7 3", "2 3", "9 3 2 3")
FORMS = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "M-3.2 -3.2h6.4v6.4h-6.4z",
    "M0 -4.2l4 7h-8z",
    "M0 -4.5l4.5 4.5l-4.5 4.5l-4.5 -4.5z",
)
COLORS = lines(CURVES, dark=False)
RING = '<circle r="7" fill="none" stroke="currentColor" stroke-width="1.3"/>'
IDEAL = 'fill="none" stroke="currentColor" stroke-opacity="0.45" stroke-width="0.8"'


def curves_svg(panels: Sequence[Panel], *, num_devices: int, title: str, notes: Sequence[str] = ()) -> str:
    """The picture as the text of an SVG file; `notes` are lines below its title."""
    shown = [part for panel in panels for part in _parts(panel)]
    columns = min(COLUMNS, max(2, len(shown)))
    width = 2 * MARGIN + columns * (WIDTH + SPACE) - SPACE
    parts, y = heading(title, notes, width=width)
    for first in range(0, len(shown), columns):
        row = shown[first : first + columns]
        for place, panel in enumerate(row):
            parts += _panel(panel, MARGIN + place * (WIDTH + SPACE), y, num_devices)
        y += 24 + HEIGHT + 40 + max(len(panel.curves) for panel in row) * (2 * LINE + 4) + 18
    drawn, bottom = legend(_entries(panels, num_devices), y, width=width)
    words = "Seconds of one layer, forward and backward, over the number of devices, a panel for each part of the model"
    return svg([*parts, *drawn], width=width, height=bottom, title=title, description=words)


def _parts(panel: Panel) -> list[Panel]:
    """The panel, or several of CURVES curves each."""
    curves, number = panel.curves, -(-len(panel.curves) // CURVES)
    if number == 1:
        return [panel]
    return [Panel(f"{panel.name} ({i + 1} of {number})", curves[i * CURVES : (i + 1) * CURVES]) for i in range(number)]


def _panel(panel: Panel, x: float, y: float, num_devices: int) -> Iterator[str]:
    across = device_axis(num_devices, x + LEFT, x + WIDTH)
    up = _time_axis(panel, y + 24 + HEIGHT, y + 24)
    yield text_at(x, y + 12, cut(panel.name, WIDTH, 12 * BOLD), size=12, weight="600")
    yield from frame(across, up, num_devices, [(at_s, seconds(at_s)) for at_s in log_ticks(up)])
    for place, curve in enumerate(panel.curves):
        yield from _band(curve, across, up, COLORS[place])
    for place, curve in enumerate(panel.curves):
        yield from _drawn(curve, across, up, place, num_devices)
    text_y = y + 24 + HEIGHT + 40
    for place, curve in enumerate(panel.curves):
        at = text_y + place * (2 * LINE + 4)
        sample = _stroke(place, "M-13 0H13") + _point(place, bool(curve.measured))
        yield f'<g transform="translate({x + 13:.1f} {at + 7:.1f})">{sample}</g>'
        names = ", ".join(curve.tasks) or ", ".join(curve.metaops)
        yield text_at(x + 34, at + 11, cut(names, WIDTH - 34, 11))
        yield text_at(x + 34, at + 11 + LINE, cut(_words(curve, num_devices), WIDTH - 34, 10), size=10, opacity=0.8)


def _time_axis(panel: Panel, start: float, end: float) -> Axis:
    low = min(time_s * curve.low for curve in panel.curves for _, time_s in curve.points)
    high = max(time_s * curve.high for curve in panel.curves for _, time_s in curve.points)
    wider = max(1.15, (LEAST_RATIO * low / high) ** 0.5)
    return Axis(low=low / wider, high=high * wider, start=start, end=end)


def _band(curve: Curve, across: Axis, up: Axis, color: str) -> Iterator[str]:
    """Where nine of ten measured times lie; of a single number of devices a bar."""
    if curve.low == curve.high:
        return
    if len(curve.points) == 1:
        n, time_s = curve.points[0]
        ends = f"M{across.at(n):.1f} {up.at(time_s * curve.high):.1f}V{up.at(time_s * curve.low):.1f}"
        yield f'<path d="{ends}" stroke="{color}" stroke-width="6" stroke-opacity="0.2"/>'
        return
    above = [f"{across.at(n):.1f} {up.at(time_s * curve.high):.1f}" for n, time_s in curve.points]
    below = [f"{across.at(n):.1f} {up.at(time_s * curve.low):.1f}" for n, time_s in reversed(curve.points)]
    yield f'<path d="M{"L".join([*above, *below])}z" fill="{color}" fill-opacity="0.13"/>'


def _drawn(curve: Curve, across: Axis, up: Axis, place: int, num_devices: int) -> Iterator[str]:
    first, first_s = curve.points[0]
    last = min(num_devices, first * first_s / up.low)  # where the ideal leaves the panel
    ideal = f"M{across.at(first):.1f} {up.at(first_s):.1f}L{across.at(last):.1f} {up.at(first_s * first / last):.1f}"
    yield f'<path d="{ideal}" {IDEAL}/>' if curve.most > 1 else ""
    path = "L".join(f"{across.at(n):.1f} {up.at(time_s):.1f}" for n, time_s in curve.points)
    yield _stroke(place, f"M{path}")
    for n, time_s in curve.points:
        where = f"translate({across.at(n):.1f} {up.at(time_s):.1f})"
        ring = RING if n == curve.enough < num_devices else ""
        yield f'<g transform="{where}"><title>{count(n, "device")}: {seconds(time_s)}</title>{ring}'
        yield f"{_point(place, n in curve.measured)}</g>"


def _stroke(place: int, path: str) -> str:
    dashes = f' stroke-dasharray="{DASHES[place]}"' if DASHES[place] else ""
    return f'<path d="{path}" fill="none" stroke="{COLORS[place]}" stroke-width="1.6"{dashes}/>'


def _point(place: int, filled: bool) -> str:
    fill = COLORS[place] if filled else "#ffffff"
    return f'<path d="{FORMS[place]}" fill="{fill}" stroke="{COLORS[place]}" stroke-width="1.3"/>'


def _words(curve: Curve, num_devices: int) -> str:
    """Up to where it scales, and how sure its times are."""
    if curve.most == 1:
        ends = "one device only"
    elif curve.enough == num_devices:
        ends = f"faster up to all {num_devices}"
    elif curve.enough == curve.most:
        ends = f"on {curve.most} at most"
    else:
        ends = f"no faster beyond {curve.enough}"
    sure = f", x {curve.low:.2f} to {curve.high:.2f}" if curve.low < curve.high else ""
    return f"{ends}; {curve.source}{sure}"


def _entries(panels: Sequence[Panel], num_devices: int) -> list[tuple[str, str]]:
    """What the marks of the picture mean."""
    curves = [curve for panel in panels for curve in panel.curves]
    middle = '<g transform="translate(7 7)">{}</g>'
    found = [('<path d="M0 2L14 12" fill="none" stroke="currentColor" stroke-opacity="0.6"/>', "ideal: 1/n")]
    if any(curve.measured for curve in curves):
        found.append((middle.format(_point(0, True)), "measured"))
    if any(len(curve.measured) < len(curve.points) for curve in curves):
        found.append((middle.format(_point(0, False)), "not measured here"))
    if any(curve.enough < num_devices for curve in curves):
        found.append((middle.format(RING), "from here on more devices do not help, or cannot be used"))
    if any(curve.low < curve.high for curve in curves):
        band = f'<rect y="1" width="14" height="12" fill="{COLORS[0]}" fill-opacity="0.2"/>'
        found.append((band, "band: so far nine of ten held-out steps lie from their prediction"))
    return found
