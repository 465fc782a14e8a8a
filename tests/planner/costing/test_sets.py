"""Sets of tasks: what steps take in which only some tasks take part, and which way is the shortest on average."""

from dataclasses import replace

import pytest

from spindle.files.formats import dumps, loads
from spindle.planner.report.render import summary
from spindle.planner.sets import fitted_to_sets
from spindle.planner.solve import solve
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import Plan
from spindle.values.presence import Presence, task_sets
from tests.planner.planner_graphs import cluster, graph, metaop, piece, plan

SHARES = [
    ([Presence(task="a")], {("a",): 1.0}),
    ([Presence(task="a"), Presence(task="b", probability=0.25)], {("a",): 0.75, ("a", "b"): 0.25}),
    ([Presence(task="a", every=2), Presence(task="b", every=3)], {("a", "b"): 1, ("a",): 2, ("b",): 1, (): 2}),
    ([Presence(task="a", every=2), Presence(task="b", every=4)], {("a", "b"): 1, ("a",): 1, (): 2}),
]


@pytest.mark.parametrize(("presences", "shares"), SHARES)
def test_shares_of_sets(presences: list[Presence], shares: dict[tuple[str, ...], float]) -> None:
    """Tasks of a probability are independent; those of a period meet every so many steps."""
    total = sum(shares.values())
    assert {each.tasks: each.share for each in task_sets(presences)} == {
        tasks: pytest.approx(share / total) for tasks, share in shares.items()
    }


def test_shares_sum_to_one_also_where_steps_are_drawn() -> None:
    """Twelve tasks have 4096 sets; each task is in as many of the drawn steps as its probability says."""
    presences = [Presence(task=f"t{i}", probability=0.5) for i in range(12)]
    found = task_sets(presences)
    assert sum(each.share for each in found) == pytest.approx(1.0)
    for presence in presences:
        assert sum(each.share for each in found if presence.task in each.tasks) == pytest.approx(0.5, abs=0.12)


def both(metagraph: MetaGraph) -> Plan:
    """a and b side by side for four seconds, on two devices each."""
    made = plan(piece("a", range(1), (0, 1), 0, 4), piece("b", range(1), (2, 3), 0, 4), metagraph=metagraph)
    return replace(made, cluster=cluster(), metagraph=metagraph, step_s=4.0)


TWO = graph(metaop("a"), metaop("b"))


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
def test_on_one_device_a_task_adds_its_share_of_its_cost(chance: float) -> None:
    """The expected step is the sum of probability times cost (row 37)."""
    metagraph = graph(metaop("a", times={1: 3.0}), metaop("b", times={1: 5.0}))
    made = solve(metagraph, cluster(1, 1), time_limit_s=0.1)
    found = fitted_to_sets(made, [Presence(task="a"), Presence(task="b", probability=chance)], may_change=True)
    assert sum(each.share * each.step_s for each in found.task_sets) == pytest.approx(3 + 5 * chance)


def test_absent_tasks_leave_gaps_beside_others() -> None:
    """Side by side each step takes 4 s; one after another on all devices 4 s with both, and 2 s with one."""
    presences = [Presence(task="a"), Presence(task="b", probability=0.5)]
    kept = fitted_to_sets(both(TWO), presences, may_change=False)
    assert {each.tasks: each.step_s for each in kept.task_sets} == {("a", "b"): 4.0, ("a",): 4.0}
    assert {each.tasks: each.sequential_s for each in kept.task_sets} == {("a", "b"): 4.0, ("a",): 2.0}
    assert kept.method == "hand"
    changed = fitted_to_sets(both(TWO), presences, may_change=True)
    assert changed.method == "sequential"
    assert sum(each.share * each.step_s for each in changed.task_sets) == pytest.approx(3.0)


def test_a_plan_that_is_no_longer_than_usual_ways_stays() -> None:
    """With all tasks in every step, or nearly, there is nothing to change."""
    assert fitted_to_sets(both(TWO), [Presence(task="a"), Presence(task="b")], may_change=True) == both(TWO)
    slow = graph(metaop("a", times={1: 8.0, 2: 4.0}), metaop("b", times={1: 8.0, 2: 4.0}))
    presences = [Presence(task="a"), Presence(task="b", probability=0.9)]
    assert fitted_to_sets(both(slow), presences, may_change=True).method == "hand"


def test_micro_batches_go_with_their_task() -> None:
    metagraph = graph(metaop("a", times={1: 3.0}), metaop("a#1", times={1: 3.0}), metaop("b", times={1: 5.0}))
    made = solve(metagraph, cluster(1, 1), time_limit_s=0.1)
    found = fitted_to_sets(made, [Presence(task="a", every=2), Presence(task="b")], may_change=True)
    assert {each.tasks: each.step_s for each in found.task_sets} == {("a", "b"): 11.0, ("b",): 5.0}


def test_sets_are_printed_and_kept_in_the_file() -> None:
    found = fitted_to_sets(both(TWO), [Presence(task="a"), Presence(task="b", every=4)], may_change=False)
    text = summary(found)
    assert "expected   4.00 s a step: tasks take part in some steps only" in text
    assert " 75.0 % of steps    4.00 s  a\n" in text
    assert "Sequential 2.50 s: 60.0 % longer" in text
    assert loads(dumps(found), Plan).task_sets == found.task_sets


def test_many_sets_are_summed_up() -> None:
    presences = [Presence(task="a"), *(Presence(task=f"b{i}", probability=0.5) for i in range(4))]
    metagraph = graph(metaop("a", times={1: 1.0}), *(metaop(f"b{i}", times={1: 1.0}) for i in range(4)))
    made = solve(metagraph, cluster(1, 1), time_limit_s=0.1)
    text = summary(fitted_to_sets(made, presences, may_change=True))
    assert "expected   3.00 s a step" in text
    assert "on average, 8 more sets" in text
