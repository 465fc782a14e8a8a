"""Spread: how long steps of a plan take whose batches differ, and that the plan is chosen by them."""

import pytest

from spindle.planner.report.render import render
from spindle.planner.simulate import step_times
from spindle.planner.solve import solve
from spindle.planner.spread import spread_of, steps_s
from spindle.values.metagraph import MetaGraph
from tests.planner.planner_graphs import cluster, graph, metaop, piece, plan

MADE = plan(piece("a", range(1), (0,), 0, 3), metagraph=graph(metaop("a", times={1: 3.0})))


def test_a_plan_without_steps_has_none() -> None:
    """Its batches are alike."""
    assert spread_of((), {}) is None
    assert solve(graph(metaop("a", times={1: 3.0})), cluster(1, 1)).spread is None


def test_one_step_is_all_there_is() -> None:
    """Mean and percentiles are its time."""
    seconds = steps_s(MADE, [graph(metaop("a", times={1: 3.0}))], cluster(1, 1))
    found = spread_of(seconds, {})
    assert found is not None
    assert (found.steps, found.mean_s, found.p10_s, found.p90_s) == (1, 3.0, 3.0, 3.0)


def test_percentiles_of_eleven_steps() -> None:
    """1 to 11 seconds: a tenth is at most 2, a tenth at least 10."""
    steps = [graph(metaop("a", times={1: float(seconds)})) for seconds in range(1, 12)]
    found = spread_of(steps_s(MADE, steps, cluster(1, 1)), {"sequential": 7.0})
    assert found is not None
    assert (found.steps, found.mean_s, found.p10_s, found.p90_s) == (11, 6.0, 2.0, 10.0)
    assert found.baselines_s == (("sequential", 7.0),)
    assert found.p90_s == pytest.approx(step_times(MADE, steps[9], cluster(1, 1)).step_s)


def two_tasks(a: float, b: float) -> MetaGraph:
    """Two tasks that run a tenth faster side by side on a device each than one after another on both."""
    return graph(
        metaop("a.x", times={1: a, 2: a * 0.55}),
        metaop("b.x", times={1: b, 2: b * 0.55}),
    )


def test_waves_that_gain_on_the_mean_alone_are_not_chosen() -> None:
    """Side by side both take 10 s of the mean, in turn 11; but where one is long the other is short, and then 15."""
    steps = [two_tasks(15.0, 5.0), two_tasks(5.0, 15.0)]
    mean = two_tasks(10.0, 10.0)
    alike = solve(mean, cluster(1, 2), time_limit_s=0.05)
    assert alike.makespan_s == pytest.approx(10.0)
    chosen = solve(mean, cluster(1, 2), steps=steps, time_limit_s=0.05)
    assert chosen.spread is not None
    assert chosen.spread.mean_s == pytest.approx(11.0)
    assert chosen.makespan_s == pytest.approx(11.0)
    assert chosen.compared_s == chosen.spread.mean_s
    assert dict(chosen.usual_ways)["task_split"] == pytest.approx(15.0)
    assert "waves gain nothing here" in render(chosen)


def test_no_usual_way_is_shorter_on_average() -> None:
    """Whatever the steps are."""
    steps = [two_tasks(12.0, 9.0), two_tasks(8.0, 11.0), two_tasks(10.0, 10.0)]
    chosen = solve(two_tasks(10.0, 10.0), cluster(1, 2), steps=steps, time_limit_s=0.05)
    assert all(chosen.compared_s <= seconds * (1 + 1e-9) for _, seconds in chosen.usual_ways)
