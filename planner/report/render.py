"""Render: a plan in, text for people out, at most 100 columns wide.

- Gantt: one row for devices that do the same, time to the right, a letter for each MetaOp (or component, or task, when
  there are many), `.` where a device idles. A cell shows what runs in the middle of its span of time.
- Seconds have three significant digits.
- When waves gain nothing over the best alternative, the summary says so.
"""

from collections.abc import Callable, Iterable, Sequence
from string import ascii_lowercase, ascii_uppercase, digits

from spindle.planner.report.figures import WIDTH, clip, counted, seconds, size, titled
from spindle.planner.report.instead import gain_text, instead_lines
from spindle.planner.report.likely import gain_lines, likely_lines
from spindle.planner.report.rates import rates
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Plan, Slice
from spindle.values.turns import turns_in_words

MAX_ROWS = 40
MOST_SETS = 8  # sets of tasks that are printed
SYMBOLS = ascii_uppercase + ascii_lowercase + digits


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
                f"{wave.index:>5} {s.start_s:>10.6f} {s.end_s:>10.6f}  {clip(s.metaop, names):{names}} {layers:>9} "
                f"{len(s.devices):>4}  {_ranges(s.devices)}"
            )
            rows.append(clip(row, WIDTH))
    return "\n".join(rows)


def summary(plan: Plan, *, names: tuple[str, str] = ("SOURCE", "C")) -> str:
    """What one asks before buying devices: how long a step takes, how fast that is, whether it fits and how, what else
    would do, how sure that is, and how far from the best.
    """
    lines = [*_head(plan), *_step(plan), *_rates(plan), *_spread(plan), *likely_lines(plan), *_task_sets(plan)]
    lines += [*_turns(plan), *_tensor_parallel(plan), *_memory(plan), *_choices(plan)]
    lines += [*instead_lines(plan), *gain_lines(plan, *names), *_makespan(plan)]
    return "\n".join(lines)


