from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spindle.errors import PlanError
from spindle.planner.report.explain import explain
from spindle.planner.report.explained import render_explanation
from spindle.planner.report.figures import WIDTH
from spindle.planner.solve import solve
from spindle.values.cluster import Cluster
from spindle.values.metagraph import MetaGraph
from tests.laws.planner_strategies import clusters, metagraphs
from tests.planner.planner_graphs import cluster, graph, metaop


@settings(derandomize=True, deadline=None, max_examples=60)
@given(metagraphs(plannable=1), clusters(), st.sampled_from(("lp", "paper", "sequential")))
def test_the_causes_of_the_gap_add_up(metagraph: MetaGraph, where: Cluster, method: str) -> None:
    """Idle, waiting, wrong counts and transfers are the whole distance from the bound that the prices prove."""
    found = explain(solve(metagraph, where, method=method, time_limit_s=0.003))
    gap_s = found.makespan_s - found.priced_bound_s
    assert sum(seconds for _, seconds in found.gap_s) == pytest.approx(gap_s, abs=1e-6 * found.makespan_s)
    assert all(seconds >= -1e-6 * found.makespan_s for _, seconds in found.gap_s)
    assert found.priced_bound_s <= found.lower_bound_s * (1 + 1e-9)
    assert max(map(len, render_explanation(found).splitlines())) <= WIDTH


def test_idle_time_is_found_where_it_is() -> None:
    """a runs 2 s on device 0 while three devices idle; then b takes all four for 1 s."""
    metagraph = graph(metaop("t.a", 1, {1: 2.0}), metaop("t.b", 1, {4: 1.0}), flows="t.a>t.b")
    found = explain(solve(metagraph, cluster()))
    assert dict(found.idle_s) == pytest.approx(
        {"before the first slice": 6.0, "between slices": 0.0, "after the last slice": 0.0}
    )
    assert found.windows[0].devices == 3
    assert found.windows[0].until == "t.b[0:1] x4 waits for t.a"
    assert found.critical == ("t.a[0:1] x1", "t.b[0:1] x4")


def test_each_metaop_has_a_reason() -> None:
    metagraph = graph(metaop("t.a", 4, {1: 2.0, 2: 1.1, 4: 1.0}), metaop("t.only", 2, {2: 1.0}))
    reasons = {m.name: m for m in explain(solve(metagraph, cluster())).metaops}
    assert reasons["t.only"].reason == "the only useful number"
    assert sum(layers for _, layers in reasons["t.a"].counts) == 4


def test_a_plan_without_costs_cannot_be_explained() -> None:
    plan = replace(solve(graph(metaop("t.a")), cluster()), metagraph=None)
    with pytest.raises(PlanError, match="carries no MetaGraph"):
        explain(plan)


def test_what_no_schedule_can_save_is_told_apart() -> None:
    """Two of four devices idle while a.in and b.in run: half a second over 4.5 s that only prices over time prove."""
    inputs = (metaop(name, 1, {1: 1.0}) for name in ("a.in", "b.in"))
    outputs = (metaop(name, 4, {1: 2.0, 2: 1.0, 4: 0.5}) for name in ("a.out", "b.out"))
    metagraph = graph(*inputs, *outputs, flows="a.in>a.out b.in>b.out")
    found = explain(solve(metagraph, cluster()))
    assert found.over_time
    assert found.priced_bound_s == pytest.approx(4.5)
    rest_ms = 1e3 * (found.lower_bound_s - 4.5)
    text = " ".join(render_explanation(found).split())
    assert f"Of that, no schedule can save {rest_ms:.3f} ms: the table counts from a simpler bound of 4.50 s" in text
