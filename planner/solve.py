"""Solve: a priced MetaGraph and a cluster in, a Plan out.

- Every plan carries the makespans of the usual ways in the same cost model, the lower bound with its certificate, and
  the memory of each device.
- `auto` returns the best of all methods; it is never slower than a usual way, in makespan and in the whole step.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal, get_args

from spindle.cluster import Cluster
from spindle.errors import InfeasibleError, PlanError
from spindle.metagraph import MetaGraph
from spindle.plan import Memory, Plan, Slice, make_waves, sorted_pairs, without_operators
from spindle.planner.baselines import ALIGNED_BASELINES, WAVES_BY_BASELINE
from spindle.planner.bound import Bound, lower_bound
from spindle.planner.memory import peak_bytes
from spindle.planner.place import place
from spindle.planner.problem import Problem, make_problem
from spindle.planner.simulate import forward_backward_s
from spindle.planner.traffic import reduction_s

Method = Literal["auto", "lp", "paper", "sequential", "task_split", "component_split"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placed schedule: slices in order of start, its makespan, and the whole step it predicts."""

    method: str
    slices: tuple[Slice, ...]
    makespan_s: float
    reduction_s: float
    step_s: float


def solve(
    metagraph: MetaGraph,
    cluster: Cluster,
    *,
    method: str = "auto",
    time_limit_s: float | None = None,
    seed: int = 0,
    aligned: bool = False,
    clock: Callable[[], float] = perf_counter,
) -> Plan:
    """Plan `metagraph` on `cluster`.

    `aligned` asks for strict waves: no slice starts before all slices of the wave in front have ended. Raises PlanError
    for a method that does not exist, InfeasibleError when no plan exists. The same input gives the same plan, apart
    from `planner_s`.
    """
    started_s = clock()
    if method not in METHODS:
        raise PlanError(f"method {method!r} is not known; choose one of {', '.join(METHODS)}")
    problem = make_problem(metagraph, cluster)
    baselines = _baselines(problem, aligned=aligned)
    if method in WAVES_BY_BASELINE:
        chosen = _only(problem, baselines, method)
    else:
        chosen = best(baselines.values(), baselines.values())
    return assemble(problem, chosen, baselines, lower_bound(problem), planner_s=clock() - started_s)


def evaluate(problem: Problem, method: str, slices: tuple[Slice, ...]) -> Candidate:
    """Cost placed slices in the model that all methods share."""
    makespan_s = max(s.end_s for s in slices)
    reduce_s = reduction_s(problem.cluster, problem.metagraph, slices)
    draft = _draft(problem, method, slices, makespan_s)
    both_s = forward_backward_s(draft, problem.metagraph, problem.cluster)
    return Candidate(method, slices, makespan_s, reduce_s, both_s + reduce_s)


def assemble(
    problem: Problem, chosen: Candidate, baselines: Mapping[str, Candidate], bound: Bound, *, planner_s: float
) -> Plan:
    """The Plan of a candidate, with all it carries beside the schedule."""
    if bound.bound_s > chosen.makespan_s * (1 + 1e-9):
        raise AssertionError(
            f"a {chosen.method} plan of {chosen.makespan_s} s beats its {bound.kind} bound {bound.bound_s}"
        )
    peaks = peak_bytes(problem.metagraph, chosen.slices, problem.num_devices)
    return replace(
        _draft(problem, chosen.method, chosen.slices, chosen.makespan_s),
        # the bound is a sum in another order than the makespan: where both are equal it may come out an ulp larger
        lower_bound_s=min(bound.bound_s, chosen.makespan_s),
        planner_s=planner_s,
        baselines_s=sorted_pairs({name: c.makespan_s for name, c in baselines.items()}),
        reduction_s=chosen.reduction_s,
        step_s=chosen.step_s,
        baseline_steps_s=sorted_pairs({name: c.step_s for name, c in baselines.items()}),
        memory=Memory(peak_bytes_per_device=peaks, fits=max(peaks) <= problem.cluster.device.memory_bytes),
        certificate=bound.certificate,
        metagraph=without_operators(problem.metagraph),
        cluster=problem.cluster,
    )


def best(candidates: Iterable[Candidate], baselines: Iterable[Candidate]) -> Candidate:
    """The shortest step among candidates that no baseline beats in makespan; else the shortest makespan."""
    baselines = list(baselines)
    makespan_s = min((c.makespan_s for c in baselines), default=float("inf"))
    step_s = min((c.step_s for c in baselines), default=float("inf"))
    return min(
        candidates, key=lambda c: (c.makespan_s > makespan_s, c.step_s > step_s, c.step_s, c.makespan_s, c.method)
    )


def _draft(problem: Problem, method: str, slices: tuple[Slice, ...], makespan_s: float) -> Plan:
    return Plan(
        num_devices=problem.num_devices,
        devices_per_node=problem.cluster.devices_per_node,
        method=method,
        waves=make_waves(slices),
        makespan_s=makespan_s,
    )


def _baselines(problem: Problem, *, aligned: bool) -> dict[str, Candidate]:
    """The usual ways that fit in memory; raises InfeasibleError when none does."""
    found: dict[str, Candidate] = {}
    reason: InfeasibleError | None = None
    for name, make in WAVES_BY_BASELINE.items():
        try:
            slices = place(problem, make(problem), aligned=aligned or name in ALIGNED_BASELINES)
        except InfeasibleError as error:
            reason = error
        else:
            found[name] = evaluate(problem, name, slices)
    if not found and reason:
        raise reason
    return found


def _only(problem: Problem, baselines: Mapping[str, Candidate], method: str) -> Candidate:
    if method not in baselines:
        raise InfeasibleError(
            f"method {method!r} needs more memory than {problem.cluster.device.name!r} has; use method 'auto', which "
            f"found {', '.join(baselines)} to fit"
        )
    return baselines[method]
