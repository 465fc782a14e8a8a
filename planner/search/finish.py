"""Finish: the slices of a search in, slices on numbered devices at exact times out.

- Without a pool devices are given out by a sweep over time: the ones the MetaOp had, else the tightest node, else any.
- Then every slice starts when its data and its devices are there, in the order of the search: what rounding or reversed
  time left open closes, and the simulator finds the same times. Slices that follow each other on the same devices
  become one.
"""

from dataclasses import dataclass
from heapq import heappop, heappush

from spindle.planner.baselines.place import join
from spindle.planner.problem import Problem
from spindle.planner.search.decode import Decoded, Draft
from spindle.planner.search.device_pool import DevicePool, bits_of, make_device_pool
from spindle.planner.search.list_scheduler import Run
from spindle.planner.search.model import Model
from spindle.values.plan import Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A slice in numbers, forward in time."""

    op: int
    first_layer: int
    num_layers: int
    count: int
    start_s: float
    end_s: float
    devices: int = 0


def runs_of_draft(model: Model, draft: Draft, decoded: Decoded) -> list[Run]:
    """The slices of a decoded draft in order of start; ends without transfers."""
    runs: list[Run] = []
    for m, parts in enumerate(draft):
        for i, (c, layers, _, _, _) in enumerate(parts):
            start = decoded[2][m][i]
            devices = decoded[3][m][i] if decoded[3] else 0
            runs.append((m, c, layers, start, start + layers * model.times[m][c], devices))
    runs.sort(key=lambda run: (run[3], run[0]))
    return runs


def forward_runs(model: Model, runs: list[Run]) -> list[Run]:
    """The runs of a reversed model in forward time."""
    if not model.is_reversed:
        return runs
    last_s = max(end for _, _, _, _, end, _ in runs)
    turned = [(m, c, layers, last_s - end, last_s - start, devices) for m, c, layers, start, end, devices in runs]
    return sorted(turned, key=lambda run: (run[3], run[0]))


def finish(problem: Problem, model: Model, runs: list[Run]) -> tuple[Slice, ...]:
    """Slices of a Plan."""
    steps = _steps(model, forward_runs(model, runs))
    pool = make_device_pool(problem)
    if any(not step.devices for step in steps):
        devices = _sweep(problem, pool, steps)
    else:
        devices = [step.devices for step in steps]
    return join(_retimed(problem, pool, steps, devices))


def forward_on_pool(problem: Problem, pool: DevicePool, model: Model, runs: list[Run]) -> list[Run]:
    """Placed runs of either direction with forward times: order and devices stay, transfers go to who receives."""
    steps = _steps(model, forward_runs(model, runs))
    slices = _retimed(problem, pool, steps, [step.devices for step in steps])
    timed = [
        (step.op, model.counts[step.op].index(step.count), step.num_layers, s.start_s, s.end_s, step.devices)
        for step, s in zip(steps, slices, strict=True)
    ]
    return sorted(timed, key=lambda run: (run[3], run[0]))


def _steps(model: Model, runs: list[Run]) -> list[Step]:
    first = [0] * len(model)
    steps = []
    for m, c, layers, start, end, devices in runs:
        count = model.counts[m][c]
        steps.append(
            Step(op=m, first_layer=first[m], num_layers=layers, count=count, start_s=start, end_s=end, devices=devices)
        )
        first[m] += layers
    return steps


def _sweep(problem: Problem, pool: DevicePool, steps: list[Step]) -> list[int]:
    """Devices for each step: enough are free at each start, whatever was chosen before."""
    free = pool.all_devices
    running: list[tuple[float, int]] = []
    last, shared = [0] * len(problem), pool.start_shared()
    given = []
    slack_s = 1e-9 * max(step.end_s for step in steps)
    for step in steps:
        while running and (running[0][0] <= step.start_s + slack_s or free.bit_count() < step.count):
            free |= heappop(running)[1]
        near = [(last[step.op], 0.0)] if last[step.op] else [(last[p], 0.0) for p in problem.predecessors[step.op]]
        group = pool.shared[step.op]
        found = pool.choose(step.op, step.count, free, near, shared=shared[group])
        devices = found[0] if found else _any(free, step.count)
        if group >= 0:
            shared[group] |= devices
        free &= ~devices
        last[step.op] = devices
        given.append(devices)
        heappush(running, (step.end_s, devices))
    return given


def _any(free: int, count: int) -> int:
    chosen = 0
    for _ in range(count):
        bit = free & -free
        free ^= bit
        chosen |= bit
    return chosen


def _retimed(problem: Problem, pool: DevicePool, steps: list[Step], devices: list[int]) -> list[Slice]:
    """Each step as early as the ones before it on its devices and of its data allow."""
    free_s = [0.0] * problem.num_devices
    ended_s = [0.0] * len(problem)
    where = [0] * len(problem)
    slices = []
    for step, mask in zip(steps, devices, strict=True):
        op, numbers = step.op, bits_of(mask)
        data_s = ended_s[op] if step.first_layer else max((ended_s[p] for p in problem.predecessors[op]), default=0.0)
        start_s = max(data_s, max(free_s[d] for d in numbers))
        cost_s = pool.cost_s(mask, step.count, pool.sources(op, not step.first_layer, where))
        end_s = start_s + cost_s + step.num_layers * problem.time(op, step.count)
        ended_s[op], where[op] = end_s, mask
        for d in numbers:
            free_s[d] = end_s
        slices.append(
            Slice(
                metaop=problem.metaops[op].name,
                first_layer=step.first_layer,
                num_layers=step.num_layers,
                devices=numbers,
                start_s=start_s,
                end_s=end_s,
            )
        )
    return slices