def _head(plan: Plan) -> list[str]:
    """What was planned for what."""
    devices = f"{plan.num_devices} x {plan.cluster.device.name}" if plan.cluster else f"{plan.num_devices} devices"
    what = f"{clip(plan.workload, 40)} on " if plan.workload else ""
    nodes = -(-plan.num_devices // plan.devices_per_node)
    num_metaops = len({s.metaop for s in plan.slices})
    return [
        f"plan       {what}{devices} ({nodes} x {plan.devices_per_node}), method {plan.method}, "
        f"planned in {plan.planner_s:.2f} s",
        f"           {num_metaops} MetaOps (runs of equal layers of a task), {len(plan.slices)} slices, "
        f"{len(plan.waves)} waves",
    ]


def _step(plan: Plan) -> list[str]:
    """Seconds of a step and of its parts."""
    if not plan.step_s:
        return []
    update = f", optimizer {seconds(plan.update_s)}" if plan.update_s else ""
    fixed = f", fixed part by calibration {seconds(plan.fixed_s)}" if plan.fixed_s else ""
    what = (
        f"{seconds(plan.step_s)}: forward and backward {seconds(_both_s(plan))}, "
        f"gradient reduction {seconds(plan.reduction_s)}{update}{fixed}"
    )
    return titled("step", what)


def _both_s(plan: Plan) -> float:
    return plan.step_s - plan.reduction_s - plan.update_s - plan.fixed_s


def _makespan(plan: Plan) -> list[str]:
    """The time that the chart shows, and how far it is from the best."""
    what = f"{seconds(plan.makespan_s)}: forward and backward as drawn, devices idle {100 * plan.idle_fraction:.1f} %"
    if plan.step_s and seconds(_both_s(plan)) != seconds(plan.makespan_s):
        what += f"; {seconds(_both_s(plan))} in a step, which runs all forward before all backward"
    lines = titled("makespan", what)
    if plan.lower_bound_s:
        what = f"no schedule of these layers takes less; the makespan is {100 * plan.gap:.2f} % above (gap)"
        lines += titled("bound", f"{seconds(plan.lower_bound_s)}: {what}")
    return lines


def _rates(plan: Plan) -> list[str]:
    """What a step does a second."""
    found = rates(plan)
    if found is None:
        return []
    mfu = f"MFU {100 * found.mfu:.1f} %, " if found.mfu else ""
    return [f"speed      {mfu}{counted(found.samples_per_s)} samples/s, {counted(found.tokens_per_s)} tokens/s"]


def _spread(plan: Plan) -> list[str]:
    """Where batches differ: how long steps take."""
    found = plan.spread
    if found is None:
        return []
    what = (
        f"differ in size: over {found.steps} steps a step takes {seconds(found.mean_s)} on average, "
        f"{seconds(found.p10_s)} (P10) to {seconds(found.p90_s)} (P90); planned for the mean, memory for the largest"
    )
    return titled("batches", what)


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
        what += f": {gain_text(usual_s, mean_s).strip()}" if plan.method != "sequential" else ", which is this plan"
    lines = titled("expected", what)
    for each in found[:MOST_SETS]:
        tasks = ", ".join(each.tasks) or "no task"
        lines.append(clip(f"  {100 * each.share:>5.1f} % of steps {seconds(each.step_s):>9}  {tasks}", WIDTH))
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
    return titled("turns", turns_in_words(plan.turns))


def _tensor_parallel(plan: Plan) -> list[str]:
    """MetaOps whose layers are spread over several devices, and over how many."""
    degrees: dict[str, set[int]] = {}
    for s in plan.slices if plan.metagraph else ():
        degree = plan.metagraph[s.metaop].degree_on(len(s.devices)) if plan.metagraph else 1
        degrees.setdefault(s.metaop, set()).add(degree)
    spread = [f"{name} {' or '.join(map(str, sorted(found)))}" for name, found in degrees.items() if max(found) > 1]
    if not spread:
        return []
    return titled("tensor", f"parallel, number of devices that share each layer: {', '.join(spread)}")


def _memory(plan: Plan) -> list[str]:
    peaks = plan.memory.peak_bytes_per_device
    if not peaks or not max(peaks):
        return []
    worst = max(range(len(peaks)), key=peaks.__getitem__)
    what = f"{'fits' if plan.memory.fits else 'DOES NOT FIT'}: at most {size(peaks[worst])}"
    if plan.cluster:
        room = plan.cluster.device.memory_bytes
        free = f", {size(room - peaks[worst])} free" if plan.memory.fits else ""
        what += f" of {size(room)} (device {worst}){free}"
    return titled("memory", f"{what}; {size(sum(peaks) / len(peaks))} on average")


def _choices(plan: Plan) -> list[str]:
    """Memory choices that a run of the plan makes."""
    if not plan.memory.peak_bytes_per_device:
        return []
    chosen = ", ".join(words for words, _ in memory_choices(plan))
    return titled("choices", chosen or "none for memory: nothing is sharded or recomputed but what the workload says")


def memory_choices(plan: Plan) -> list[tuple[str, str]]:
    """Memory choices of a plan, each in words and in short."""
    parts = ", ".join(plan.shard_parameters)
    choices = (
        (plan.shard_optimizer, "optimizer states sharded (ZeRO-1)", "ZeRO-1"),
        (bool(plan.shard_parameters), f"parameters of {parts} sharded (ZeRO-3)", "ZeRO-3"),
        (plan.recompute, "activations recomputed in backward", "recompute"),
        (bool(plan.turns), f"tasks in {len(plan.turns)} turns", f"{len(plan.turns)} turns"),
    )
    return [(words, short) for is_chosen, words, short in choices if is_chosen]


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
        word = clip(word, width - 2)
        if len(lines[-1]) + len(word) + 2 > width:
            lines.append("")
        lines[-1] += ("   " if lines[-1] else " ") + word
    return [line for line in lines if line]


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
