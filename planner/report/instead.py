"""Instead: a plan in, the lines that set it beside what people would use instead out, at most 100 columns wide.

When waves gain nothing over the best of those, the last line says so.
"""

from spindle.planner.report.figures import WIDTH, clip, seconds, size
from spindle.values.plan import Alternative, Plan

LEAST_GAIN = 1e-3  # below this share of the best alternative's step, waves are said to gain nothing
BASELINE_TITLES = {
    "sequential": "all devices, one after another",
    "task_split": "devices split by task",
    "component_split": "tasks in turn, split by component",
    "paper": "the paper's planner",
}
PAPER_TITLE = "the paper's planner (Spindle)"
NAME_WIDTH = 35


def instead_lines(plan: Plan) -> list[str]:
    """What people would use instead, with its memory choice; where that was not costed, the other methods."""
    if plan.alternatives and plan.compared != "makespan":
        return [*_alternatives(plan), *_verdict(plan)]
    if not plan.baselines_s:
        return []
    ways, own_s = plan.usual_ways, plan.compared_s
    what = {"mean step": "  mean steps of other methods", "step": "  steps of other methods", "makespan": "  makespans"}
    lines = [f"baselines{what[plan.compared]}"]
    for name, value_s in sorted(ways, key=lambda pair: -pair[1]):
        lines.append(f"  {name:<16} {seconds(value_s):>10}  {gain_text(value_s, own_s)}  {_title(name)}".rstrip())
    lines += _verdict(plan)
    missing = [name for name in BASELINE_TITLES if name not in dict(plan.baselines_s)]
    if missing:
        lines.append(f"  does not fit in memory: {', '.join(missing)}")
    return lines


def _alternatives(plan: Plan) -> list[str]:
    lines = [f"{'baselines':{NAME_WIDTH + 2}} {plan.compared:>9}  this plan is    fastest memory choice"]
    by_name = {other.name: other for other in plan.alternatives}
    for name, value_s in sorted(plan.usual_ways, key=lambda pair: -pair[1]):
        other = by_name.get(name)
        title, choice = (PAPER_TITLE, "as this plan") if other is None else (name, other.choice)
        gain = gain_text(value_s, plan.compared_s)
        lines.append(f"  {title:<{NAME_WIDTH}} {seconds(value_s):>9}  {gain}  {choice}".rstrip())
    lines += [f"  {other.name:<{NAME_WIDTH}} {_no_fit(other, plan)}" for other in plan.alternatives if not other.fits]
    if plan.baselines_s and "paper" not in dict(plan.baselines_s):
        lines.append(f"  {PAPER_TITLE:<{NAME_WIDTH}} does not fit in memory")
    return [clip(line, WIDTH) for line in lines]


def _no_fit(other: Alternative, plan: Plan) -> str:
    if not other.peak_bytes or plan.cluster is None:
        return "does not fit in memory"
    how = f", {other.choice}" if other.choice else ""
    return f"does not fit: {size(other.peak_bytes)} of {size(plan.cluster.device.memory_bytes)}{how}"


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


def gain_text(other_s: float, own_s: float) -> str:
    """How much shorter or longer the own seconds are."""
    return (
        f"{100 * (1 - own_s / other_s):>5.1f} % shorter"
        if own_s <= other_s
        else f"{100 * (own_s / other_s - 1):>5.1f} % longer "
    )


def _title(name: str) -> str:
    return BASELINE_TITLES.get(name, "")
