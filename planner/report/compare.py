"""Compare: two plans in, what changed out; plans for several device counts in, where more stop helping out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from spindle.cluster import Cluster
from spindle.errors import ClusterError, InfeasibleError, PlanError
from spindle.plan import Plan
from spindle.planner.report.render import three_digits

HELPS = 0.05
"""More devices help while twice as many shorten the step by at least this share (others in proportion)."""
WIDTH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A MetaOp whose slices differ: (layers, devices) of each, when it runs, its device-seconds; None: not there."""

    metaop: str
    before: "Runs | None"
    after: "Runs | None"


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """How a plan runs one MetaOp."""

    slices: tuple[tuple[int, int], ...]
    devices: tuple[tuple[int, ...], ...]
    start_s: float
    end_s: float
    device_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What differs between two plans: (name, before, after) of their figures, and the MetaOps that run otherwise."""

    figures: tuple[tuple[str, float, float], ...]
    changes: tuple[Change, ...]
    same: int


def compare(before: Plan, after: Plan) -> Difference:
    """Figures of both plans, and MetaOps with other layers, counts or devices, or that start at other times."""
    one, two = _runs(before), _runs(after)
    names = [*one, *(name for name in two if name not in one)]
    changed = [Change(metaop=n, before=one.get(n), after=two.get(n)) for n in names if one.get(n) != two.get(n)]
    figures = tuple((name, b, a) for (name, b), (_, a) in zip(_figures(before), _figures(after), strict=True) if b or a)
    return Difference(figures=figures, changes=tuple(changed), same=len(names) - len(changed))


def _figures(plan: Plan) -> tuple[tuple[str, float], ...]:
    peaks = plan.memory.peak_bytes_per_device
    return (
        ("devices", float(plan.num_devices)),
        ("makespan s", plan.makespan_s),
        ("bound s", plan.lower_bound_s),
        ("gap %", 100 * plan.gap),
        ("step s", plan.step_s),
        ("reduction s", plan.reduction_s),
        ("idle %", 100 * plan.idle_fraction),
        ("slices", float(len(plan.slices))),
        ("waves", float(len(plan.waves))),
        ("turns", float(len(plan.turns))),
        ("peak GiB", max(peaks, default=0.0) / 2**30),
    )


def _runs(plan: Plan) -> dict[str, Runs]:
    found: dict[str, Runs] = {}
    for name in dict.fromkeys(s.metaop for s in plan.slices):
        slices = [s for s in plan.slices if s.metaop == name]
        found[name] = Runs(
            slices=tuple((s.num_layers, len(s.devices)) for s in slices),
            devices=tuple(s.devices for s in slices),
            start_s=slices[0].start_s,
            end_s=slices[-1].end_s,
            device_s=sum(len(s.devices) * s.span_s for s in slices),
        )
    return found


def render_difference(found: Difference) -> str:
    """Two tables within 100 columns."""
    lines = [f"{'':14} {'before':>14} {'after':>14} {'change':>10}"]
    for name, b, a in found.figures:
        change = f"{100 * (a / b - 1):+.2f} %" if b else "new"
        lines.append(f"{name:14} {b:>14.6g} {a:>14.6g} {change:>10}")
    if not found.changes:
        return "\n".join([*lines, f"all {found.same} MetaOps run alike"])
    lines += ["", f"{found.same} MetaOps run alike, {len(found.changes)} do not (layers x devices, start s, device-s):"]
    names = min(28, max(len(c.metaop) for c in found.changes))
    for c in found.changes:
        row = f"{_clip(c.metaop, names):{names}}  {_cell(c.before)}  {_cell(c.after)}"
        lines.append(_clip(row.rstrip(), WIDTH))
    return "\n".join(lines)


def _cell(runs: Runs | None) -> str:
    if runs is None:
        return f"{'-':34}"
    counts = _clip("+".join(f"{layers}x{n}" for layers, n in runs.slices), 14)
    return f"{counts:14} {runs.start_s:>9.4f} {runs.device_s:>9.4f}"


# -------------------------------------------------------------------------------------------------------- what if


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A plan for so many devices; efficiency against the smallest that has a plan; reason: why there is no plan."""

    devices: int
    makespan_s: float = 0.0
    step_s: float = 0.0
    gap: float = 0.0
    idle: float = 0.0
    efficiency: float = 0.0
    usual_s: float = 0.0
    reason: str = ""


