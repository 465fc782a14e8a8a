"""Timeline: a plan, its prediction and the trace of a run in; a page, a picture or a Chrome trace out.

    page = render_page(plan, predicted=simulate(plan), measured=trace, title="clip on 8 devices")

Data flows table -> index -> rows (items) -> accounts, waves, memory -> data -> page, figures, and rows -> svg -> png,
and rows -> chrome.
"""

from typing import Any

from spindle.errors import InputError
from spindle.timeline.chrome import chrome_trace
from spindle.timeline.items import View
from spindle.timeline.memory import memory_model
from spindle.timeline.page.data import page_data
from spindle.timeline.page.figures import figures
from spindle.timeline.page.html import page
from spindle.timeline.png import to_png
from spindle.timeline.rows import plan_view, trace_view
from spindle.timeline.svg import FONT, draw_svg
from spindle.timeline.table import SliceTable, make_table
from spindle.values.plan import Plan
from spindle.values.trace import Trace

__all__ = ["chrome_trace", "render_page", "render_png", "render_svg", "timeline_figures"]

THRESHOLD = 0.2


def render_page(
    plan: Plan,
    *,
    predicted: Trace | None = None,
    measured: Trace | None = None,
    title: str = "",
    threshold: float = THRESHOLD,
) -> str:
    """One HTML page that needs no network: planned and measured waves on one time axis, a row for each device.

    Without traces it shows the plan's own slices. Waves that miss their prediction by more than `threshold` (0.2: 20 %)
    are marked. Raises InputError for a trace without spans or of another number of devices.
    """
    table, views = _views(plan, predicted, measured)
    _check_threshold(threshold)
    memory = memory_model(plan)
    data = page_data(plan, table, views, memory, threshold=threshold)
    picture = draw_svg(plan, views, title="", threshold=threshold, standalone=False, memory=memory)
    return page(plan, views, data, picture=picture, title=title)


def render_svg(
    plan: Plan,
    *,
    predicted: Trace | None = None,
    measured: Trace | None = None,
    title: str = "",
    threshold: float = THRESHOLD,
) -> str:
    """A static picture of the same as SVG text, for papers. Errors as `render_page`."""
    _, views = _views(plan, predicted, measured)
    _check_threshold(threshold)
    return draw_svg(plan, views, title=title, threshold=threshold, standalone=True)


def render_png(
    plan: Plan,
    *,
    predicted: Trace | None = None,
    measured: Trace | None = None,
    title: str = "",
    threshold: float = THRESHOLD,
) -> bytes:
    """The same picture as a PNG file of 2240 points' width. Raises InputError without resvg_py too (extra `png`)."""
    svg = render_svg(plan, predicted=predicted, measured=measured, title=title, threshold=threshold)
    return to_png(svg, font=FONT)


def timeline_figures(
    plan: Plan, *, predicted: Trace | None = None, measured: Trace | None = None, threshold: float = THRESHOLD
) -> dict[str, Any]:
    """The numbers of the page, for JSON: time by device and cause, memory, waves. Errors as `render_page`."""
    _, views = _views(plan, predicted, measured)
    _check_threshold(threshold)
    return figures(plan, views, memory_model(plan), threshold=threshold)


def _views(plan: Plan, predicted: Trace | None, measured: Trace | None) -> tuple[SliceTable, list[View]]:
    for name, trace in (("predicted", predicted), ("measured", measured)):
        if trace is not None and trace.num_ranks != plan.num_devices:
            raise InputError(
                f"the {name} trace has {trace.num_ranks} ranks but the plan {plan.num_devices} devices; "
                "show a plan with a trace of its own run"
            )
    table = make_table(plan, predicted)
    views = []
    if predicted is not None:
        views.append(trace_view(predicted, table, measured=False))
    if measured is not None:
        views.append(trace_view(measured, table, measured=True))
    return table, views or [plan_view(plan, table)]


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold < float("inf"):
        raise InputError(f"threshold is {threshold!r}; give the share that a wave may miss, for instance 0.2")
