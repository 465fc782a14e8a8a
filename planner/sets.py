"""Sets: a plan of all tasks, and how often each takes part, in; what steps with fewer tasks take, out.

A run has one plan. In a step without some task the slices of that task are left out, and what waited for them or for
their devices starts earlier; parameters that no task of the step uses are neither reduced nor updated.
"""

from collections.abc import Sequence
from dataclasses import replace

from spindle.errors import InfeasibleError
from spindle.planner.simulate import step_times
from spindle.planner.solve import Method, solve
from spindle.planner.turns import solve_in_turns
from spindle.values.cluster import Cluster
from spindle.values.graph import base_task
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Plan, SetStep, make_waves
from spindle.values.presence import Presence, TaskSet, task_sets

STEADY: tuple[Method, ...] = ("sequential", "component_split")
"""Baselines that lose nothing where a task is absent, since no task runs beside another."""


def fitted_to_sets(plan: Plan, presences: Sequence[Presence], *, may_change: bool) -> Plan:
    """The plan with the steps of each set of tasks; where it `may_change`, a baseline with a shorter expected step.

    Waves in which tasks share the devices leave gaps when one of them is absent. As it is when each step has all tasks.
    """
    if plan.metagraph is None or plan.cluster is None or all(presence.is_constant for presence in presences):
        return plan
    found = task_sets(presences)
    usual = {method: other for method in STEADY if (other := _usual(plan, plan.metagraph, plan.cluster, method))}
    sequential = usual.get("sequential")
    ways = [plan, *(usual.values() if may_change else ())]
    best = min((_with_sets(way, plan.metagraph, plan.cluster, found, sequential) for way in ways), key=_expected_s)
    return replace(plan, **{name: getattr(best, name) for name in TAKEN_OVER}) if best.waves != plan.waves else best


TAKEN_OVER = ("method", "waves", "makespan_s", "reduction_s", "update_s", "step_s", "memory", "spread", "task_sets")
"""What another way to run the same MetaGraph changes of a plan; the bound and the baselines stay."""


def _expected_s(plan: Plan) -> float:
    return sum(each.share * each.step_s for each in plan.task_sets)


def _with_sets(
    plan: Plan, metagraph: MetaGraph, cluster: Cluster, sets: Sequence[TaskSet], sequential: Plan | None
) -> Plan:
    steps = tuple(
        SetStep(
            share=each.share,
            tasks=each.tasks,
            step_s=_step_s(plan, metagraph, cluster, each.tasks),
            sequential_s=_step_s(sequential, metagraph, cluster, each.tasks) if sequential else 0.0,
        )
        for each in sets
    )
    return replace(plan, task_sets=steps)


def _usual(plan: Plan, metagraph: MetaGraph, cluster: Cluster, method: Method) -> Plan | None:
    """A baseline at once, or in the plan's turns."""
    try:
        if plan.turns:
            return solve_in_turns(metagraph, cluster, plan.turns, method=method, time_limit_s=0)
        return solve(metagraph, cluster, method=method, time_limit_s=0)
    except InfeasibleError:
        return None


def _step_s(plan: Plan, metagraph: MetaGraph, cluster: Cluster, tasks: Sequence[str]) -> float:
    """Seconds of a step that has only these tasks."""
    here = {metaop.name for metaop in metagraph if base_task(metaop.task) in tasks}
    if not here:
        return 0.0
    slices = [s for s in plan.slices if s.metaop in here]
    return step_times(replace(plan, waves=make_waves(slices)), metagraph.only(here), cluster).step_s
