"""Advice: a plan in, one or two lines out that say what would help most; each is computed from the plan.

- Plain data parallelism is as good: all tasks in sequence on all devices come close to the plan.
- Memory: what libraries take besides does not fit beside the predicted peak, where the device type reserves nothing.
- Batch: MetaOps run at the largest count that a task's batch allows, still scale there, and devices idle.
- Devices: the slowest chain at its fastest counts bounds what more devices can save; device time, what fewer must do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from spindle.planner.baselines.alternatives import DDP
from spindle.values.graph import base_task
from spindle.values.metagraph import MetaGraph, MetaOp
from spindle.values.plan import Plan

PLAIN = ("sequential", DDP)
AS_GOOD = 0.02  # share of the step within which plain data parallelism is as good
SATURATED = 0.15  # more devices are said to be of no use when they save at most this share
STILL_SCALES = 0.8  # least efficiency of a count against the next smaller one
NOTABLE = 0.25  # share of the makespan that a task must spend at its largest count
IDLE = 0.05  # share of device time that must idle before another batch is worth a line
LIBRARIES_BYTES = 4e9  # docs/cost-model.md, section 4
OFF = 0.3  # a run this much slower than predicted asks for measured costs
MOST = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One line for people, and what it is about: memory, as-good, batch, devices; after a run, profile."""

    about: str
    text: str


def advise(plan: Plan, *, batches: Mapping[str, int] | None = None) -> tuple[Advice, ...]:
    """At most two, the weightiest first. `batches`: batch sizes by task, where they are known."""
    found = [_memory(plan), _as_good(plan), _batch(plan, batches or {}), _devices(plan)]
    return tuple(advice for advice in found if advice is not None)[:MOST]


def advise_after(predicted_s: float, measured_s: float) -> Advice | None:
    """After a run: whether its steps took so much longer than planned that costs should be measured."""
    if not predicted_s or measured_s <= predicted_s * (1 + OFF):
        return None
    text = (
        f"steps took {measured_s * 1e3:.1f} ms, {measured_s / predicted_s:.1f} times the {predicted_s * 1e3:.1f} ms "
        "planned: see where (spindle show --trace), measure (spindle profile), plan again"
    )
    return Advice(about="profile", text=text)


def _as_good(plan: Plan) -> Advice | None:
    ways, own_s = plan.usual_ways, plan.compared_s
    usual_s = min((seconds for name, seconds in ways if name in PLAIN), default=None)
    if usual_s is None or own_s < usual_s * (1 - AS_GOOD):
        return None
    return Advice(
        about="as-good",
        text=f"plain data parallelism is as good: {_seconds(usual_s)} a step against {_seconds(own_s)}",
    )


def _memory(plan: Plan) -> Advice | None:
    peaks = plan.memory.peak_bytes_per_device
    if plan.cluster is None or plan.cluster.device.name == "cpu" or plan.cluster.device.reserved_bytes or not peaks:
        return None
    room = plan.cluster.device.memory_bytes
    if max(peaks) + LIBRARIES_BYTES <= room:
        return None
    ways = "shard the optimizer" * (not plan.shard_optimizer), "recompute" * (not plan.recompute)
    remedy = ", or ".join(filter(None, ways)) or "smaller batches, or more devices"
    full = f"device {peaks.index(max(peaks))} is filled to {max(peaks) / room:.0%}"
    text = f"{full}, and libraries take about 4 GB more: {remedy}"
    return Advice(about="memory", text=text)


def _batch(plan: Plan, batches: Mapping[str, int]) -> Advice | None:
    """The task that spends most of the makespan at a largest count which only its batch sets."""
    if plan.metagraph is None or plan.idle_fraction < IDLE:
        return None
    share_by_task: dict[str, float] = {}
    for piece in plan.slices:
        metaop = plan.metagraph[piece.metaop]
        task = base_task(metaop.task)
        batch = batches.get(task)
        if batch is not None and len(piece.devices) == _held_back(metaop, batch, plan.num_devices):
            share_by_task[task] = share_by_task.get(task, 0.0) + piece.span_s / plan.makespan_s
    task, share = max(share_by_task.items(), key=lambda pair: pair[1], default=("", 0.0))
    if share < NOTABLE:
        return None
    most = _largest(batches[task], plan.num_devices)
    other = max(1, round(batches[task] / plan.num_devices)) * plan.num_devices
    text = (
        f"task {task}: batch {batches[task]} runs on at most {most} of {plan.num_devices} devices; {other} can use all"
    )
    return Advice(about="batch", text=text)


def _held_back(metaop: MetaOp, batch: int, num_devices: int) -> int:
    """Its largest count, if the batch alone sets it and it still scales there; else 0."""
    counts = sorted(n for n in metaop.times if n <= num_devices)
    most = _largest(batch, num_devices)
    if not counts or counts[-1] != most or most == num_devices:
        return 0
    if len(counts) == 1:
        return most
    before, last = counts[-2:]
    efficiency = before * metaop.times[before] / (last * metaop.times[last])
    return most if efficiency >= STILL_SCALES else 0


def _largest(batch: int, num_devices: int) -> int:
    return max(n for n in range(1, num_devices + 1) if batch % n == 0)


def _devices(plan: Plan) -> Advice | None:
    if plan.metagraph is None or not plan.makespan_s or plan.num_devices < 2:
        return None
    chain_s, chain = slowest_chain(plan.metagraph, plan.num_devices)
    if chain_s < plan.makespan_s * (1 - SATURATED):
        return None
    work = sum(m.layers * min(n * t for n, t in m.layer_time_s) for m in plan.metagraph)
    enough = ceil(work / plan.makespan_s - 1e-9)
    path = " > ".join(chain) if len(chain) <= 3 else f"{chain[0]} > ... > {chain[-1]}"
    saved = max(0.0, 1 - chain_s / plan.makespan_s)
    text = f"{path} take {_seconds(chain_s)} at their fastest: other numbers of devices save at most {saved:.0%}"
    if enough < plan.num_devices:
        text += f"; the work would fill {enough} of {plan.num_devices} devices, see spindle whatif"
    return Advice(about="devices", text=text)


def slowest_chain(metagraph: MetaGraph, num_devices: int) -> tuple[float, tuple[str, ...]]:
    """Seconds and names of the chain that takes longest when each of its MetaOps has its fastest valid count."""
    best: dict[str, tuple[float, tuple[str, ...]]] = {}
    for name in metagraph.topological_order:
        metaop = metagraph[name]
        own_s = metaop.layers * min(t for n, t in metaop.layer_time_s if n <= num_devices)
        before_s, before = max((best[p] for p in metagraph.predecessors.get(name, ())), default=(0.0, ()))
        best[name] = (before_s + own_s, (*before, name))
    return max(best.values())


def _seconds(value: float) -> str:
    return f"{value:.4g} s" if value >= 1 else f"{value * 1e3:.4g} ms"
