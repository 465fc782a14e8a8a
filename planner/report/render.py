"""Render: a plan in, text for people out, at most 100 columns wide.

- Gantt: one row for devices that do the same, time to the right, a letter for each MetaOp (or component, or task, when
  there are many), `.` where a device idles. A cell shows what runs in the middle of its span of time.
- Seconds have three significant digits.
- When waves gain nothing over the best alternative, the summary says so.
"""

from collections.abc import Callable, Iterable, Sequence
from math import floor, log10
from string import ascii_lowercase, ascii_uppercase, digits
from textwrap import wrap

from spindle.metagraph import MetaGraph
from spindle.plan import Alternative, Plan, Slice
from spindle.planner.report.likely import outlook_lines
from spindle.planner.report.rates import rates
from spindle.turns import turns_in_words

WIDTH = 100
MAX_ROWS = 40
LEAST_GAIN = 1e-3  # below this share of the best alternative's step, waves are said to gain nothing
MOST_SETS = 8  # sets of tasks that are printed
SYMBOLS = ascii_uppercase + ascii_lowercase + digits
BASELINE_TITLES = {
    "sequential": "all devices, one after another",
    "task_split": "devices split by task",
    "component_split": "tasks in turn, split by component",
    "paper": "the paper's planner",
}
PAPER_TITLE = "the paper's planner (Spindle)"
NAME_WIDTH = 35


def render(plan: Plan, *, width: int = WIDTH, names: tuple[str, str] = ("SOURCE", "C")) -> str:
    """Gantt, legend and summary; `names`: of the source and the cluster as a command line gives them."""
    return f"{gantt(plan, width=width)}\n\n{summary(plan, names=names)}"


def gantt(plan: Plan, *, width: int = WIDTH) -> str:
    """The plan as rows of devices over time, with a scale and a legend."""
    groups = _device_groups(plan)
    label = max(len(_range(group)) for group in groups) + len("device ")
    columns = width - label - 3
    symbol_of, legend = _symbols(plan)
    lines = [f"{'':{label}}  {_scale(plan.makespan_s, columns)}"]
    drawn: set[str] = set()
    for group in groups:
        slices = [s for s in plan.slices if group[0] in s.devices]
        bar = _bar(plan, slices, columns, symbol_of)
        drawn.update(bar)
        lines.append(f"{'device ' + _range(group):{label}} |{bar}|")
    seen = [entry for entry in legend if entry.startswith("...") or entry[0] in drawn]
    if len(seen) < len(legend):
        seen.append(f"... {len(legend) - len(seen)} more, too short for a cell")
    return "\n".join([*lines, *_wrapped(seen, width)])


def table(plan: Plan) -> str:
    """One row for each slice, wave by wave."""
    names = max(len("MetaOp"), *(len(s.metaop) for s in plan.slices))
    names = min(names, 44)
    rows = [f"{'wave':>5} {'start s':>10} {'end s':>10}  {'MetaOp':{names}} {'layers':>9} {'n':>4}  devices"]
    for wave in plan.waves:
        for s in wave.slices:
            layers = f"{s.first_layer}..{s.last_layer}" if s.num_layers > 1 else str(s.first_layer)
            row = (
                f"{wave.index:>5} {s.start_s:>10.6f} {s.end_s:>10.6f}  {_clip(s.metaop, names):{names}} {layers:>9} "
                f"{len(s.devices):>4}  {_ranges(s.devices)}"
            )
            rows.append(_clip(row, WIDTH))
    return "\n".join(rows)


