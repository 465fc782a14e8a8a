"""Solve: a MetaGraph with costs and a cluster in, a Plan out.

- Every plan carries the makespans of the baselines in the same cost model, the lower bound with its certificate, and
  the memory of each device.
- `lp` is the search of `spindle.planner.search`; `auto` returns the best of all methods: its whole step is never longer
  than a baseline's, and its makespan neither unless reductions make that impossible, or components that stay in a
  node each (`spindle.planner.islands`) make the whole step shorter than any baseline's by `WORTH_APART`.
- A larger time limit never gives a worse plan (`best` says what is better): the search finds all that it finds with a
  smaller one, and what its schedules are compared with does not depend on the limit.
- Strict waves (`aligned`) are the paper's: there `lp` and `auto` are the best of the baselines.
"""

import warnings
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from time import perf_counter
from typing import Literal, get_args

from spindle.errors import InfeasibleError, PlanError, SpindleWarning
from spindle.planner.baselines.baselines import ALIGNED_BASELINES, WAVES_BY_BASELINE, Baseline, component_group_waves
from spindle.planner.baselines.paper import paper_slices
from spindle.planner.baselines.place import place
from spindle.planner.bounds.bound import TIX_SHARE, Bound, lower_bound, tightened
from spindle.planner.change import Pins, carry_over, pinned
from spindle.planner.costing.memory import peak_bytes
from spindle.planner.islands import is_slow_between_nodes, island_pins
from spindle.planner.problem import Problem, make_problem
from spindle.planner.search.run import search
from spindle.planner.simulate import best_buckets
from spindle.planner.spread import spread_of, steps_s
from spindle.planner.work import Work
from spindle.values.cluster import Cluster
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import BUCKET_BYTES, Memory, Plan, Slice, make_waves, sorted_pairs, without_operators
from spindle.values.turns import numbered
from spindle.words.nearest import did_you_mean

