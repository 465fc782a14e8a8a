"""Laws of every plan that any method makes of any MetaGraph."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spindle.errors import InfeasibleError
from spindle.files.formats import dumps, loads
from spindle.planner.baselines.allocate import allocate, optimum_by_bisection, optimum_by_lp
from spindle.planner.baselines.baselines import WAVES_BY_BASELINE, Baseline
from spindle.planner.baselines.place import place
from spindle.planner.check import check_plan
from spindle.planner.costing.curves import clean_curve
from spindle.planner.problem import make_problem
from spindle.planner.report.figures import WIDTH
from spindle.planner.report.render import render
from spindle.planner.solve import evaluate, solve
from spindle.planner.turns import smallest_turns, solve_in_turns
from spindle.values.cluster import Cluster
from spindle.values.metagraph import MetaGraph, MetaOp, points
from spindle.values.plan import Plan
from tests.laws.planner_strategies import clusters, metagraphs, times

FIXED = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
BASELINES: list[Baseline] = sorted(WAVES_BY_BASELINE)


def findings(plan: Plan) -> list[str]:
    return [str(finding) for finding in check_plan(plan)]


@settings(FIXED, max_examples=100)
@given(metagraphs(), clusters(), st.sampled_from(BASELINES), st.booleans())
def test_every_baseline_keeps_the_rules_or_says_why_not(
    metagraph: MetaGraph, cluster: Cluster, method: Baseline, aligned: bool
) -> None:
    """Counts above the cluster are infeasible; all else has a plan that the independent check accepts."""
    too_wide = any(min(m.times) > cluster.num_devices for m in metagraph)
    try:
        plan = solve(metagraph, cluster, method=method, aligned=aligned)
    except InfeasibleError:
        assert too_wide
        return
    assert not too_wide
    assert findings(plan) == []
    assert plan.lower_bound_s <= plan.makespan_s
    assert max(map(len, render(plan).splitlines())) <= WIDTH


@settings(FIXED, max_examples=40)
@given(metagraphs(plannable=1, memory=True), clusters(), st.sampled_from(("auto", "sequential")), st.floats(0, 1e9))
def test_every_plan_in_turns_keeps_the_rules(
    whole: MetaGraph, cluster: Cluster, method: str, kept_bytes: float
) -> None:
    """Tasks by themselves, in the smallest turns; memory may be too short for that too."""
    flows = tuple(f for f in whole.flows if whole[f.source].task == whole[f.target].task)
    metagraph = MetaGraph(tuple(replace(m, kept_bytes=kept_bytes) for m in whole), flows)
    turns = smallest_turns(metagraph)
    assert turns == tuple((task,) for task in metagraph.tasks)
    if len(turns) < 2:
        return
    try:
        plan = solve_in_turns(metagraph, cluster, turns, method=method, time_limit_s=0.01)
    except InfeasibleError:
        assert any(m.memory_bytes for m in metagraph)
        return
    overflows = [] if plan.memory.fits else [text for text in findings(plan) if "overflow" in text]
    assert findings(plan) == overflows
    assert plan.lower_bound_s <= plan.makespan_s
    assert loads(dumps(plan), Plan) == plan
    assert max(map(len, render(plan).splitlines())) <= WIDTH


@settings(FIXED, max_examples=60)
@given(metagraphs(plannable=1), clusters())
def test_plans_survive_a_file(metagraph: MetaGraph, cluster: Cluster) -> None:
    plan = solve(metagraph, cluster, method="paper")
    assert loads(dumps(plan), Plan) == plan


@settings(FIXED, max_examples=100)
@given(
    st.lists(st.tuples(times(), st.integers(1, 9)), min_size=1, max_size=6),
    st.sampled_from((1, 2, 3, 8, 16)),
)
def test_lp_and_bisection_give_one_optimum(chains: list[tuple[dict[int, float], int]], num_devices: int) -> None:
    """The relaxed problem of a MetaLevel has one optimum, whatever finds it."""
    curves, layers = [], []
    for seconds, num_layers in chains:
        seconds.setdefault(1, 10.0)
        metaop = MetaOp(name="a", task="t", component="a", layers=num_layers, layer_time_s=points(seconds))
        curves.append(clean_curve(metaop, num_devices).hull)
        layers.append(num_layers)
    by_bisection = optimum_by_bisection(curves, layers, num_devices)
    assert optimum_by_lp(curves, layers, num_devices) == pytest.approx(by_bisection, rel=1e-6)


@settings(FIXED, max_examples=100)
@given(
    st.lists(st.tuples(times(), st.integers(1, 9)), min_size=1, max_size=6),
    st.sampled_from((1, 2, 3, 8, 16)),
)
def test_allocations_keep_layers_and_devices(chains: list[tuple[dict[int, float], int]], num_devices: int) -> None:
    """Tuples hold every layer, counts are valid, shares fit the devices."""
    curves, layers = [], []
    for seconds, num_layers in chains:
        seconds.setdefault(1, 10.0)
        metaop = MetaOp(name="a", task="t", component="a", layers=num_layers, layer_time_s=points(seconds))
        curves.append(clean_curve(metaop, num_devices))
        layers.append(num_layers)
    allocation = allocate(curves, layers, num_devices)
    assert sum(allocation.shares) <= num_devices * (1 + 1e-6)
    for curve, num_layers, tuples in zip(curves, layers, allocation.tuples, strict=True):
        assert sum(t.layers for t in tuples) == num_layers
        assert {t.count for t in tuples} <= set(curve.counts)


@settings(FIXED, max_examples=60)
@given(metagraphs(traffic=False, plannable=1), clusters(), st.sampled_from(BASELINES))
def test_simulation_agrees_with_the_plan(metagraph: MetaGraph, cluster: Cluster, method: Baseline) -> None:
    """Without traffic and with one forward share, a plan whose slices start when they can takes its makespan."""
    problem = make_problem(metagraph, cluster)
    free = evaluate(problem, method, place(problem, WAVES_BY_BASELINE[method][0](problem), aligned=False))
    assert free.step_s == pytest.approx(free.makespan_s, rel=1e-9)
    strict = evaluate(problem, method, place(problem, WAVES_BY_BASELINE[method][0](problem), aligned=True))
    assert strict.step_s <= strict.makespan_s * (1 + 1e-9)


@settings(FIXED, max_examples=500)
@given(metagraphs(memory=True), clusters())
def test_every_searched_plan_keeps_the_rules(metagraph: MetaGraph, cluster: Cluster) -> None:
    """Whatever the curves: a plan that passes the check, no shorter than the bound, no longer than a baseline."""
    too_wide = any(min(m.times) > cluster.num_devices for m in metagraph)
    try:
        plan = solve(metagraph, cluster, time_limit_s=0.003)
    except InfeasibleError:
        assert too_wide or any(m.memory_bytes for m in metagraph)
        return
    assert not too_wide
    assert findings(plan) == []
    assert plan.lower_bound_s <= plan.makespan_s
    assert all(plan.step_s <= seconds * (1 + 1e-9) for _, seconds in plan.baseline_steps_s)
    if not any(m.layer_param_bytes or m.output_bytes for m in metagraph):
        assert all(plan.makespan_s <= seconds * (1 + 1e-9) for _, seconds in plan.baselines_s)


@settings(FIXED, max_examples=60)
@given(metagraphs(plannable=1, traffic=False), clusters())
def test_searched_plans_take_what_they_say(metagraph: MetaGraph, cluster: Cluster) -> None:
    """Without traffic the simulator finds the makespan of a searched plan, and auto's step beats all baselines."""
    searched = solve(metagraph, cluster, method="lp", time_limit_s=0.003)
    assert searched.step_s == pytest.approx(searched.makespan_s, rel=1e-9)
    plan = solve(metagraph, cluster, time_limit_s=0.003)
    assert plan.step_s <= min(seconds for _, seconds in plan.baseline_steps_s) * (1 + 1e-9)


@settings(FIXED, max_examples=40)
@given(metagraphs(plannable=1, memory=True), clusters())
def test_the_same_input_gives_the_same_bytes(metagraph: MetaGraph, cluster: Cluster) -> None:
    """Work is counted, not timed."""
    try:
        first, second = (solve(metagraph, cluster, time_limit_s=0.01) for _ in range(2))
    except InfeasibleError:
        return
    assert dumps(replace(first, planner_s=0.0)) == dumps(replace(second, planner_s=0.0))


@settings(FIXED, max_examples=60)
@given(metagraphs(plannable=1), clusters())
def test_metaops_do_not_care_for_their_order_in_the_file(metagraph: MetaGraph, cluster: Cluster) -> None:
    """The bound depends on the graph, not on how it is written down."""
    turned = MetaGraph(metagraph.metaops[::-1], metagraph.flows[::-1])
    bounds = [solve(g, cluster, method="sequential").lower_bound_s for g in (metagraph, turned)]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-6)
