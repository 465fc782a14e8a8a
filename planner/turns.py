"""Turns: a MetaGraph with costs and a cluster in; plans whose tasks run in turns, forward and backward, out.

- All tasks at once keep the activations of all of them; turns keep those of one. So a plan in turns may fit where a
  plan at once must compute activations again.
- A turn is planned like a MetaGraph of its own, within the memory that parameters and states of the other turns leave.
  Its slices stand behind those of the turn before it. Gradients add up over the turns, so steps are costed whole.
- Tasks that hand each other data, and the tasks between them in the order of tasks, are in one turn.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from time import perf_counter

from spindle.errors import InfeasibleError
from spindle.planner.baselines.baselines import WAVES_BY_BASELINE
from spindle.planner.bounds.bound import TIX_SHARE, lower_bound, tightened
from spindle.planner.costing.memory import kept_bytes, layer_memory_bytes
from spindle.planner.problem import Problem, make_problem
from spindle.planner.solve import (
    Candidate,
    assemble,
    best,
    default_limit_s,
    evaluate,
    fitting,
    has_room,
    only,
    searched,
    usual_candidates,
)
from spindle.planner.work import Work
from spindle.values.cluster import Cluster
from spindle.values.metagraph import MetaGraph, MetaOp
from spindle.values.plan import Plan, Slice
from spindle.values.turns import Turns

MOST_SWAPPED = 4  # schedules of each turn that are tried beside those of the others


def smallest_turns(metagraph: MetaGraph) -> Turns:
    """Turns that cannot be cut further."""
    tasks = metagraph.tasks
    place = {task: number for number, task in enumerate(tasks)}
    reach = list(range(len(tasks)))  # the last task that must share a turn with each
    for flow in metagraph.flows:
        ends = sorted(place[metagraph[end].task] for end in (flow.source, flow.target))
        reach[ends[0]] = max(reach[ends[0]], ends[1])
    cuts = [number + 1 for number, last in enumerate(accumulate(reach, max)) if last == number]
    return tuple(tasks[a:b] for a, b in pairwise([0, *cuts]))


def turns_to_try(metagraph: MetaGraph, cluster: Cluster) -> tuple[Turns, ...]:
    """The fewest turns of which each fits when all its MetaOps run on all devices that their batches allow, balanced by
    activations; where there are none, two turns and the smallest ones.
    """
    smallest = smallest_turns(metagraph)
    if len(smallest) < 2:
        return ()
    weights = [sum(_kept(metaop, cluster) for metaop in metagraph if metaop.task in tasks) for tasks in smallest]
    room = cluster.device.memory_bytes - sum(_states(metagraph, cluster).values())
    for number in range(2, len(smallest) + 1):
        turns, most = _balanced(smallest, weights, number)
        if most <= room:
            return (turns,)
    return tuple(dict.fromkeys((_balanced(smallest, weights, 2)[0], smallest)))


def _balanced(smallest: Turns, weights: Sequence[float], number: int) -> tuple[Turns, float]:
    """`number` turns of neighbors whose heaviest is as light as can be, and its weight."""
    sums = [0.0, *accumulate(weights)]
    # of the first `end` ones in one turn more each time: the heaviest turn, and where the last one begins
    heaviest: list[list[tuple[float, int]]] = [[(weight, 0) for weight in sums]]
    for used in range(1, number):
        row = [(float("inf"), 0)] * (used + 1)
        for end in range(used + 1, len(sums)):
            row.append(min((max(heaviest[-1][begin][0], sums[end] - sums[begin]), begin) for begin in range(used, end)))
        heaviest.append(row)
    ends = [len(weights)]
    for row in reversed(heaviest):
        ends.append(row[ends[-1]][1])
    turns = tuple(sum(smallest[a:b], ()) for a, b in pairwise(reversed(ends)))
    return turns, heaviest[-1][-1][0]


def _widest(metaop: MetaOp, cluster: Cluster) -> int:
    return max((n for n, _ in metaop.layer_time_s if n <= cluster.num_devices), default=1)


def _kept(metaop: MetaOp, cluster: Cluster) -> float:
    """Activations on each device when all run it."""
    return metaop.layers * kept_bytes(metaop, _widest(metaop, cluster))


def _states(metagraph: MetaGraph, cluster: Cluster) -> dict[str, float]:
    """Bytes on each device of what outlasts a turn, by parameter set, when all devices run it."""
    held: dict[str, float] = {}
    for metaop in metagraph:
        key, count = metaop.parameters or metaop.name, _widest(metaop, cluster)
        again = metaop.recomputed_bytes / count
        own = metaop.layers * (layer_memory_bytes(metaop, count) - kept_bytes(metaop, count)) - again
        held[key] = max(held.get(key, 0.0), own)
    return held


@dataclass(frozen=True)
class _Turn:
    """A turn as a problem of its own, the baselines to run it, and the same in several steps where batches differ."""

    problem: Problem
    usual: Mapping[str, Candidate]
    steps: tuple[MetaGraph, ...]


def solve_in_turns(
    metagraph: MetaGraph,
    cluster: Cluster,
    turns: Turns,
    *,
    method: str = "auto",
    time_limit_s: float | None = None,
    share: float = 1.0,
    seed: int = 0,
    aligned: bool = False,
    start: Plan | None = None,
    steps: Sequence[MetaGraph] = (),
    clock: Callable[[], float] = perf_counter,
    ends_s: float = float("inf"),
) -> Plan:
    """As `solve`, for tasks that run in `turns`. Raises InfeasibleError where a turn does not fit."""
    started_s = clock()
    whole = make_problem(metagraph, cluster, turns)
    bound = lower_bound(whole)
    limit_s = share * (default_limit_s(cluster, is_warm=start is not None) if time_limit_s is None else time_limit_s)
    chosen: Candidate | None = None
    usual: dict[str, Candidate] = {}
    for is_sure in (False, True):
        parts = [_turn(whole, tasks, steps, aligned=aligned, is_sure=is_sure) for tasks in turns]
        usual = _usual(whole, parts, steps)
        if method in WAVES_BY_BASELINE:
            chosen = only(whole, usual, method)
        else:
            found = list(usual.values()) if method == "auto" or aligned else []
            if not aligned:
                own_s = limit_s / len(turns)
                end_s = None if time_limit_s is None else min(started_s + limit_s, ends_s) - TIX_SHARE * limit_s
                works = (
                    Work(
                        own_s,
                        clock,
                        num_layers=sum(part.problem.layers),
                        most_s=None if end_s is None else (end_s - clock()) / (len(parts) - number),
                    )
                    for number, part in enumerate(parts)
                )
                own = [_searched(part, work, start, seed) for part, work in zip(parts, works, strict=True)]
                found.append(_combined(whole, own, steps))
            if not found:
                raise InfeasibleError("no baseline to run the tasks in turns fits; use method 'auto'")
            chosen = best(fitting(whole, found), usual.values() if method == "auto" else ())
        if has_room(whole, chosen):
            break
    assert chosen is not None, "one of two tries gives a candidate, or raises"
    if not aligned:
        bound = tightened(whole, bound, chosen.makespan_s, limit_s)
    return assemble(whole, chosen, usual, bound, planner_s=clock() - started_s)


def _turn(whole: Problem, tasks: Sequence[str], steps: Sequence[MetaGraph], *, aligned: bool, is_sure: bool) -> _Turn:
    """A turn by itself, with the memory that parameters and states of others leave; with `is_sure` as if each device
    had those of all turns, whatever it runs in this one.
    """
    names = {metaop.name for metaop in whole.metagraph if metaop.task in tasks}
    own = {metaop.parameters or metaop.name for metaop in whole.metagraph if metaop.name in names}
    held = _states(whole.metagraph, whole.cluster)
    room = whole.cluster.device.memory_bytes - sum(b for key, b in held.items() if is_sure or key not in own)
    if room <= 0:
        raise InfeasibleError(
            f"parameters and states of other turns leave no memory for {', '.join(tasks)}; shard the optimizer, use "
            "more devices, or run all tasks at once"
        )
    cluster = replace(whole.cluster, device=replace(whole.cluster.device, memory_bytes=room))
    problem = make_problem(whole.metagraph.only(names), cluster)
    own_steps = tuple(step.only(names) for step in steps)
    return _Turn(problem, usual_candidates(problem, own_steps, aligned=aligned)[0], own_steps)


def _searched(part: _Turn, work: Work, start: Plan | None, seed: int) -> list[Candidate]:
    """Schedules of a turn, the shortest step first."""
    bound = lower_bound(part.problem)
    found = searched(part.problem, bound, work, part.usual, part.steps, start=start, seed=seed)
    found = [*fitting(part.problem, [*found, *part.usual.values()])]
    if not found:
        names = ", ".join(dict.fromkeys(metaop.task for metaop in part.problem.metaops))
        raise InfeasibleError(f"no schedule of {names} fits beside what the other turns leave in memory")
    return sorted(found, key=lambda c: (c.expected_s, c.makespan_s, c.method))


def _usual(whole: Problem, parts: Sequence[_Turn], steps: Sequence[MetaGraph]) -> dict[str, Candidate]:
    """The baselines that fit in each turn, one turn after another."""
    return {
        name: evaluate(whole, name, _behind(part.usual[name].slices for part in parts), steps)
        for name in WAVES_BY_BASELINE
        if all(name in part.usual for part in parts)
    }


def _combined(whole: Problem, found: Sequence[Sequence[Candidate]], steps: Sequence[MetaGraph]) -> Candidate:
    """Of each turn a schedule: first the shortest, then whichever makes the whole step shorter, since turns share the
    reductions.
    """
    chosen = [own[0] for own in found]
    step = _joined(whole, chosen)
    for number, own in enumerate(found):
        for other in own[1:MOST_SWAPPED]:
            tried = [*chosen[:number], other, *chosen[number + 1 :]]
            candidate = _joined(whole, tried)
            if (not has_room(whole, candidate), candidate.step_s) < (not has_room(whole, step), step.step_s):
                chosen, step = tried, candidate
    return _joined(whole, chosen, steps) if steps else step


def _joined(whole: Problem, chosen: Sequence[Candidate], steps: Sequence[MetaGraph] = ()) -> Candidate:
    return evaluate(whole, "lp", _behind(candidate.slices for candidate in chosen), steps)


def _behind(turns: "Iterator[tuple[Slice, ...]]") -> tuple[Slice, ...]:
    """Slices of turns, each behind the end of the one before."""
    placed: list[Slice] = []
    for own in turns:
        at_s = max((s.end_s for s in placed), default=0.0)
        placed += [replace(s, start_s=at_s + s.start_s, end_s=at_s + s.end_s) for s in own]
    return tuple(placed)