Method = Literal["auto", "lp", "paper", "sequential", "task_split", "component_split"]
METHODS: tuple[str, ...] = get_args(Method)
SMALL_CLUSTER = 64
SMALL_LIMIT_S, LARGE_LIMIT_S = 2.0, 10.0
WARM_SHARE = 0.25
WORTH_APART = 0.05  # of the step
MOST_SIMULATED = 6  # shortest schedules, as they are found, of which steps on other batches are simulated


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placed schedule: slices in order of start, its makespan, and the whole step it predicts; where batches differ,
    each of several steps.
    """

    method: str
    slices: tuple[Slice, ...]
    makespan_s: float
    reduction_s: float
    update_s: float
    step_s: float
    steps_s: tuple[float, ...] = ()
    bucket_bytes: int = BUCKET_BYTES

    @property
    def expected_s(self) -> float:
        """Seconds of a step, on average."""
        return fmean(self.steps_s) if self.steps_s else self.step_s


def solve(
    metagraph: MetaGraph,
    cluster: Cluster,
    *,
    method: str = "auto",
    time_limit_s: float | None = None,
    share: float = 1.0,
    seed: int = 0,
    aligned: bool = False,
    start: Plan | None = None,
    pins: Pins | None = None,
    steps: Sequence[MetaGraph] = (),
    clock: Callable[[], float] = perf_counter,
    ends_s: float = float("inf"),
) -> Plan:
    """Plan `metagraph` on `cluster`.

    `steps` are MetaGraphs with costs of several batches, of which `metagraph` is the mean: of what the search finds for
    it, the schedule counts that takes least time on average over them, since unequal batches keep devices waiting that
    equal ones would not.

    `start` is a former plan, of a task set that was a little different: what stays the same is taken over, and the
    search takes a quarter of the default time. `pins` are devices by name of a MetaOp or component, which then runs on
    exactly these; the baselines know no pins, so only `lp` (and `auto`) keep them.

    `aligned` asks for strict waves: no slice starts before all slices of the wave in front have ended. `time_limit_s`
    is for the search: 2 s by default, 10 s beyond 64 devices; `share` is what this call has of it. A limit that is
    given is kept by the clock, and so is `ends_s`, the time at which a limit that others share is over; without one the
    same input gives the same plan, apart from `planner_s`. Raises PlanError for a method that does not exist,
    InfeasibleError when no plan exists.
    """
    started_s = clock()
    if method not in METHODS:
        raise PlanError(
            f"method {method!r} is not known{did_you_mean(method, METHODS)}; choose one of {', '.join(METHODS)}"
        )
    if time_limit_s is not None and not 0 <= time_limit_s < float("inf"):
        raise PlanError(f"the time limit is {time_limit_s!r}; give seconds, zero or more")
    if pins and (aligned or method not in ("auto", "lp")):
        raise PlanError(f"pins are kept by methods auto and lp without strict waves, not by {method!r}; leave them out")
    unpinned = make_problem(metagraph, cluster)  # what bounds it holds with pins too
    bound = lower_bound(unpinned)
    problem = pinned(unpinned, pins) if pins else unpinned
    baselines, reason = ({}, None) if pins else usual_candidates(problem, steps, aligned=aligned)
    if method in WAVES_BY_BASELINE:
        chosen = only(problem, baselines, method)
    else:
        done_share = 1.0
        found: list[Candidate] = []
        apart: list[Candidate] = []  # components on nodes of their own
        given = time_limit_s is not None
        limit_s = share * (
            default_limit_s(cluster, is_warm=start is not None) if time_limit_s is None else time_limit_s
        )
        if not aligned:
            islands = not pins and is_slow_between_nodes(problem, bound.bound_s)
            end_s = min(started_s + limit_s, ends_s) - TIX_SHARE * limit_s if given else None  # of the search

            def work(searches: int) -> Work:
                most_s = None if end_s is None else (end_s - clock()) / searches
                own_s = limit_s / 2 if islands else limit_s
                return Work(own_s, clock, num_layers=sum(problem.layers), most_s=most_s)

            own = work(2 if islands else 1)
            found = searched(problem, bound, own, baselines, steps, start=start, seed=seed)
            done_share = own.done_share
            if islands:
                fixed = pinned(problem, island_pins(problem))
                apart = searched(fixed, bound, work(1), {}, steps, start=None, seed=seed)
        if not found or method == "auto":
            found += baselines.values()
        if not found:
            raise reason or InfeasibleError(
                "no plan keeps the pins within the memory of the devices; pin fewer MetaOps"
            )
        chosen = best(fitting(problem, found), baselines.values() if method == "auto" else ())
        worth_s = (1 - WORTH_APART) * min((c.expected_s for c in baselines.values()), default=float("inf"))
        shorter = [c for c in apart if c.expected_s < min(worth_s, chosen.expected_s) and has_room(problem, c)]
        chosen = min(shorter, key=lambda c: (c.expected_s, c.makespan_s), default=chosen)
        if not aligned:
            bound = tightened(unpinned, bound, chosen.makespan_s, done_share * limit_s)
    return assemble(problem, chosen, baselines, bound, planner_s=clock() - started_s)


def usual_ways_fit(metagraph: MetaGraph, cluster: Cluster, *, aligned: bool = False) -> bool:
    """Whether each of the baselines has a plan within the memory of the devices."""
    try:
        problem = make_problem(metagraph, cluster)
    except InfeasibleError:
        return False
    # where parameters are sharded their components take all devices, so devices are not divided
    names = ("sequential",) if any(metaop.is_sharded for metaop in metagraph) else tuple(WAVES_BY_BASELINE)
    return all(next(_schedules(problem, name, aligned=aligned, is_quick=True), None) for name in names)


def default_limit_s(cluster: Cluster, *, is_warm: bool = False) -> float:
    """Seconds that the search may take unless the user says otherwise; a quarter when it begins from a former plan."""
    limit_s = SMALL_LIMIT_S if cluster.num_devices <= SMALL_CLUSTER else LARGE_LIMIT_S
    return limit_s * (WARM_SHARE if is_warm else 1.0)


def searched(
    problem: Problem,
    bound: Bound,
    work: Work,
    baselines: Mapping[str, Candidate],
    steps: Sequence[MetaGraph],
    *,
    start: Plan | None,
    seed: int,
) -> list[Candidate]:
    """What the search finds, the baselines without their barriers among it."""
    starts = [c.slices for c in baselines.values()]
    carried = carry_over(problem, bound, start) if start else None
    if carried:
        starts.append(carried)
    schedules = search(problem, bound.bound_s, work, seed=seed, starts=starts, is_warm=carried is not None)
    if work.braked:
        warnings.warn(
            "the search was stopped by the clock before its work was done, on a machine too "
            "busy or slow for the limit; another run may give another plan. Give a larger --time-limit",
            SpindleWarning,
            stacklevel=2,
        )
    found = [evaluate(problem, "lp", slices) for slices in schedules]
    if not steps:
        return found
    return [evaluate(problem, "lp", candidate.slices, steps) for candidate in _promising(found)]


def _promising(found: Sequence[Candidate]) -> Iterator[Candidate]:
    """Schedules among the shortest of all found before them, so that what is found later changes nothing."""
    shortest_s: list[float] = []
    for candidate in found:
        insort(shortest_s, candidate.step_s)
        del shortest_s[MOST_SIMULATED:]
        if candidate.step_s <= shortest_s[-1]:
            yield candidate


def evaluate(problem: Problem, method: str, slices: tuple[Slice, ...], steps: Sequence[MetaGraph] = ()) -> Candidate:
    """Cost placed slices in the model that all methods share."""
    makespan_s = max(s.end_s for s in slices)
    draft = _draft(problem, method, slices, makespan_s)
    size, times = best_buckets(draft, problem.metagraph, problem.cluster)
    each_s = steps_s(replace(draft, bucket_bytes=size), steps, problem.cluster)
    return Candidate(method, slices, makespan_s, times.reduction_s, times.update_s, times.step_s, each_s, size)


def assemble(
    problem: Problem, chosen: Candidate, baselines: Mapping[str, Candidate], bound: Bound, *, planner_s: float
) -> Plan:
    """The Plan of a candidate, with all it carries beside the schedule."""
    if bound.bound_s > chosen.makespan_s * (1 + 1e-9):
        raise AssertionError(
            f"a {chosen.method} plan of {chosen.makespan_s} s beats its {bound.kind} bound {bound.bound_s}"
        )
    draft = _draft(problem, chosen.method, chosen.slices, chosen.makespan_s)
    peaks = peak_bytes(problem.metagraph, chosen.slices, problem.num_devices, draft.turn_by_task)
    return replace(
        draft,
        bucket_bytes=chosen.bucket_bytes,
        # the bound is a sum in another order than the makespan: where both are equal it may come out an ulp larger
        lower_bound_s=min(bound.bound_s, chosen.makespan_s),
        planner_s=planner_s,
        baselines_s=sorted_pairs({name: c.makespan_s for name, c in baselines.items()}),
        reduction_s=chosen.reduction_s,
        update_s=chosen.update_s,
        step_s=chosen.step_s,
        baseline_steps_s=sorted_pairs({name: c.step_s for name, c in baselines.items()}),
        memory=Memory(peak_bytes_per_device=peaks, fits=max(peaks) <= problem.cluster.device.memory_bytes),
        certificate=bound.certificate,
        metagraph=without_operators(problem.metagraph),
        cluster=problem.cluster,
        spread=spread_of(chosen.steps_s, {name: c.expected_s for name, c in baselines.items()}),
    )


def fitting(problem: Problem, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """Those within the memory of the devices; all of them where none is. The search counts memory by estimates."""
    return [c for c in candidates if has_room(problem, c)] or candidates


def has_room(problem: Problem, candidate: Candidate) -> bool:
    """Whether a candidate is within the memory of the devices."""
    peaks = peak_bytes(problem.metagraph, candidate.slices, problem.num_devices, numbered(problem.turns))
    return max(peaks) <= problem.cluster.device.memory_bytes


def best(candidates: Iterable[Candidate], baselines: Iterable[Candidate]) -> Candidate:
    """The shortest step on average among candidates that no baseline beats, if possible in makespan neither.

    Where batches differ, the makespan is that of their mean, and does not count.
    """
    baselines = list(baselines)
    makespan_s = min((c.makespan_s for c in baselines if not c.steps_s), default=float("inf"))
    step_s = min((c.expected_s for c in baselines), default=float("inf"))
    return min(
        candidates,
        key=lambda c: (c.expected_s > step_s, c.makespan_s > makespan_s, c.expected_s, c.makespan_s, c.method),
    )


def _draft(problem: Problem, method: str, slices: tuple[Slice, ...], makespan_s: float) -> Plan:
    return Plan(
        num_devices=problem.num_devices,
        devices_per_node=problem.cluster.devices_per_node,
        method=method,
        waves=make_waves(slices),
        makespan_s=makespan_s,
        turns=problem.turns,
    )


def usual_candidates(
    problem: Problem, steps: Sequence[MetaGraph], *, aligned: bool
) -> tuple[dict[str, Candidate], InfeasibleError | None]:
    """The baselines that fit in memory, and why the last of the others does not."""
    found: dict[str, Candidate] = {}
    reasons: list[InfeasibleError] = []
    for name in WAVES_BY_BASELINE:
        for slices in _schedules(problem, name, aligned=aligned, reasons=reasons):
            candidate = evaluate(problem, name, slices, steps)
            if name not in found or candidate.expected_s < found[name].expected_s:
                found[name] = candidate
    return found, reasons[-1] if reasons else None


def _schedules(
    problem: Problem,
    name: Baseline,
    *,
    aligned: bool,
    is_quick: bool = False,
    reasons: list[InfeasibleError] | None = None,
) -> Iterator[tuple[Slice, ...]]:
    """Those of a baseline that fit in memory; why others do not goes to `reasons`. `is_quick`: any will do."""
    has_idle = any(curve.idle for curve in problem.curves)
    variants = WAVES_BY_BASELINE[name]
    makers: list[Callable[[], tuple[Slice, ...]]] = [
        partial(lambda make: place(problem, make(problem), aligned=aligned or name in ALIGNED_BASELINES), make)
        for make in (variants if has_idle else variants[:1])
    ]
    if name == "component_split":  # nor do components on devices of their own wait for each other
        makers.append(lambda: place(problem, component_group_waves(problem), aligned=aligned))
    if name == "paper":
        makers = makers * is_quick + [partial(paper_slices, problem, aligned=aligned)]
    for make in makers:
        try:
            yield make()
        except InfeasibleError as error:
            if reasons is not None:
                reasons.append(error)


def only(problem: Problem, baselines: Mapping[str, Candidate], method: str) -> Candidate:
    """The baseline of this name. Raises InfeasibleError when it does not fit."""
    if method not in baselines:
        found = f"found {', '.join(baselines)} to fit" if baselines else "also searches"
        raise InfeasibleError(
            f"method {method!r} needs more memory than {problem.cluster.device.name!r} has; use method 'auto', which "
            f"{found}"
        )
    return baselines[method]
