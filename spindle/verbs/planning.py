"""Planning: a workload or a spec, and a cluster, in; a plan out, with how sure its prediction is."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, TypedDict, TypeVar

from spindle.values.calibration import Calibration
from spindle.values.cluster import Cluster
from spindle.values.cost_options import CostOptions
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Plan, laid_out, with_fixed
from spindle.values.profile import Profile
from spindle.values.turns import Turns

if TYPE_CHECKING:
    from spindle.verbs.source import Source
    from spindle.workload import Workload


def make_plan(
    workload: "Workload | MetaGraph",
    cluster: Cluster | str,
    *,
    profile: Profile | Path | str | None = None,
    calibration: Calibration | Path | str | None = None,
    method: str = "auto",
    time_limit_s: float | None = None,
    start: Plan | Path | str | None = None,
    pins: Mapping[str, Sequence[int]] | None = None,
) -> Plan:
    """Plan a workload (or a MetaGraph) on a cluster; no device is needed. `print(plan)` is a Gantt chart.

    Where batches of a workload differ in size, some dozens of them are read, and the plan is for their mean.

    `cluster`: a Cluster, `"4x8"`, `"4x8:a100-80g"` or a YAML file. `profile`: measured times, or the file that holds
    them; without it times are predicted from the architecture. `calibration`: factors that were fitted on measured
    steps (`make_calibration`), or the file that holds them. `start`: a former plan, of a workload with other tasks
    for instance, to begin from, which takes a fraction of the time. `pins`: devices by name of a MetaOp or component,
    which then runs on exactly these. Raises InfeasibleError when nothing fits.
    """
    from spindle.files.clusterfile import parse_cluster
    from spindle.verbs.source import Source, source_of

    where = parse_cluster(cluster) if isinstance(cluster, str) else cluster
    source = (
        Source(workload, CostOptions(), executable=True) if isinstance(workload, MetaGraph) else source_of(workload)
    )
    measured, fitted = read_value(profile, Profile), read_value(calibration, Calibration)
    plan, cost_options = plan_source(
        source,
        where,
        measured,
        calibration=fitted,
        method=method,
        time_limit_s=time_limit_s,
        start=read_value(start, Plan),
        pins=pins,
    )
    return with_outlook(plan, source, cost_options, profile=measured, calibration=fitted)


class Common(TypedDict):
    """What plans at once and plans in turns are asked for alike."""

    method: str
    time_limit_s: float | None
    aligned: bool
    start: Plan | None


def plan_source(
    source: "Source",
    cluster: Cluster,
    profile: Profile | None = None,
    *,
    calibration: Calibration | None = None,
    method: str = "auto",
    time_limit_s: float | None = None,
    aligned: bool = False,
    start: Plan | None = None,
    pins: Mapping[str, Sequence[int]] | None = None,
    is_as_run: bool = False,
) -> tuple[Plan, CostOptions]:
    """The plan of a loaded source, and how it wants the workload trained so that it fits.

    The plan says so too, and a run of it does so. `is_as_run`: the constants of the cluster's device are those of
    layers as they are run already, as in the cluster of a plan.
    """
    from spindle.cost.sampled import Costed
    from spindle.planner.choose import solve_fitting
    from spindle.planner.report.rates import work_of
    from spindle.planner.sets import fitted_to_sets
    from spindle.planner.solve import solve, usual_ways_fit
    from spindle.planner.turns import solve_in_turns
    from spindle.verbs.source import costs_on

    common = Common(method=method, time_limit_s=time_limit_s, aligned=aligned, start=start)
    ends_s = perf_counter()  # of the next solve: costs and alternatives are made within the limit

    def end_s(share: float) -> float:
        nonlocal ends_s
        ends_s += share * (time_limit_s or 0.0)
        return ends_s

    def solved(costed: Costed, where: Cluster, share: float) -> Plan:
        plan = solve(costed.metagraph, where, steps=costed.steps, share=share, pins=pins, ends_s=end_s(share), **common)
        return laid_out(plan, costed.metagraph)

    def in_turns(costed: Costed, where: Cluster, share: float, turns: Turns) -> Plan:
        plan = solve_in_turns(
            costed.metagraph, where, turns, steps=costed.steps, share=share, ends_s=end_s(share), **common
        )
        return laid_out(plan, costed.metagraph)

    cluster, cost_options = costs_on(source, cluster, profile, calibration, is_as_run=is_as_run)
    plan, cost_options = solve_fitting(
        source.metagraph,
        cluster,
        solved,
        profile=profile,
        cost_options=cost_options,
        steps=source.steps,
        is_mean=source.is_mean,
        all_fit=partial(usual_ways_fit, aligned=aligned) if method in ("auto", "lp") and not pins else None,
        in_turns=None if pins else in_turns,
        with_alternatives=True,
    )
    plan = replace(
        plan,
        recompute=cost_options.recompute,
        shard_optimizer=cost_options.shard_optimizer,
        shard_parameters=cost_options.shard_parameters,
        sizes=source.sizes,
        work=work_of(source.metagraph),
        workload=source.name,
    )
    plan = fitted_to_sets(plan, source.presences, may_change=method == "auto" and not pins and not aligned)
    return with_fixed(plan, calibration.step_s) if calibration else plan, cost_options


def with_outlook(
    plan: Plan,
    source: "Source",
    cost_options: CostOptions,
    *,
    profile: Profile | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """The plan with how sure its step and its gain are; it is costed again some twenty times, and not searched."""
    from fractions import Fraction

    from spindle.planner.recost import Costs
    from spindle.planner.report.outlook import outlook_of
    from spindle.verbs.source import scaled_source

    assert plan.cluster is not None, "a plan that was made just now carries its cluster"

    def costs(source: "Source") -> Costs:
        assert plan.cluster is not None
        return Costs(source.metagraph, plan.cluster, cost_options, profile, source.steps, source.is_mean)

    def on_batches(factor: Fraction) -> Costs | None:
        other = scaled_source(source, factor)
        return costs(other) if other else None

    found = outlook_of(
        plan,
        costs(source),
        on_batches,
        calibration=calibration,
        can_profile=source.executable and any(metaop.operators for metaop in source.metagraph),
    )
    return replace(plan, outlook=found)


def make_metagraph(workload: "Workload") -> MetaGraph:
    """The MetaGraph of a workload, without costs yet."""
    from spindle.capture import capture
    from spindle.values.contract import contract

    return contract(capture(workload).graph)


ReadT = TypeVar("ReadT", Plan, Profile, Calibration)


def read_value(value: ReadT | Path | str | None, kind: type[ReadT]) -> ReadT | None:
    """A value as it is, or the file that holds it."""
    if value is None or isinstance(value, kind):
        return value
    from spindle.files.formats import read

    assert isinstance(value, Path | str)
    return read(value, kind)
