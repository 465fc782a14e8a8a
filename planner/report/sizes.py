"""Sizes: plans for several numbers of devices in, what each gives and where more stop helping out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from textwrap import wrap

from spindle.errors import ClusterError, InfeasibleError, PlanError
from spindle.planner.report.figures import WIDTH, clip, counted, three_digits
from spindle.planner.report.rates import rates
from spindle.planner.report.render import memory_choices
from spindle.values.cluster import Cluster
from spindle.values.plan import Plan

HELPS = 0.05
"""More devices help while twice as many shorten the step by at least this share (others in proportion)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a plan for this number of devices gives.

    efficiency   useful share of its device time, with that of the smallest size that has a plan as 1
    usual_s      the best of what people would use instead (0: not known)
    peak_bytes   of the fullest device, which has memory_bytes
    choices      memory choices in words, "" where there are none
    reason       why there is no plan
    """

    devices: int
    makespan_s: float = 0.0
    step_s: float = 0.0
    gap: float = 0.0
    idle: float = 0.0
    efficiency: float = 0.0
    usual_s: float = 0.0
    mfu: float = 0.0
    tokens_per_s: float = 0.0
    peak_bytes: float = 0.0
    memory_bytes: float = 0.0
    choices: str = ""
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
    found = [
        Size(devices=devices, reason=plan) if isinstance(plan, str) else _size_of(devices, plan)
        for devices, plan in plans
    ]
    base = next((row.devices * row.step_s for row in found if not row.reason), 0.0)
    return tuple(row if row.reason else replace(row, efficiency=base / (row.devices * row.step_s)) for row in found)


def _size_of(devices: int, plan: Plan) -> Size:
    speed = rates(plan)
    return Size(
        devices=devices,
        makespan_s=plan.makespan_s,
        step_s=plan.expected_s,
        gap=plan.gap,
        idle=plan.idle_fraction,
        usual_s=min((s for name, s in plan.usual_ways if name != "paper"), default=0.0),
        mfu=speed.mfu if speed else 0.0,
        tokens_per_s=speed.tokens_per_s if speed else 0.0,
        peak_bytes=max(plan.memory.peak_bytes_per_device, default=0.0),
        memory_bytes=plan.cluster.device.memory_bytes if plan.cluster else 0.0,
        choices=", ".join(short for _, short in memory_choices(plan)),
    )


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
    """A table within 100 columns, what a size over 100 % means, and where more devices stop helping."""
    lines = [
        f"{'devices':>7} {'step s':>8} {'MFU %':>6} {'tokens/s':>9} {'peak GiB':>9} {'idle %':>6} {'efficiency %':>12} "
        f"{'best baseline s':>15}  memory choices"
    ]
    for row in rows:
        lines.append(clip(f"{row.devices:>7} {row.reason}" if row.reason else _row(row)))
    if any(row.memory_bytes for row in rows):
        lines.append(f"Each device has {max(row.memory_bytes for row in rows) / 2**30:.2f} GiB.")
    lines += wrap(_over_100(rows), WIDTH)
    point = enough(rows)
    if point is not None:
        lines.append(f"More than {point} devices do not help: the next size saves less than {100 * HELPS:.0f} %.")
    elif sum(not row.reason for row in rows) > 1:
        lines.append("More devices help up to the largest size asked for.")
    return "\n".join(lines)


def _row(row: Size) -> str:
    mfu, tokens = (f"{100 * row.mfu:.1f}", counted(row.tokens_per_s)) if row.tokens_per_s else ("-", "-")
    usual = three_digits(row.usual_s) if row.usual_s else "-"
    return (
        f"{row.devices:>7} {three_digits(row.step_s):>8} {mfu:>6} {tokens:>9} {row.peak_bytes / 2**30:>9.2f} "
        f"{100 * row.idle:>6.1f} {100 * row.efficiency:>12.1f} {usual:>15}  {row.choices or 'none'}"
    )


def _over_100(rows: Sequence[Size]) -> str:
    """What an efficiency of more than 100 % comes from; "" where there is none."""
    base = next((row for row in rows if not row.reason), None)
    above = next((row for row in rows if row.efficiency > 1.005), None)
    if base is None or above is None:
        return ""
    text = (
        f"Efficiency counts from {_devices(base.devices)}. It is over 100 % on {_devices(above.devices)}, because the "
        "smaller size "
    )
    if base.choices != above.choices:
        there, here = base.choices or "none", above.choices or "none"
        return f"{text}must save memory at the cost of time: {there} there, {here} here."
    if base.idle > above.idle:
        return f"{text}leaves more of its device time idle."
    return f"{text}spends a larger share of its time on reductions and its optimizer."


def _devices(count: int) -> str:
    return f"{count} device{'s' * (count != 1)}"
