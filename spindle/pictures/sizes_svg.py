"""Sizes as SVG: what `spindle whatif` found on several numbers of devices; the time of a step, and its efficiency."""

from collections.abc import Iterator, Sequence

from spindle.pictures.axes import Axis, device_axis, frame, log_ticks
from spindle.pictures.canvas import MARGIN, heading, legend, svg, width_of
from spindle.planner.report.sizes import Size, enough
from spindle.timeline.svg import text_at
from spindle.timeline.words import count, percent, seconds

WIDTH, HEIGHT, LEFT, SPACE = 400.0, 210.0, 60.0, 28.0
LABEL = 46.0  # least distance of two labels
PLAN, OTHER = "#127d9d", "#c33c04"
CROSS = '<path d="M-4 -4L4 4M-4 4L4 -4" stroke="currentColor" stroke-width="1.6"/>'
ROUND = '<circle r="4" fill="{0}"/>'
SQUARE = '<rect x="-3.5" y="-3.5" width="7" height="7" fill="#ffffff" stroke="{0}" stroke-width="1.5"/>'
RING = '<circle r="8" fill="none" stroke="currentColor" stroke-width="1.3"/>'


def sizes_svg(rows: Sequence[Size], *, title: str, notes: Sequence[str] = ()) -> str:
    """The picture as the text of an SVG file; `notes` are lines below its title. Sizes without a plan are crosses."""
    width = 2 * MARGIN + 2 * WIDTH + SPACE
    parts, y = heading(title, notes, width=width)
    most = max(row.devices for row in rows)
    for place, (name, panel) in enumerate((("time of a step", _steps), ("efficiency", _efficiency))):
        x = MARGIN + place * (WIDTH + SPACE)
        parts.append(text_at(x, y + 12, name, size=12, weight="600"))
        parts += panel(rows, device_axis(most, x + LEFT, x + WIDTH), y + 24 + HEIGHT, most)
    drawn, bottom = legend(_entries(rows), y + 24 + HEIGHT + 44, width=width)
    words = "Two panels over the number of devices: seconds of a training step, and its efficiency"
    return svg([*parts, *drawn], width=width, height=bottom, title=title, description=words)


def _steps(rows: Sequence[Size], across: Axis, bottom: float, most: int) -> Iterator[str]:
    """Seconds, beside the ideal from the smallest size on and beside the best of the baselines."""
    planned = [row for row in rows if not row.reason]
    times_s = [time_s for row in planned for time_s in (row.step_s, row.usual_s) if time_s] or [1.0]
    up = Axis(low=min(times_s) / 1.6, high=max(times_s) * 1.25, start=bottom, end=bottom - HEIGHT)
    yield from frame(across, up, most, [(at_s, seconds(at_s)) for at_s in log_ticks(up)])
    if planned:
        least = planned[0]
        last = min(most, least.devices * least.step_s / up.low)
        ideal = [(least.devices, least.step_s), (last, least.devices * least.step_s / last)]
        yield _line(ideal, across, up, 'stroke="currentColor" stroke-opacity="0.5" stroke-width="0.8"')
    others = [(row.devices, row.usual_s) for row in planned if row.usual_s]
    yield from _series(others, across, up, f'stroke="{OTHER}" stroke-dasharray="6 3"', SQUARE.format(OTHER))
    steps = [(row.devices, row.step_s) for row in planned]
    yield from _series(steps, across, up, f'stroke="{PLAN}" stroke-width="1.8"', ROUND.format(PLAN), ring=enough(rows))
    yield from _crosses(rows, across, bottom)


def _efficiency(rows: Sequence[Size], across: Axis, bottom: float, most: int) -> Iterator[str]:
    """Against the smallest size that has a plan; each point with its number."""
    points = [(row.devices, row.efficiency) for row in rows if not row.reason]
    top = max([1.0, *(value for _, value in points)])
    up = Axis(low=0.0, high=1.12 * top, start=bottom, end=bottom - HEIGHT, is_log=False)
    yield from frame(across, up, most, [(tenth / 4, f"{25 * tenth} %") for tenth in range(int(4 * up.high) + 1)])
    yield from _series(points, across, up, f'stroke="{PLAN}" stroke-width="1.8"', ROUND.format(PLAN), ring=enough(rows))
    free_x = 0.0
    for n, value in points:
        if across.at(n) >= free_x:
            x = min(across.at(n), across.end + MARGIN - 1 - width_of(percent(value), 10) / 2)
            yield text_at(x, up.at(value) - 11, percent(value), anchor="middle", size=10)
            free_x = across.at(n) + LABEL
    yield from _crosses(rows, across, bottom)


def _series(
    points: Sequence[tuple[int, float]], across: Axis, up: Axis, stroke: str, mark: str, ring: int | None = None
) -> Iterator[str]:
    if points:
        yield _line(points, across, up, stroke)
    for n, value in points:
        around = RING if n == ring else ""
        yield f'<g transform="translate({across.at(n):.1f} {up.at(value):.1f})">{around}{mark}</g>'


def _line(points: Sequence[tuple[float, float]], across: Axis, up: Axis, stroke: str) -> str:
    path = "L".join(f"{across.at(n):.1f} {up.at(value):.1f}" for n, value in points)
    return f'<path d="M{path}" fill="none" {stroke}/>'


def _crosses(rows: Sequence[Size], across: Axis, bottom: float) -> Iterator[str]:
    for row in rows:
        if row.reason:
            yield f'<g transform="translate({across.at(row.devices):.1f} {bottom - 8:.1f})">{CROSS}</g>'


def _entries(rows: Sequence[Size]) -> list[tuple[str, str]]:
    middle = '<g transform="translate(7 7)">{}</g>'
    found = []
    if not all(row.reason for row in rows):
        found.append((middle.format(ROUND.format(PLAN)), "this plan"))
        found.append(('<path d="M0 2L14 12" stroke="currentColor" stroke-opacity="0.6"/>', "ideal: 1/n"))
    if any(row.usual_s for row in rows):
        found.append((middle.format(SQUARE.format(OTHER)), "best baseline"))
    if enough(rows) is not None:
        found.append((middle.format(RING), f"more than {count(enough(rows) or 0, 'device')} do not help"))
    if any(row.reason for row in rows):
        found.append((middle.format(CROSS), "no plan fits"))
    return found
