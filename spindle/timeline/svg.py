"""SVG: views in, a static picture out, for papers, for print, and for browsers without JavaScript.

- Up to `MAX_ROWS` devices have a row each; of more, neighbors share a row that shows the first of them.
- What is narrower than `LEAST_WIDTH` is left out: it could not be seen.
- Text takes `currentColor`, so the picture fits a dark page too.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape

from spindle.timeline.colors import fills, lines, text_on
from spindle.timeline.items import COMPUTE_KINDS, Cause, Item, Kind, View, What, have_own_axes
from spindle.timeline.memory import MemoryModel
from spindle.timeline.page.data import component_names, task_names
from spindle.timeline.waves import WaveTime, leading, turn_by_wave, wave_times
from spindle.timeline.words import ranges, scales_in_words, seconds, seconds_on_axis, size
from spindle.values.plan import Plan

WIDTH = 1120.0
LEFT, RIGHT = 84.0, 14.0
MAX_ROWS = 48
LEAST_WIDTH = 0.3
FONT = "system-ui, 'Segoe UI', Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', 'Noto Sans', sans-serif"
CHARACTER = 6.1  # width of a letter at 11 px
FOOT = 0.3  # share of a row's height
LABELED = 11.0  # least height of a row with a label of its own; of lower ones every second has one

GRAY = "#8793a1"
DEFS = (
    "<defs>"
    '<pattern id="backward" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="1.7" height="5" fill="#ffffff" fill-opacity="0.62"/></pattern>'
    '<pattern id="reduce" width="4" height="4" patternUnits="userSpaceOnUse">'
    '<rect width="1" height="4" fill="#ffffff" fill-opacity="0.45"/></pattern>'
    "</defs>"
)
COMMUNICATION_KINDS = (Kind.WAIT, Kind.ISSUE, Kind.REDUCE)
TITLES = {"plan": "Plan", "predicted": "Planned", "measured": "Measured"}


@dataclass(frozen=True, kw_only=True)
class _Style:
    """What a view is drawn with."""

    height: float  # of a row
    longest_s: float  # what the axis reaches to
    fill_by_component: dict[str, str]
    line_by_task: dict[str, str]
    turns: dict[int, int]  # by wave

    @property
    def scale(self) -> float:
        """Pixels per second."""
        return (WIDTH - LEFT - RIGHT) / self.longest_s

    def x(self, at_s: float) -> float:
        return LEFT + at_s * self.scale


def draw_svg(
    plan: Plan,
    views: Sequence[View],
    *,
    title: str,
    threshold: float,
    standalone: bool,
    memory: MemoryModel | None = None,
) -> str:
    """The shown step of each view, under one time axis or one each (see `have_own_axes`), and memory over the last one.

    `standalone`: a file of its own, with a legend, which the page has beside it.
    """
    longest_s = max(view.shown.step_s for view in views) or 1.0
    groups = device_groups(plan)
    components, tasks = component_names(views), task_names(views)
    style = _Style(
        height=_row_height(groups),
        longest_s=longest_s,
        fill_by_component=dict(zip(components, fills(len(components)), strict=True)),
        line_by_task=dict(zip(tasks, lines(len(tasks), dark=False), strict=True)),
        turns=turn_by_wave(plan),
    )
    y = 22.0 if title else 4.0
    parts = [text_at(LEFT, 14, title, size=14, weight="600")] if title else []
    own, words = have_own_axes(views), scales_in_words(views)
    styles = [replace(style, longest_s=view.shown.step_s) if own else style for view in views]
    for view, of_view in zip(views, styles, strict=True):
        drawn, y = _panel(view, groups, y, of_view, threshold=threshold, words=words if view is views[-1] else "")
        parts += drawn
    if memory is not None:
        drawn, y = _memory(views[-1], memory, y, styles[-1])
        parts += drawn
    if standalone:
        drawn, y = _legend(style, {item.what for v in views for row in v.shown.rows for item in row}, y + 8)
        parts += drawn
    shape = "static tall" if y > 0.62 * WIDTH else "static"
    head = 'xmlns="http://www.w3.org/2000/svg" color="#1b2027" ' if standalone else f'class="{shape}" '
    label = escape(title or "timeline", quote=True)
    return (
        f'<svg {head}viewBox="0 0 {WIDTH:g} {y:g}" width="{WIDTH:g}" height="{y:g}" role="img" aria-label="{label}" '
        f'font-family="{FONT}" font-size="11">{DEFS}{"".join(parts)}</svg>'
    )


def device_groups(plan: Plan) -> list[tuple[int, ...]]:
    """Devices that share a row: none up to MAX_ROWS, else neighbors that run the same slices, or as many as needed."""
    if plan.num_devices <= MAX_ROWS:
        return [(device,) for device in range(plan.num_devices)]
    runs: list[list[int]] = [[] for _ in range(plan.num_devices)]
    for index, s in enumerate(plan.slices):
        for device in s.devices:
            runs[device].append(index)
    groups: list[list[int]] = []
    for device in range(plan.num_devices):
        if groups and runs[groups[-1][0]] == runs[device]:
            groups[-1].append(device)
        else:
            groups.append([device])
    if len(groups) > MAX_ROWS:
        width = -(-plan.num_devices // MAX_ROWS)
        groups = [list(range(i, min(i + width, plan.num_devices))) for i in range(0, plan.num_devices, width)]
    return [tuple(group) for group in groups]


def _row_height(groups: Sequence[tuple[int, ...]]) -> float:
    """Pixels of a row; those of several devices are never too low for a label of their own."""
    if len(groups) <= 12:
        return 22.0
    return 14.0 if len(groups) <= 24 else 9.0 if all(len(group) == 1 for group in groups) else LABELED


# -- panels -------------------------------------------------------------------------------------------------------


def _panel(
    view: View, groups: Sequence[tuple[int, ...]], y: float, style: _Style, *, threshold: float, words: str
) -> tuple[list[str], float]:
    """A heading, the axis with the waves, a row for each group; and where the next panel starts.

    `words`: what the heading ends with, if anything.
    """
    step = view.shown
    waves = wave_times(step, threshold=threshold)
    which = f" in step {step.step}, the median of {view.num_steps}" if view.num_steps > 1 else ""
    grouped = "" if all(len(group) == 1 for group in groups) else "; rows show the first of their devices"
    heading = f"{TITLES[view.source]}: {seconds(step.step_s)}{which}{grouped}{f'; {words}' if words else ''}"
    parts = [
        text_at(LEFT, y + 14, heading, weight="600"),
        text_at(LEFT - 6, y + 30, "device", anchor="end", size=10, opacity=0.7),
    ]
    top = y + 46
    bottom = top + style.height * len(groups)
    parts += _axis(step.step_s, y + 30, bottom, style)
    parts += _wave_marks(waves, leading(waves, style.turns), y + 34, style)
    for place, group in enumerate(groups):
        row_y = top + place * style.height
        if style.height >= LABELED or place % 2 == 0:
            parts.append(text_at(LEFT - 6, row_y + style.height / 2 + 3.5, ranges(group), anchor="end", size=10))
        parts += _row(step.rows[group[0]], row_y, style)
    return parts, bottom + 14


def _axis(step_s: float, y: float, bottom: float, style: _Style) -> Iterator[str]:
    for at_s in (tick_s for tick_s in nice_ticks(style.longest_s, 10) if tick_s <= step_s):
        x = style.x(at_s)
        yield f'<path d="M{x:.1f} {y + 4:g}V{bottom:g}" stroke="currentColor" stroke-opacity="0.14"/>'
        anchor = "start" if at_s == 0 else "end" if x > WIDTH - RIGHT - 30 else "middle"
        yield text_at(x, y, seconds_on_axis(at_s, style.longest_s), anchor=anchor, size=10, opacity=0.7)


def nice_ticks(length: float, most: int) -> list[float]:
    """At most `most` + 1 round moments from 0 to `length`."""
    if length <= 0:
        return [0.0]
    exponent = -30
    while True:
        for digit in (1, 2, 5):
            distance = digit * 10.0**exponent
            if length / distance <= most:
                return [i * distance for i in range(int(length / distance * (1 + 1e-9)) + 1)]
        exponent += 1


def _wave_marks(waves: Sequence[WaveTime], leads: Sequence[bool], y: float, style: _Style) -> Iterator[str]:
    """From where each wave that leads is the furthest begun, its number where there is room; a triangle where any wave
    missed its prediction.
    """
    shown = [wave for wave, lead in zip(waves, leads, strict=True) if lead]
    end_s = max((wave.end_s for wave in waves), default=0.0)
    for place, wave in enumerate(shown):
        x = style.x(wave.start_s)
        following = style.x(shown[place + 1].start_s if place + 1 < len(shown) else end_s)
        fill = ' fill="currentColor" fill-opacity="0.07"' if place % 2 else ' fill="currentColor" fill-opacity="0.16"'
        yield f'<rect x="{x:.1f}" y="{y:g}" width="{max(following - x, 0.5):.1f}" height="10"{fill}/>'
        label = str(wave.wave)
        if following - x > CHARACTER * len(label) + 4:
            yield text_at(x + 3, y + 8.5, label, size=9, opacity=0.75)
    for wave in waves:
        if wave.miss:
            x = style.x(wave.start_s)
            color = "#c62828" if wave.miss > 0 else "#1565c0"
            yield f'<path d="M{x:.1f} {y:g}h7l-7 7z" fill="{color}"/>'


def _row(row: Sequence[Item], y: float, style: _Style) -> Iterator[str]:
    """What a device does; communication beside computation lies over its foot."""
    gap = 1.0 if style.height >= 9 else 0.0
    height = style.height - gap
    under = _beside_compute(row)
    for place in [*(i for i in range(len(row)) if i not in under), *sorted(under)]:
        item = row[place]
        x, width = style.x(item.start_s), (item.end_s - item.start_s) * style.scale
        if width >= LEAST_WIDTH:
            low = height * FOOT if place in under else height
            yield from _item(item, x, width, y + height - low, low, style)


def _beside_compute(row: Sequence[Item]) -> set[int]:
    """Places of communication during which the device computes."""
    found: set[int] = set()
    compute_end_s, last = -1.0, -1
    for place, item in enumerate(row):
        if item.what.kind in COMMUNICATION_KINDS:
            if item.start_s < compute_end_s:
                found.add(place)
            last = place
        elif item.what.kind is not Kind.IDLE:
            compute_end_s = max(compute_end_s, item.end_s)
            if last >= 0 and row[last].end_s > item.start_s:
                found.add(last)
    return found


def _item(item: Item, x: float, width: float, y: float, height: float, style: _Style) -> Iterator[str]:
    what = item.what
    if what.kind in COMPUTE_KINDS:
        fill = style.fill_by_component.get(what.component, GRAY)
        line = style.line_by_task.get(what.task, GRAY)
        if width > 3 and height > 6:
            thick = 1.5 if height >= 12 else 0.8
            box = (
                f'x="{x + thick / 2:.2f}" y="{y + thick / 2:g}" width="{width - thick:.2f}" height="{height - thick:g}"'
            )
            yield f'<rect {box} fill="{fill}" stroke="{line}" stroke-width="{thick}"/>'
        else:
            box = f'x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{height:g}"'
            yield f'<rect {box} fill="{fill}"/>'
        if what.kind is Kind.BACKWARD:
            yield f'<rect {box} fill="url(#backward)"/>'
        around = fill if what.kind is Kind.BACKWARD else ""
        yield from _label(what.component or what.metaop, x, width, y, height, text_on(fill), around=around)
        return
    yield from _other(item, x, width, y, height, style)


def _other(item: Item, x: float, width: float, y: float, height: float, style: _Style) -> Iterator[str]:
    box = f'x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{height:g}"'
    middle, blocked = y + height / 2, item.blocked_s * style.scale
    match item.what.kind:
        case Kind.REDUCE:
            thin = f'x="{x:.2f}" y="{middle - 0.5:g}" width="{blocked:.2f}" height="1"'
            yield f'<rect {thin} fill="{GRAY}"/>' if blocked else ""
            box = f'x="{x + blocked:.2f}" y="{y:g}" width="{width - blocked:.2f}" height="{height:g}"'
            yield f'<rect {box} fill="#5d6b7b"/><rect {box} fill="url(#reduce)"/>'
        case Kind.WAIT:
            thin = f'x="{x:.2f}" y="{middle - 0.5:g}" width="{blocked:.2f}" height="1"'
            yield f'<rect {thin} fill="{GRAY}"/>' if blocked else ""
            under = f'x="{x + blocked:.2f}" y="{y + height * 0.32:g}" width="{width - blocked:.2f}"'
            yield f'<rect {under} height="{height * 0.36:g}" fill="{GRAY}"/>'
        case Kind.ISSUE:
            yield f'<rect {box} fill="{GRAY}" fill-opacity="0.6"/>'
        case Kind.STEP:
            yield f'<rect {box} fill="#3b4552"/>'
        case Kind.LOAD:
            yield f'<rect {box} fill="#c9a66b" fill-opacity="0.55"/>'
        case Kind.IDLE if item.what.cause is Cause.OTHER:
            yield f'<rect {box} fill="{GRAY}" fill-opacity="0.35"/>'
        case _:
            return


def _label(
    text: str, x: float, width: float, y: float, height: float, color: str, *, around: str = ""
) -> Iterator[str]:
    """A name where there is room; `around`: a color that keeps hatching away from its letters."""
    halo = f' stroke="{around}" stroke-width="3" paint-order="stroke"' if around else ""
    if height >= 12 and width > CHARACTER * len(text) + 8:
        yield (
            f'<text x="{x + width / 2:.1f}" y="{y + height / 2 + 3.6:g}" text-anchor="middle" font-size="10.5" '
            f'fill="{color}"{halo}>{escape(text)}</text>'
        )


# -- memory -------------------------------------------------------------------------------------------------------

MEMORY_HEIGHT, MEMORY_COLUMNS = 84.0, 400


def _memory(view: View, memory: MemoryModel, y: float, style: _Style) -> tuple[list[str], float]:
    """Highest and mean bytes over all devices; and where the next panel starts."""
    step = view.shown
    highest = [0.0] * MEMORY_COLUMNS
    mean = [0.0] * MEMORY_COLUMNS
    for device, row in enumerate(step.rows):
        levels = memory.levels(device, row)
        at = 0
        for column in range(MEMORY_COLUMNS):
            moment_s = step.step_s * column / (MEMORY_COLUMNS - 1)
            while at + 1 < len(levels) and levels[at + 1][0] <= moment_s:
                at += 1
            highest[column] = max(highest[column], levels[at][1])
            mean[column] += levels[at][1] / len(step.rows)
    top, bottom, peak = y + 26, y + 26 + MEMORY_HEIGHT, max(highest) or 1.0
    parts = [text_at(LEFT, y + 14, "Memory of a device as planned: highest, and mean in gray", weight="600")]
    for values, color in ((mean, GRAY), (highest, "#1f6fb8")):
        points = (
            f"{style.x(step.step_s * column / (MEMORY_COLUMNS - 1)):.1f} {bottom - value / peak * MEMORY_HEIGHT:.1f}"
            for column, value in enumerate(values)
        )
        parts.append(f'<path d="M{"L".join(points)}" fill="none" stroke="{color}" stroke-width="1.5"/>')
    for value, label_y in ((peak, top + 4), (0.0, bottom + 3)):
        parts.append(text_at(LEFT - 6, label_y, size(value) if value else "0", anchor="end", size=10))
    right = style.x(step.step_s)
    parts.append(f'<path d="M{LEFT} {bottom:g}H{right:.1f}" stroke="currentColor" stroke-opacity="0.3"/>')
    return parts, bottom + 14


# -- legend -------------------------------------------------------------------------------------------------------


def _legend(style: _Style, whats: Collection[What], y: float) -> tuple[list[str], float]:
    """Components by fill, tasks by outline, those kinds that are drawn by texture."""
    kinds = [("forward", Kind.FORWARD), ("backward", Kind.BACKWARD), ("reduction", Kind.REDUCE)]
    kinds += [("transfer", Kind.WAIT), ("optimizer", Kind.STEP), ("load", Kind.LOAD)]
    entries = [(name, f'fill="{fill}"', "") for name, fill in style.fill_by_component.items()]
    lists = [("components", entries)]
    if len(style.line_by_task) > 1:
        outlines = [(n, f'fill="none" stroke="{c}" stroke-width="2"', "") for n, c in style.line_by_task.items()]
        lists.append(("tasks", outlines))
    parts: list[str] = []
    for heading, listed in lists:
        drawn, y = _legend_row(heading, listed, y)
        parts += drawn
    patterns = {Kind.BACKWARD: "backward", Kind.REDUCE: "reduce"}
    found = {what.kind for what in whats}
    shown = [(name, _kind_swatch(kind), patterns.get(kind, "")) for name, kind in kinds if kind in found]
    if any(what.is_slowing for what in whats):
        shown.append(("lost to reductions beside backward", f'fill="{GRAY}"', "backward"))
    if shown:
        drawn, y = _legend_row("drawn as", shown, y)
        parts += drawn
    return parts, y


def _kind_swatch(kind: Kind) -> str:
    colors = {Kind.REDUCE: "#5d6b7b", Kind.WAIT: GRAY, Kind.STEP: "#3b4552", Kind.LOAD: "#e1cfae"}
    return f'fill="{colors.get(kind, "#7d9cc0")}"'


def _legend_row(heading: str, entries: Sequence[tuple[str, str, str]], y: float) -> tuple[list[str], float]:
    parts, x = [text_at(LEFT - 6, y + 10, heading, anchor="end", size=10, opacity=0.7)], LEFT
    for name, paint, pattern in entries:
        width = 18 + CHARACTER * len(name) + 14
        if x + width > WIDTH - RIGHT and x > LEFT:
            x, y = LEFT, y + 18
        height, top = (4, y + 4) if name == "transfer" else (10, y + 1)
        parts.append(f'<rect x="{x + 1:.1f}" y="{top:g}" width="12" height="{height}" {paint}/>')
        if pattern:
            parts.append(f'<rect x="{x + 1:.1f}" y="{top:g}" width="12" height="{height}" fill="url(#{pattern})"/>')
        parts.append(text_at(x + 18, y + 10, name))
        x += width
    return parts, y + 20


def text_at(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: float = 11,
    weight: str = "400",
    opacity: float = 1.0,
) -> str:
    """A text of `size` pixels whose baseline is at y, escaped."""
    extra = "" if anchor == "start" else f' text-anchor="{anchor}"'
    extra += "" if size == 11 else f' font-size="{size:g}"'
    extra += "" if weight == "400" else f' font-weight="{weight}"'
    extra += "" if opacity == 1.0 else f' fill-opacity="{opacity:g}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="currentColor"{extra}>{escape(text)}</text>'
