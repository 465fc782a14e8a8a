"""Spread: how long steps of a plan take whose batches differ."""

import pytest

from spindle.planner.simulate import step_times
from spindle.planner.spread import step_spread
from tests.planner.planner_graphs import cluster, graph, metaop, piece, plan

MADE = plan(piece("a", range(1), (0,), 0, 3), metagraph=graph(metaop("a", times={1: 3.0})))


def test_a_plan_without_steps_has_none() -> None:
    """Its batches are alike."""
    assert step_spread(MADE, [], cluster(1, 1)) is None


def test_one_step_is_all_there_is() -> None:
    """Mean and percentiles are its time."""
    found = step_spread(MADE, [graph(metaop("a", times={1: 3.0}))], cluster(1, 1))
    assert found is not None
    assert (found.steps, found.mean_s, found.p10_s, found.p90_s) == (1, 3.0, 3.0, 3.0)


def test_percentiles_of_eleven_steps() -> None:
    """1 to 11 seconds: a tenth is at most 2, a tenth at least 10."""
    steps = [graph(metaop("a", times={1: float(seconds)})) for seconds in range(1, 12)]
    found = step_spread(MADE, steps, cluster(1, 1))
    assert found is not None
    assert (found.steps, found.mean_s, found.p10_s, found.p90_s) == (11, 6.0, 2.0, 10.0)
    assert found.p90_s == pytest.approx(step_times(MADE, steps[9], cluster(1, 1)).step_s)