def summary(plan: Plan, *, names: tuple[str, str] = ("SOURCE", "C")) -> str:
    """Makespan, bound, gap, idle share, memory, the gain over each baseline, and how sure all that is."""
    nodes = -(-plan.num_devices // plan.devices_per_node)
    num_slices = len(plan.slices)
    num_metaops = len({s.metaop for s in plan.slices})
    lines = [
        f"plan       {plan.method} on {plan.num_devices} devices ({nodes} x {plan.devices_per_node}): "
        f"{num_metaops} MetaOps, {len(plan.waves)} waves, {num_slices} slices, planned in {plan.planner_s:.2f} s",
        f"makespan   {seconds(plan.makespan_s)}, idle {100 * plan.idle_fraction:.1f} % of device time",
    ]
    if plan.lower_bound_s:
        lines.append(f"bound      {seconds(plan.lower_bound_s)} for any schedule: gap {100 * plan.gap:.2f} %")
    if plan.step_s:
        both_s = plan.step_s - plan.reduction_s - plan.update_s - plan.fixed_s
        update = f", optimizer {seconds(plan.update_s)}" if plan.update_s else ""
        fixed = f",\n{'':11}fixed part by calibration {seconds(plan.fixed_s)}" if plan.fixed_s else ""
        lines.append(
            f"step       {seconds(plan.step_s)}: forward and backward {seconds(both_s)}, "
            f"gradient reduction {seconds(plan.reduction_s)}{update}{fixed}"
        )
    lines += _rates(plan)
    lines += _spread(plan)
    lines += _task_sets(plan)
    lines += _turns(plan)
    lines += _tensor_parallel(plan)
    lines += _memory(plan)
    lines += _baselines(plan)
    lines += outlook_lines(plan, *names)
    return "\n".join(lines)


def seconds(value_s: float) -> str:
    """Three significant digits.

    >>> seconds(0.41234), seconds(12.0), seconds(1234.5), seconds(0.0)
    ('0.412 s', '12.0 s', '1234 s', '0 s')
    """
    return f"{three_digits(value_s)} s"


def three_digits(value: float) -> str:
    """Three significant digits, or all before the point."""
    if not value:
        return "0"
    return f"{value:.{max(0, 2 - floor(log10(abs(value))))}f}"


def _rates(plan: Plan) -> list[str]:
    """What a step does a second."""
    found = rates(plan)
    if found is None:
        return []
    mfu = f"MFU {100 * found.mfu:.1f} %, " if found.mfu else ""
    return [f"rate       {mfu}{_counted(found.samples_per_s)} samples/s, {_counted(found.tokens_per_s)} tokens/s"]


def _counted(value: float) -> str:
    """Three significant digits, with thousands and millions in letters."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= size:
            return f"{three_digits(value / (1e3 if size == 1e4 else size))}{letter}"
    return three_digits(value)


def _spread(plan: Plan) -> list[str]:
    """Where batches differ: how long steps take."""
    found = plan.spread
    if found is None:
        return []
    return [
        f"batches    differ in size: over {found.steps} steps a step takes {seconds(found.mean_s)} on average, "
        f"{seconds(found.p10_s)}\n{'':11}(P10) to {seconds(found.p90_s)} (P90); planned for the mean, memory for the "
        "largest"
    ]


def _task_sets(plan: Plan) -> list[str]:
    """Where tasks are absent from some steps: the expected step, and the most frequent sets."""
    found = plan.task_sets
    if not found:
        return []
    mean_s = sum(each.share * each.step_s for each in found)
    what = f"{seconds(mean_s)} a step: tasks take part in some steps only. The plan is of a step with all; other steps "
    what += "leave slices out."
    if all(each.sequential_s for each in found if each.tasks):
        usual_s = sum(each.share * each.sequential_s for each in found)
        what += f" Sequential {seconds(usual_s)}"
        what += f": {_gain(usual_s, mean_s).strip()}" if plan.method != "sequential" else ", which is this plan"
    lines = wrap(what, WIDTH, initial_indent="expected   ", subsequent_indent=" " * 11)
    for each in found[:MOST_SETS]:
        tasks = ", ".join(each.tasks) or "no task"
        lines.append(_clip(f"  {100 * each.share:>5.1f} % of steps {seconds(each.step_s):>9}  {tasks}", WIDTH))
    rest = found[MOST_SETS:]
    if rest:
        share, rest_s = sum(each.share for each in rest), sum(each.share * each.step_s for each in rest)
        lines.append(
            f"  {100 * share:>5.1f} % of steps {seconds(rest_s / share):>9}  on average, {len(rest)} more sets"
        )
    return lines


def _turns(plan: Plan) -> list[str]:
    """Where tasks run in turns: which do together."""
    if not plan.turns:
        return []
    words = turns_in_words(plan.turns)
    return wrap(words, WIDTH, initial_indent="turns      ", subsequent_indent=" " * 11, break_on_hyphens=False)


def _tensor_parallel(plan: Plan) -> list[str]:
    """MetaOps whose layers are spread over several devices, and over how many."""
    degrees: dict[str, set[int]] = {}
    for s in plan.slices if plan.metagraph else ():
        degree = plan.metagraph[s.metaop].degree_on(len(s.devices)) if plan.metagraph else 1
        degrees.setdefault(s.metaop, set()).add(degree)
    spread = [f"{name} {' or '.join(map(str, sorted(found)))}" for name, found in degrees.items() if max(found) > 1]
    if not spread:
        return []
    what = f"devices that share each layer: {', '.join(spread)}"
    return wrap(what, WIDTH, initial_indent="tensor     ", subsequent_indent=" " * 11, break_on_hyphens=False)


def _memory(plan: Plan) -> list[str]:
    peaks = plan.memory.peak_bytes_per_device
    if not peaks or not max(peaks):
        return []
    worst = max(range(len(peaks)), key=peaks.__getitem__)
    verdict = "fits" if plan.memory.fits else "DOES NOT FIT"
    room = f" of {_size(plan.cluster.device.memory_bytes)}" if plan.cluster else ""
    average = sum(peaks) / len(peaks)
    return [f"memory     {verdict}: at most {_size(peaks[worst])}{room} (device {worst}), {_size(average)} on average"]


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 0.1 * 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _baselines(plan: Plan) -> list[str]:
    """What people would use instead, with its memory choice; where that was not costed, the other methods."""
    if plan.alternatives and plan.compared != "makespan":
        return [*_alternatives(plan), *_verdict(plan)]
    if not plan.baselines_s:
        return []
    ways, own_s = plan.usual_ways, plan.compared_s
    what = {"mean step": "    mean steps of other methods", "step": "    whole steps of other methods", "makespan": ""}
    lines = [f"against{what[plan.compared]}"]
    for name, value_s in sorted(ways, key=lambda pair: -pair[1]):
        lines.append(f"  {name:<16} {seconds(value_s):>10}  {_gain(value_s, own_s)}  {_title(name)}".rstrip())
    lines += _verdict(plan)
    missing = [name for name in BASELINE_TITLES if name not in dict(plan.baselines_s)]
    if missing:
        lines.append(f"  does not fit in memory: {', '.join(missing)}")
    return lines


def _alternatives(plan: Plan) -> list[str]:
    what = "mean" if plan.compared == "mean step" else "whole"
    lines = [f"instead    {what} steps, each with the memory choice that is fastest for it"]
    by_name = {other.name: other for other in plan.alternatives}
    for name, value_s in sorted(plan.usual_ways, key=lambda pair: -pair[1]):
        other = by_name.get(name)
        title, choice = (PAPER_TITLE, "as this plan") if other is None else (name, other.choice)
        gain = _gain(value_s, plan.compared_s)
        lines.append(f"  {title:<{NAME_WIDTH}} {seconds(value_s):>9}  {gain}  {choice}".rstrip())
    lines += [f"  {other.name:<{NAME_WIDTH}} {_no_fit(other, plan)}" for other in plan.alternatives if not other.fits]
    if plan.baselines_s and "paper" not in dict(plan.baselines_s):
        lines.append(f"  {PAPER_TITLE:<{NAME_WIDTH}} does not fit in memory")
    return [_clip(line, WIDTH) for line in lines]


def _no_fit(other: Alternative, plan: Plan) -> str:
    if not other.peak_bytes or plan.cluster is None:
        return "does not fit in memory"
    how = f", {other.choice}" if other.choice else ""
    return f"does not fit: {_size(other.peak_bytes)} of {_size(plan.cluster.device.memory_bytes)}{how}"


def _verdict(plan: Plan) -> list[str]:
    """When waves do not help."""
    usual = [(value_s, name) for name, value_s in plan.usual_ways if name != "paper"]
    if not usual:
        return []
    (best_s, name), own_s = min(usual), plan.compared_s
    if own_s > best_s * (1 + LEAST_GAIN):
        remedy = ": consider that instead" if plan.alternatives else "; method auto never is"
        return [f"this plan is {100 * (own_s / best_s - 1):.1f} % slower than {name}{remedy}"]
    return [f"waves gain nothing here: {name} is as fast"] if own_s >= best_s * (1 - LEAST_GAIN) else []


def _gain(other_s: float, own_s: float) -> str:
    return (
        f"{100 * (1 - own_s / other_s):>5.1f} % shorter"
        if own_s <= other_s
        else f"{100 * (own_s / other_s - 1):>5.1f} % longer "
    )


def _title(name: str) -> str:
    return BASELINE_TITLES.get(name, "")


# ------------------------------------------------------------------------------------------------- pieces of Gantt


def _device_groups(plan: Plan) -> list[list[int]]:
    """Neighboring devices that run the same slices; neighbors are joined further when there are too many rows."""
    runs: list[list[Slice]] = [[] for _ in range(plan.num_devices)]
    for s in plan.slices:
        for device in s.devices:
            runs[device].append(s)
    groups: list[list[int]] = []
    for device in range(plan.num_devices):
        if groups and runs[groups[-1][0]] == runs[device]:
            groups[-1].append(device)
        else:
            groups.append([device])
    if len(groups) > MAX_ROWS:
        size = -(-plan.num_devices // MAX_ROWS)
        groups = [list(range(i, min(i + size, plan.num_devices))) for i in range(0, plan.num_devices, size)]
    return groups


def _symbols(plan: Plan) -> tuple[Callable[[Slice], str], list[str]]:
    """A letter for each slice, and the legend: by MetaOp while 26 letters do, else by component, else by task."""
    metagraph = plan.metagraph
    for key in (_by_metaop, _by_component, _by_task):
        names = list(dict.fromkeys(key(s, metagraph) for s in plan.slices))
        if len(names) <= (26 if key is _by_metaop else len(SYMBOLS)):
            break
    symbols = {name: SYMBOLS[i % len(SYMBOLS)] for i, name in enumerate(names)}
    shown = names[: len(SYMBOLS)]
    legend = [f"{symbols[name]} {name}" for name in shown]
    if len(names) > len(shown):
        legend.append(f"... and {len(names) - len(shown)} more, letters repeat")
    chosen = key
    return (lambda s: symbols[chosen(s, metagraph)]), legend


def _by_metaop(s: Slice, metagraph: MetaGraph | None) -> str:
    return s.metaop


def _by_component(s: Slice, metagraph: MetaGraph | None) -> str:
    return metagraph[s.metaop].component if metagraph else s.metaop.rpartition(".")[2]


def _by_task(s: Slice, metagraph: MetaGraph | None) -> str:
    return metagraph[s.metaop].task if metagraph else s.metaop.partition(".")[0]


def _bar(plan: Plan, slices: Sequence[Slice], columns: int, symbol_of: Callable[[Slice], str]) -> str:
    """A cell for each of `columns` equal spans of time: the slice that runs in its middle, `|` where one begins."""
    cells = ["."] * columns
    per_cell_s = (plan.makespan_s or 1.0) / columns  # a plan that was edited may say anything
    for s in slices:
        first = min(columns - 1, max(0, round(s.start_s / per_cell_s)))
        last = min(columns, max(first + 1, round(s.end_s / per_cell_s)))
        cells[first:last] = symbol_of(s) * (last - first)
        if last - first > 2 and first > 0:
            cells[first] = "|"
    return "".join(cells)


def _scale(makespan_s: float, columns: int) -> str:
    """0, the middle and the end of time over the bars."""
    unit, factor = ("s", 1.0) if makespan_s >= 1 else ("ms", 1e3)
    middle, end = f"{makespan_s * factor / 2:.4g}", f"{makespan_s * factor:.4g} {unit}"
    return f"0{middle:>{columns // 2}}{end:>{columns - columns // 2 - 1}}"


def _wrapped(words: Iterable[str], width: int) -> list[str]:
    lines = [""]
    for word in words:
        word = _clip(word, width - 2)
        if len(lines[-1]) + len(word) + 2 > width:
            lines.append("")
        lines[-1] += ("   " if lines[-1] else " ") + word
    return [line for line in lines if line]


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _range(devices: Sequence[int]) -> str:
    return f"{devices[0]}-{devices[-1]}" if len(devices) > 1 else str(devices[0])


def _ranges(devices: Sequence[int]) -> str:
    """Devices as runs of neighbors: 0-3,8."""
    runs: list[list[int]] = []
    for device in sorted(devices):
        if runs and runs[-1][-1] + 1 == device:
            runs[-1].append(device)
        else:
            runs.append([device])
    return ",".join(_range(run) for run in runs)
