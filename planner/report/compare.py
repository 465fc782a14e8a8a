"""Compare: two plans in, what changed out."""

from dataclasses import dataclass

from spindle.planner.report.figures import clip
from spindle.values.plan import Plan


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
        row = f"{clip(c.metaop, names):{names}}  {_cell(c.before)}  {_cell(c.after)}"
        lines.append(clip(row.rstrip()))
    return "\n".join(lines)


def _cell(runs: Runs | None) -> str:
    if runs is None:
        return f"{'-':34}"
    counts = clip("+".join(f"{layers}x{n}" for layers, n in runs.slices), 14)
    return f"{counts:14} {runs.start_s:>9.4f} {runs.device_s:>9.4f}"
