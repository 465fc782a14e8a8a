"""Legend: views in, the names of components and tasks with their colors, and how kinds are drawn, out as HTML."""

from collections.abc import Iterator, Sequence
from html import escape

from spindle.timeline.colors import fills, lines
from spindle.timeline.items import Cause, Kind, View
from spindle.timeline.page.data import component_names, task_names

_BLUE = "#7d9cc0"


def legend(views: Sequence[View]) -> str:
    """Three rows: components by fill, tasks by outline, kinds by how they are drawn."""
    components, tasks = component_names(views), task_names(views)
    rows = []
    if components:
        rows.append(("components", _entries("component", components, map(_fill, fills(len(components))))))
    if tasks:
        pairs = zip(lines(len(tasks), dark=False), lines(len(tasks), dark=True), strict=True)
        rows.append(("tasks", _entries("task", tasks, (_line(light, dark) for light, dark in pairs))))
    rows.append(("drawn as", "".join(_kinds(views))))
    return f'<dl class="legend">{"".join(f"<dt>{name}</dt><dd>{entries}</dd>" for name, entries in rows)}</dl>'


def _entries(field: str, names: Sequence[str], swatches: Iterator[str]) -> str:
    return "".join(
        f'<span class="entry" data-field="{field}" data-index="{index}"><span>{swatch}</span>{escape(name)}</span>'
        for index, (name, swatch) in enumerate(zip(names, swatches, strict=True))
    )


def _svg(inside: str, width: int = 14) -> str:
    return f'<svg width="{width}" height="14" aria-hidden="true">{inside}</svg>'


def _fill(color: str) -> str:
    return _svg(f'<rect y="1" width="14" height="12" fill="{color}"/>')


def _line(light: str, dark: str) -> str:
    box = '<rect class="on-{0}" x="1.5" y="2.5" width="11" height="9" fill="none" stroke="{1}" stroke-width="2.4"/>'
    return _svg(box.format("light", light) + box.format("dark", dark))


def _kinds(views: Sequence[View]) -> Iterator[str]:
    """Only what the views hold."""
    found = {item.what.kind for view in views for row in view.shown.rows for item in row}
    stripes = "".join(f'<path d="M{x} 13L{x + 12} 1" class="paint-card" stroke-width="1.6"/>' for x in (-6, 0, 6, 12))
    bars = "".join(f'<path d="M{x}.5 1V13" class="paint-card" stroke-opacity="0.45"/>' for x in (2, 6, 10, 14))
    solid = '<rect y="1" width="14" height="12" class="paint-{0}"/>'
    thin = '<rect y="6.25" width="9" height="1.5" class="paint-wait"/>'
    wait = thin + '<rect x="9" y="5" width="9" height="4" class="paint-wait"/>'
    thick = '<rect y="5" width="14" height="4" class="paint-wait"/>'
    low = max(len(view.shown.rows) for view in views) > 40
    blocked = any(item.blocked_s for view in views for row in view.shown.rows for item in row)
    shown = [
        (Kind.FORWARD, "forward", _fill(_BLUE)),
        (
            Kind.BACKWARD,
            "backward (pale where rows are low)" if low else "backward",
            _svg(f'<rect y="1" width="14" height="12" fill="{_BLUE}"/>{stripes}'),
        ),
        (Kind.WORK, "forward and backward", _fill(_BLUE)),
        (Kind.WAIT, "waiting: not made yet, then under way", _svg(wait, 18))
        if blocked
        else (Kind.WAIT, "transfer", _svg(thick)),
        (Kind.ISSUE, "starting transfers and reductions", _svg(solid.format("issue"))),
        (Kind.REDUCE, "gradient reduction", _svg(solid.format("reduce") + bars)),
        (Kind.STEP, "optimizer step", _svg(solid.format("step"))),
        (Kind.LOAD, "loading a batch", _svg(solid.format("load"))),
    ]
    for kind, name, swatch in shown:
        if kind in found:
            yield f'<span class="entry">{swatch}{name}</span>'
    if any(item.what.is_slowing for view in views for row in view.shown.rows for item in row):
        yield f'<span class="entry">{_svg(solid.format("issue") + stripes)}backward lost to reductions beside it</span>'
    if any(item.what.cause is Cause.OTHER for view in views for row in view.shown.rows for item in row):
        yield f'<span class="entry">{_svg(solid.format("other"))}at the step before or after</span>'
    if any(view.source == "measured" for view in views):
        late = '<rect y="10" width="14" height="3" class="paint-slow"/>'
        box = f'<rect y="1" width="14" height="12" fill="{_BLUE}"/>'
        yield f'<span class="entry">{_svg(box + late)}slower than planned</span>'