def plan_sizes(solve: Callable[[Cluster], Plan], cluster: Cluster, counts: Sequence[int]) -> tuple[Size, ...]:
    """Plan on as many devices of `cluster`'s kind as each count says; where there is no plan the row says why."""
    plans: list[tuple[int, Plan | str]] = []
    for count in sorted(set(counts)):
        try:
            plans.append((count, solve(resized(cluster, count))))
        except InfeasibleError as error:
            plans.append((count, str(error)))
    return sizes(plans)


def resized(cluster: Cluster, count: int) -> Cluster:
    """A cluster of `count` devices of the same kind: part of a node, or whole nodes."""
    size = cluster.devices_per_node
    if count <= size:
        return replace(cluster, nodes=1, devices_per_node=count)
    if count % size:
        raise ClusterError(f"{count} devices are no whole number of nodes of {size}; give multiples of {size}")
    return replace(cluster, nodes=count // size)


def sizes(plans: Sequence[tuple[int, Plan | str]]) -> tuple[Size, ...]:
    """One row for each device count; a string instead of a plan says why there is none."""
    if not plans:
        raise PlanError("no device counts are given; name some, for instance --devices 8,16,32")
    base: float | None = None
    found = []
    for devices, plan in plans:
        if isinstance(plan, str):
            found.append(Size(devices=devices, reason=plan))
            continue
        worth = devices * plan.step_s
        base = worth if base is None else base
        found.append(
            Size(
                devices=devices,
                makespan_s=plan.makespan_s,
                step_s=plan.step_s,
                gap=plan.gap,
                idle=plan.idle_fraction,
                efficiency=base / worth,
                usual_s=min((s for name, s in plan.usual_ways if name != "paper"), default=0.0),
            )
        )
    return tuple(found)


def enough(rows: Sequence[Size]) -> int | None:
    """The count after which more devices no longer help: the next step saves less than HELPS a doubling."""
    return enough_of([(row.devices, row.step_s) for row in rows if not row.reason])


def enough_of(points: Sequence[tuple[int, float]]) -> int | None:
    """The same of (device count, seconds), counts rising; None where each next one helps."""
    for (devices, seconds), (following, following_s) in pairwise(points):
        if following_s > seconds * (1 - HELPS * min(1.0, following / devices - 1)):
            return devices
    return None


def render_sizes(rows: Sequence[Size]) -> str:
    """A table within 100 columns, and where more devices stop helping."""
    head = f"{'devices':>7} {'step s':>12} {'makespan s':>12} {'gap %':>7} {'idle %':>7} {'efficiency %':>12} "
    head += f"{'best other s':>13}"
    lines = [head]
    for row in rows:
        if row.reason:
            lines.append(_clip(f"{row.devices:>7} {row.reason}", WIDTH))
        else:
            usual = three_digits(row.usual_s)
            lines.append(
                f"{row.devices:>7} {three_digits(row.step_s):>12} {three_digits(row.makespan_s):>12} "
                f"{100 * row.gap:>7.2f} {100 * row.idle:>7.1f} {100 * row.efficiency:>12.1f} {usual:>13}"
            )
    point = enough(rows)
    if point is not None:
        lines.append(f"more than {point} devices do not help: the next size saves less than {100 * HELPS:.0f} %")
    elif sum(not row.reason for row in rows) > 1:
        lines.append("more devices help up to the largest size asked for")
    return "\n".join(lines)


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
