import pytest

from spindle.errors import InfeasibleError, PlanError
from spindle.planner.bounds.bound import lower_bound
from spindle.planner.change import carry_over, pinned
from spindle.planner.check import check_plan
from spindle.planner.problem import make_problem
from spindle.planner.solve import solve
from spindle.values.metagraph import MetaGraph
from tests.planner.planner_graphs import cluster, graph, metaop

TIMES = {1: 4.0, 2: 2.2, 4: 1.3}
WHOLE = graph(
    *(metaop(f"{t}.{part}", 4, TIMES, output_bytes=0.01) for t in "xyz" for part in ("enc", "head")),
    flows="x.enc>x.head y.enc>y.head z.enc>z.head",
)
WITHOUT_Z = MetaGraph(WHOLE.metaops[:4], WHOLE.flows[:2])


@pytest.mark.parametrize(("before", "after"), [(WHOLE, WITHOUT_Z), (WITHOUT_Z, WHOLE)])
def test_a_plan_for_other_tasks_begins_with_the_former_one(before: MetaGraph, after: MetaGraph) -> None:
    """One task leaves, or joins: what stays is taken over, and the new plan keeps all rules."""
    former = solve(before, cluster(2, 2), method="lp", time_limit_s=0.05)
    made = solve(after, cluster(2, 2), start=former, time_limit_s=0.05)
    assert check_plan(made) == ()
    assert {s.metaop for s in made.slices} == set(after.by_name)


def test_an_unchanged_plan_is_carried_over_as_it_is() -> None:
    former = solve(WHOLE, cluster(2, 2), method="lp", time_limit_s=0.05)
    problem = make_problem(WHOLE, cluster(2, 2))
    carried = carry_over(problem, lower_bound(problem), former)
    assert carried is not None
    assert max(s.end_s for s in carried) <= former.makespan_s * (1 + 1e-9)


def test_a_start_is_never_lost() -> None:
    """Without any time to search, the former plan is as good as the new one."""
    former = solve(WHOLE, cluster(2, 2), method="lp", time_limit_s=0.3)
    again = solve(WHOLE, cluster(2, 2), method="lp", start=former, time_limit_s=0.0)
    assert again.step_s <= former.step_s * (1 + 1e-9)


def test_a_pinned_component_stays_where_it_is_put() -> None:
    """Both heads of the component run on devices 2 and 3 only."""
    made = solve(WHOLE, cluster(2, 2), pins={"head": (2, 3)}, time_limit_s=0.05)
    assert check_plan(made) == ()
    assert {s.devices for s in made.slices if s.metaop.endswith("head")} == {(2, 3)}
    assert made.baselines_s == ()


def test_a_pin_by_metaop_wins_no_devices_for_others() -> None:
    made = solve(WHOLE, cluster(2, 2), pins={"x.enc": (3,)}, time_limit_s=0.05)
    assert {s.devices for s in made.slices if s.metaop == "x.enc"} == {(3,)}
    assert check_plan(made) == ()


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"nothing": (0,)}, "pin 'nothing' names no component of this workload; the components are"),
        ({"x.enc": (0, 9)}, r"pin 'x.enc' wants devices \[0, 9\]; name each once, from 0 to 3"),
        ({"x.enc": (1, 1)}, "name each once"),
        ({"x.enc": ()}, "name each once"),
        ({"x.enc": (0, 1, 2)}, "3 devices; it runs on 1, 2, 4"),
    ],
)
def test_pins_that_cannot_be_kept_are_refused(pins: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        pinned(make_problem(WHOLE, cluster(2, 2)), pins)


def test_the_usual_ways_know_no_pins() -> None:
    with pytest.raises(PlanError, match="pins are kept by methods auto and lp"):
        solve(WHOLE, cluster(2, 2), method="paper", pins={"x.enc": (0,)})


def test_pins_that_memory_forbids() -> None:
    metagraph = graph(*(metaop(f"t.{i}", 1, {1: 1.0}, memory={1: 60.0}) for i in "ab"))
    with pytest.raises(InfeasibleError, match="no plan keeps the pins"):
        solve(metagraph, cluster(1, 2, memory_bytes=100), pins={"t.a": (0,), "t.b": (0,)}, time_limit_s=0.05)
