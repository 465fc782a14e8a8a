"""Baselines: a Problem in, the baselines to run it out, each as waves of items for `place`.

- sequential: every MetaOp takes the whole cluster (its fastest count), one after another (Megatron-LM, DeepSpeed).
- task_split: devices are divided among the tasks, which run side by side on their own devices (after Optimus).
- component_split: tasks one after another; inside a task devices are divided among its components (after DistMM); or
  each component on devices of its own for all tasks.
- paper: `waves.paper_waves`.

Devices are divided one valid step at a time, to the MetaOp that gains most, (T(n) - T(n')) / (n' - n), or to the
slowest: a split takes the better of the two, and components that are faster one after another than side by side run so.
The baselines are as good as their idea allows, lest the gain over them be flattery. `wide` variants run every MetaOp on
all devices of its share, also where that is no faster: what it reads is there already. The shorter step of both counts.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

from spindle.planner.baselines.waves import Waves, WaveSlice, paper_waves
from spindle.planner.costing.curves import Curve
from spindle.planner.problem import Problem

Baseline = Literal["sequential", "task_split", "component_split", "paper"]


def sequential_waves(problem: Problem, *, wide: bool = False) -> Waves:
    """Each MetaOp alone on the count that is fastest, or on the widest."""
    return tuple((_alone(problem, op, wide),) for op in problem.order)


def task_split_waves(problem: Problem, *, wide: bool = False) -> Waves:
    """Each task on its own consecutive devices, its MetaOps one after another.

    Where the tasks need more devices than there are, the lightest are bundled and take turns on one share.
    """
    return _split_waves(problem, [metaop.task for metaop in problem.metaops], wide)


def component_group_waves(problem: Problem, *, wide: bool = False) -> Waves:
    """Each component on its own consecutive devices, for all tasks that use it, one after another."""
    return _split_waves(problem, [metaop.component for metaop in problem.metaops], wide)


def _split_waves(problem: Problem, owners: Sequence[str], wide: bool) -> Waves:
    """Devices divided among the owners of MetaOps."""
    bundles = _bundles(problem, owners)
    shares = _divide([_sequence_curve(problem, ops) for ops in bundles], problem.num_devices)[1]
    items: dict[int, WaveSlice] = {}
    previous: dict[int, int] = {}  # what runs before on the same devices
    first = 0
    for share, ops in sorted(zip(shares, bundles, strict=True), key=lambda sb: -sb[0]):
        previous |= dict(pairwise(reversed(ops)))
        for op in ops:
            curve = problem.curves[op]
            count = max(n for n in (curve.time_by_count if wide else curve.counts) if n <= share)
            items[op] = _whole(problem, op, count, tuple(range(first, first + count)))
        first += share
    waves: list[list[WaveSlice]] = []
    wave_of: dict[int, int] = {}
    for op in problem.order:
        before = [*problem.predecessors[op], *([previous[op]] if op in previous else [])]
        wave_of[op] = 1 + max((wave_of[b] for b in before), default=-1)
        if wave_of[op] == len(waves):
            waves.append([])
        waves[wave_of[op]].append(items[op])
    return tuple(map(tuple, waves))


def component_split_waves(problem: Problem, *, wide: bool = False) -> Waves:
    """Task after task; what is ready in a task runs side by side, and a wave ends when all of it has ended."""
    waves: list[tuple[WaveSlice, ...]] = []
    for ops in _task_steps(problem):
        while ops:
            now, ops = _first_fitting(problem, ops)
            slowest_s, shares = _divide([_sequence_curve(problem, [op]) for op in now], problem.num_devices)
            alone_s = sum(problem.layers[op] * problem.curves[op].times_s[-1] for op in now)
            if alone_s < slowest_s or (wide and len(now) == 1):
                waves += [(_alone(problem, op, wide),) for op in now]
            else:
                waves.append(tuple(_whole(problem, op, n) for op, n in zip(now, shares, strict=True)))
    return tuple(waves)


WAVES_BY_BASELINE: Mapping[Baseline, tuple[Callable[[Problem], Waves], ...]] = {
    "sequential": (sequential_waves, partial(sequential_waves, wide=True)),
    "task_split": (task_split_waves, partial(task_split_waves, wide=True)),
    "component_split": (component_split_waves, partial(component_split_waves, wide=True)),
    "paper": (paper_waves,),
}
"""The variants of each; wide ones come second."""
ALIGNED_BASELINES: frozenset[Baseline] = frozenset({"sequential", "component_split", "paper"})
"""Baselines that run their waves one after another; tasks on their own devices do not wait for each other."""


def _alone(problem: Problem, op: int, wide: bool) -> WaveSlice:
    curve = problem.curves[op]
    return _whole(problem, op, curve.widest if wide else curve.counts[-1])


def _whole(problem: Problem, op: int, count: int, devices: tuple[int, ...] = ()) -> WaveSlice:
    return WaveSlice(op=op, first_layer=0, num_layers=problem.layers[op], count=count, devices=devices)


def _sequence_curve(problem: Problem, ops: Sequence[int]) -> Curve:
    """Seconds of MetaOps one after another on n devices, each on its best count; only counts that are faster."""
    counts: list[int] = []
    times: list[float] = []
    for n in sorted({n for op in ops for n in problem.curves[op].counts}):
        if n >= _least(problem, ops):
            time_s = sum(problem.layers[op] * problem.curves[op].step(n) for op in ops)
            if not times or time_s < times[-1]:
                counts.append(n)
                times.append(time_s)
    return Curve(tuple(counts), tuple(times))


def _least(problem: Problem, ops: Sequence[int]) -> int:
    return max(problem.curves[op].counts[0] for op in ops)


def _bundles(problem: Problem, owners: Sequence[str]) -> list[list[int]]:
    """MetaOps by owner in topological order; the lightest owners joined until their least counts fit the cluster."""
    by_owner: dict[str, list[int]] = {}
    for op in problem.order:
        by_owner.setdefault(owners[op], []).append(op)
    bundles = list(by_owner.values())
    position = {op: i for i, op in enumerate(problem.order)}
    while sum(_least(problem, ops) for ops in bundles) > problem.num_devices:
        bundles.sort(key=lambda ops: sum(problem.least_area_s[op] for op in ops))
        bundles[:2] = [sorted(bundles[0] + bundles[1], key=position.__getitem__)]
    return bundles


def _divide(curves: Sequence[Curve], num_devices: int) -> tuple[float, list[int]]:
    """(time of the slowest, devices for each): the better of two greedy divisions."""
    divisions = []
    for shares in (_divide_by_gain(curves, num_devices), _divide_to_slowest(curves, num_devices)):
        times = [curve.step(n) for curve, n in zip(curves, shares, strict=True)]
        divisions.append((max(times), sum(times), shares))
    slowest_s, _, shares = min(divisions)
    return slowest_s, shares


def _divide_by_gain(curves: Sequence[Curve], num_devices: int) -> list[int]:
    """From the least, the next step goes to the largest gain per device while any fits."""
    at = [0] * len(curves)
    free = num_devices - sum(curve.counts[0] for curve in curves)
    while True:
        steps = []
        for i, curve in enumerate(curves):
            if at[i] + 1 < len(curve.counts) and (more := curve.counts[at[i] + 1] - curve.counts[at[i]]) <= free:
                steps.append(((curve.times_s[at[i]] - curve.times_s[at[i] + 1]) / more, -i, more))
        if not steps:
            return [curve.counts[k] for curve, k in zip(curves, at, strict=True)]
        _, minus_i, more = max(steps)
        at[-minus_i] += 1
        free -= more


def _divide_to_slowest(curves: Sequence[Curve], num_devices: int) -> list[int]:
    """From the least, the slowest takes the next step while it fits."""
    at = [0] * len(curves)
    while True:
        shares = [curve.counts[k] for curve, k in zip(curves, at, strict=True)]
        slowest = max(range(len(curves)), key=lambda i: (curves[i].times_s[at[i]], -i))
        wider = curves[slowest].counts[at[slowest] + 1 :]
        if not wider or sum(shares) - shares[slowest] + wider[0] > num_devices:
            return shares
        at[slowest] += 1


def _task_steps(problem: Problem) -> list[list[int]]:
    """MetaOps in steps: all of one task that are ready together; a task runs on until it waits for another one."""
    missing = [len(before) for before in problem.predecessors]
    waiting = set(range(len(problem)))
    steps: list[list[int]] = []
    task = ""
    while waiting:
        ready = [op for op in problem.order if op in waiting and not missing[op]]
        if all(problem.metaops[op].task != task for op in ready):
            task = problem.metaops[ready[0]].task
        step = [op for op in ready if problem.metaops[op].task == task]
        steps.append(step)
        waiting.difference_update(step)
        for op in step:
            for follower in problem.successors[op]:
                missing[follower] -= 1
    return steps


def _first_fitting(problem: Problem, ops: Sequence[int]) -> tuple[list[int], list[int]]:
    """Split what is ready into what fits the cluster side by side and what comes after."""
    used = 0
    for i, op in enumerate(ops):
        used += problem.curves[op].counts[0]
        if used > problem.num_devices:
            return list(ops[:i]), list(ops[i:])
    return list(ops), []
