"""Summary: a plan and its views in, the top of the page and the table of baselines out, as HTML."""

from collections.abc import Sequence
from html import escape

from spindle.timeline.accounts import Accounts, idle_share, total
from spindle.timeline.items import CAUSE_TITLES, Cause, View
from spindle.timeline.words import count, percent, seconds, size
from spindle.values.plan import Plan
from spindle.values.turns import turns_in_words

MOST_DEVICES = 16  # rows of the table of memory
LEAST_GAIN = 1e-3  # below this share of the best baseline, waves are said to gain nothing
BASELINE_TITLES = {
    "sequential": "all devices, one MetaOp after another",
    "task_split": "devices split by task",
    "component_split": "tasks in turn, split by component",
    "paper": "the paper's planner",
}


def subtitle(plan: Plan) -> str:
    """What was planned on what, in one line."""
    nodes = -(-plan.num_devices // plan.devices_per_node)
    device = f" {plan.cluster.device.name}" if plan.cluster else ""
    where = f"{count(plan.num_devices, 'device')} ({count(nodes, 'node')} of {plan.devices_per_node}{device})"
    metaops = {s.metaop for s in plan.slices}
    tasks = {plan.metagraph[name].task for name in metaops} if plan.metagraph else set()
    what = f"{count(len(metaops), 'MetaOp')}" + (f" of {count(len(tasks), 'task')}" if tasks else "")
    parts = [
        f"{plan.method} plan",
        where,
        what,
        f"{count(len(plan.waves), 'wave')}, {count(len(plan.slices), 'slice')}",
    ]
    if plan.planner_s:
        parts.append(f"planned in {seconds(plan.planner_s)}")
    return "<p>" + escape(" \u00b7 ".join(parts)) + "</p>"


def tiles(plan: Plan, views: Sequence[View]) -> str:
    """The numbers that matter."""
    by_source = {view.source: view for view in views}
    shown = [_step(plan, by_source), _makespan(plan), _gain(plan), _idle(plan, views), _memory(plan, views)]
    cells = (
        f'<div class="tile"><dt>{name}</dt><dd class="value">{escape(value)}</dd><dd class="note">{note}</dd></div>'
        for name, value, note in filter(None, shown)
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


Tile = tuple[str, str, str]
"""Name, value, note (HTML)."""


def _step(plan: Plan, views: dict[str, View]) -> Tile | None:
    predicted = views.get("predicted")
    predicted_s = plan.fixed_s + predicted.shown.step_s if predicted else plan.step_s
    measured = views.get("measured")
    if measured is None:
        if not predicted_s:
            return None
        return "Step, predicted", seconds(predicted_s), f"{seconds(plan.reduction_s)} of it gradient reduction"
    lengths = [step.step_s for step in measured.steps]
    notes = []
    if predicted_s:
        miss = measured.shown.step_s / predicted_s - 1
        notes.append(f"predicted {seconds(predicted_s)} ({percent(miss, sign=True)})")
    if len(lengths) > 1:
        notes.append(f"median of {len(lengths)}: {seconds(min(lengths))} to {seconds(max(lengths))}")
    if measured.total_s < 0.99 * sum(lengths) and len(lengths) == measured.num_steps:
        each = seconds(measured.total_s / len(lengths))
        notes.append(f"{count(len(lengths), 'step')} in {seconds(measured.total_s)}: {each} each, as steps overlap")
    return "Step, measured", seconds(measured.shown.step_s), "<br>".join(map(escape, notes))


def _makespan(plan: Plan) -> Tile:
    if not plan.lower_bound_s:
        return "Makespan, planned", seconds(plan.makespan_s), "no bound is known"
    note = f"at most {percent(plan.gap)} above the best possible: bound {seconds(plan.lower_bound_s)}"
    return "Makespan, planned", seconds(plan.makespan_s), escape(note)


def _gain(plan: Plan) -> Tile | None:
    usual = plan.usual_ways
    best = min(((value, name) for name, value in usual if name != "paper"), default=None)
    if best is None:
        return None
    own_s = plan.compared_s
    share = 1 - own_s / best[0]
    way = escape(f"the best baseline, {best[1].replace('_', ' ')} ({seconds(best[0])})")
    if abs(share) < LEAST_GAIN:
        return "Gain", "none", f"as fast as {way}"
    if share < 0:
        return "Loss", f"{percent(-share)} longer", f"steps than with {way}"
    return "Gain", f"{percent(share)} shorter", f"steps than with {way}"


def _idle(plan: Plan, views: Sequence[View]) -> Tile:
    last = views[-1]
    share = idle_share(total(last.shown))
    note = "of device time in the measured step" if last.source == "measured" else "of device time"
    if last.source == "measured" and len(views) > 1:
        note += f"; predicted {percent(idle_share(total(views[0].shown)))}"
    return "Idle", percent(share), escape(note)


def _memory(plan: Plan, views: Sequence[View]) -> Tile | None:
    peaks = plan.memory.peak_bytes_per_device
    if not peaks or not max(peaks):
        return None
    worst = _fullest(peaks)
    room = f"of {size(plan.cluster.device.memory_bytes)} " if plan.cluster else ""
    fits = "" if plan.memory.fits else '<strong class="slow">does not fit</strong>; '
    note = f"{fits}{escape(f'{room}on device {worst}')}"
    for view in views:
        if view.source == "measured":
            note += f"<br>{_measured_peak(view.peak_bytes)}"
    return "Memory, planned peak", size(peaks[worst]), note


def _measured_peak(peaks: Sequence[int]) -> str:
    if not peaks:
        return "not measured by this run; only runs on GPUs measure it"
    worst = _fullest(peaks)
    return f"measured {size(peaks[worst])} on device {worst}"


def _fullest(peaks: Sequence[float]) -> int:
    return max(range(len(peaks)), key=peaks.__getitem__)


def memory_table(plan: Plan, views: Sequence[View]) -> str:
    """Planned and measured peak of each device as a card, the fullest ones of many; nothing where none was measured."""
    measured = next((view.peak_bytes for view in views if view.peak_bytes), ())
    if not measured:
        return ""
    planned = plan.memory.peak_bytes_per_device
    ranked = sorted(range(len(measured)), key=lambda device: (-measured[device], device))
    rows = "".join(_memory_row(d, planned[d] if planned else 0, measured[d]) for d in sorted(ranked[:MOST_DEVICES]))
    more = len(measured) > MOST_DEVICES
    which = f" The {MOST_DEVICES} devices of {len(measured)} that held most are listed." if more else ""
    note = f"The most that a device had allocated at once, from the beginning of the run.{which}"
    head = "".join(f'<th class="number">{title}</th>' for title in ("planned", "measured", "off by"))
    return (
        '<section class="card"><h2>Peak memory</h2>'
        f'<p class="quiet">{note}</p>'
        f"<table><thead><tr><th>device</th>{head}</tr></thead><tbody>{rows}</tbody></table></section>"
    )


def _memory_row(device: int, planned: float, measured: float) -> str:
    miss = percent(measured / planned - 1, sign=True) if planned else ""
    cells = (size(planned) if planned else "not known", size(measured), miss)
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    return f"<tr><td>{device}</td>{numbers}</tr>"


def verdict(plan: Plan) -> str:
    """A sentence when waves do not help."""
    usual = [(value, name) for name, value in plan.usual_ways if name != "paper"]
    own_s = plan.compared_s
    if usual and own_s > min(usual)[0] * (1 + LEAST_GAIN):
        remedy = ": consider that instead." if plan.alternatives else "; method auto never is."
        text = f"This plan is slower than {min(usual)[1]}{remedy}"
        return f'<p class="verdict bad">{escape(text)}</p>'
    if usual and own_s >= min(usual)[0] * (1 - LEAST_GAIN):
        return f'<p class="verdict">{escape(f"Waves gain nothing here: {min(usual)[1]} is as fast.")}</p>'
    return ""


def turns(plan: Plan) -> str:
    """A sentence where tasks run in turns."""
    return f'<p class="verdict">{escape(turns_in_words(plan.turns))}</p>' if plan.turns else ""


def accounts(views: Sequence[View]) -> str:
    """Mean seconds of a device by cause, in the step of each view that is shown first."""
    totals = [total(view.shown) for view in views]
    head = "".join(f'<th class="number">{view.source}, {seconds(view.shown.step_s)}</th>' for view in views)
    body = ""
    for cause in Cause:
        if any(cause in found for found in totals):
            cells = "".join(_share(found, cause, view) for found, view in zip(totals, views, strict=True))
            body += f"<tr><td>{CAUSE_TITLES[cause]}</td>{cells}</tr>"
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _share(found: Accounts, cause: Cause, view: View) -> str:
    part_s, whole_s = found.get(cause, 0.0), sum(found.values())
    share = percent(part_s / whole_s if whole_s else 0.0)
    return f'<td class="number">{seconds(part_s / len(view.shown.rows))} ({share})</td>'


def baselines(plan: Plan) -> str:
    """The baselines as a card with bars; nothing when the plan carries none."""
    usual = plan.usual_ways
    if not usual:
        return ""
    own_s = plan.compared_s
    longest_s = max(own_s, *(value for _, value in usual))
    choices = {other.name: f" ({other.choice})" for other in plan.alternatives if other.choice}
    titles = {name: BASELINE_TITLES.get(name, name) + choices.get(name, "") for name, _ in usual}
    rows = sorted([(value, titles[name], "") for name, value in usual], reverse=True)
    rows.append((own_s, "this plan", "own"))
    body = "".join(_baseline_row(value, name, style, own_s, longest_s) for value, name, style in rows)
    what = plan.compared
    missing = [BASELINE_TITLES[name] for name in BASELINE_TITLES if name not in dict(usual)]
    if plan.alternatives:
        missing = [other.name for other in plan.alternatives if not other.fits]
    note = f'<p class="quiet">Does not fit in memory: {escape("; ".join(missing))}.</p>' if missing else ""
    head = f'<tr><th></th><th></th><th class="number">{what}</th><th class="number">this plan is</th></tr>'
    return (
        '<section class="card"><h2>What would be used instead, in the same cost model</h2>'
        f"<table><thead>{head}</thead><tbody>{body}</tbody></table>{note}</section>"
    )


def _baseline_row(value_s: float, name: str, style: str, own_s: float, longest_s: float) -> str:
    share = own_s / value_s - 1
    gain = f"{percent(abs(share))} {'longer' if share > 0 else 'shorter'}" if abs(share) >= LEAST_GAIN else "as long"
    gain = "" if style else gain
    width = 110 * value_s / longest_s
    inside = f'<rect width="{width:.1f}" height="8" rx="1.5"/>'
    bar = f'<svg class="bar" width="110" height="8" aria-hidden="true">{inside}</svg>'
    return (
        f'<tr class="{style}"><td>{escape(name)}</td><td>{bar}</td><td class="number">{seconds(value_s)}</td>'
        f'<td class="number">{gain}</td></tr>'
    )
