"""Turns: how tasks are divided into them, what they keep in memory, what a step of them takes, and when they win."""

from dataclasses import replace

import pytest

from spindle.cost.sampled import Costed
from spindle.errors import InfeasibleError
from spindle.planner.check import check_plan
from spindle.planner.costing.memory import peak_bytes
from spindle.planner.report.explain import explain
from spindle.planner.report.explained import render_explanation
from spindle.planner.report.render import render
from spindle.planner.sets import fitted_to_sets
from spindle.planner.simulate import simulate
from spindle.planner.solve import solve
from spindle.planner.turns import smallest_turns, solve_in_turns, turns_to_try
from spindle.timeline import render_page
from spindle.values.metagraph import MetaGraph
from spindle.values.plan import BUCKET_BYTES, Plan
from spindle.values.presence import Presence
from spindle.values.trace import SpanKind
from tests.planner.planner_graphs import cluster, graph, metaop, piece, plan


def tasks(*weights: float, flows: str = "", room: float = 100.0) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """What is tried of tasks t0, t1, .. that keep so many bytes on each of two devices."""
    metaops = [metaop(f"t{i}.a", times={2: 1.0}, memory={2: weight}) for i, weight in enumerate(weights)]
    return turns_to_try(graph(*metaops, flows=flows), cluster(1, 2, memory_bytes=room))


def test_tasks_that_hand_each_other_data_are_in_one_turn() -> None:
    """And so is what stands between them."""
    metaops = [metaop(f"t{i}.a") for i in range(5)]
    assert smallest_turns(graph(*metaops)) == (("t0",), ("t1",), ("t2",), ("t3",), ("t4",))
    assert smallest_turns(graph(*metaops, flows="t1.a>t3.a")) == (("t0",), ("t1", "t2", "t3"), ("t4",))
    assert smallest_turns(graph(*metaops, flows="t4.a>t0.a")) == (("t0", "t1", "t2", "t3", "t4"),)
    batches = [replace(metaop(f"{t}.a"), task=t) for t in ("t", "u", "t#1", "u#1")]
    assert smallest_turns(graph(*batches)) == (("t",), ("t#1",), ("u",), ("u#1",))


def test_the_fewest_turns_that_fit_are_tried() -> None:
    """Two are as even as can be; three where two are too large; where nothing fits, two and the smallest."""
    assert tasks(60.0, 20.0, 30.0, 40.0) == ((("t0", "t1"), ("t2", "t3")),)
    assert tasks(60.0, 20.0, 30.0, 40.0, room=70.0) == ((("t0",), ("t1", "t2"), ("t3",)),)
    two, smallest = (("t0",), ("t1", "t2")), (("t0",), ("t1",), ("t2",))
    assert tasks(60.0, 30.0, 20.0, room=50.0) == (two, smallest)
    assert tasks(60.0) == ()
    assert tasks(60.0, 60.0, flows="t0.a>t1.a") == ()


def test_a_turn_runs_forward_and_backward_before_the_next() -> None:
    """a takes 3 s on one device, then b 1.5 s on two: a third of each is forward."""
    metagraph = graph(metaop("a", times={1: 3.0}), metaop("b", times={2: 1.5}))
    made = plan(piece("a", range(1), (0,), 0, 3), piece("b", range(1), (0, 1), 3, 4.5), metagraph=metagraph)
    turned = simulate(replace(made, turns=(("a",), ("b",))))
    assert [(s.kind.value, s.name, s.start_s, s.end_s) for s in turned if s.rank == 0] == [
        ("forward", "a[0:1]", 0.0, 1.0),
        ("backward", "a[0:1]", 1.0, 3.0),
        ("forward", "b[0:1]", 3.0, 3.5),
        ("backward", "b[0:1]", 3.5, 4.5),
    ]
    assert turned.step_s() == pytest.approx(simulate(made).step_s())


def test_gradients_are_reduced_after_their_last_turn() -> None:
    """Both tasks train w, which is reduced after the second of them; a.x alone is ready in the first turn. Each fills a
    bucket, which takes 2 s.
    """
    num_bytes = 2.0 * BUCKET_BYTES
    a, b = (metaop(name, times={2: 3.0}, layer_param_bytes=num_bytes, parameters="w") for name in "ab")
    own = metaop("a.x", times={2: 3.0}, layer_param_bytes=num_bytes)
    slices = (
        piece("a", range(1), (0, 1), 0, 3),
        piece("a.x", range(1), (0, 1), 3, 6),
        piece("b", range(1), (0, 1), 6, 9),
    )
    where = cluster()
    link = replace(where.intra_node, bytes_per_s=float(BUCKET_BYTES))
    beside = replace(where, device=replace(where.device, overlap_cost=0.0), intra_node=link)
    made = replace(plan(*slices, metagraph=graph(a, own, b)), cluster=beside, turns=(("a",), ("b",)))
    reduced = sorted({(s.start_s, s.end_s) for s in simulate(made) if s.kind is SpanKind.REDUCE})
    # the backward of a.x ends at 4 s, that of a at 6 s; b's at 9 s
    assert [moment for span in reduced for moment in span] == pytest.approx([4.0, 6.0, 9.0, 11.0])


def test_the_fullest_turn_counts_in_memory() -> None:
    """Of 40 and 30 bytes, 8 and 10 are states, which stay; of a's, 6 more exist while it is computed again."""
    a = replace(metaop("a", memory={1: 40.0}, layer_param_bytes=4.0), recomputed_bytes=6.0)
    metagraph = graph(a, metaop("b", memory={1: 30.0}, layer_param_bytes=5.0))
    slices = [piece("a", range(1), (0,), 0, 1), piece("b", range(1), (0,), 1, 2)]
    assert peak_bytes(metagraph, slices, 2) == (70.0, 0.0)
    assert peak_bytes(metagraph, slices, 2, {"a": 0, "b": 1}) == (8.0 + 10.0 + 26.0 + 6.0, 0.0)
    assert peak_bytes(metagraph, slices, 2, {"a": 0, "b": 0}) == (70.0, 0.0)


# a and b keep 30 bytes each beside 8 of states; a device holds 60
MEMORY = {1: 76.0, 2: 38.0}
NARROW = graph(
    *(replace(metaop(f"{name}.a", memory=MEMORY, layer_param_bytes=4.0), layer_state_bytes=8.0) for name in "ab")
)


def test_tasks_that_do_not_fit_at_once_are_planned_in_turns() -> None:
    """On two devices of 60 bytes there is room for one task's activations."""
    where = cluster(1, 2, memory_bytes=60.0)
    with pytest.raises(InfeasibleError):
        solve(NARROW, where, method="sequential", time_limit_s=0.1)
    for method in ("auto", "lp", "sequential"):
        made = solve_in_turns(NARROW, where, (("a",), ("b",)), method=method, time_limit_s=0.1)
        assert made.turns == (("a",), ("b",))
        assert made.memory.peak_bytes_per_device == (46.0, 46.0)
        assert check_plan(made) == ()
        assert made.step_s == pytest.approx(4.0 + 4.0 + 8.0)  # and 4 bytes of gradients, there and back, of each
    full = MetaGraph(tuple(replace(m, layer_state_bytes=38.0) for m in NARROW))
    with pytest.raises(InfeasibleError, match="parameters and states of other turns leave no memory for a; shard"):
        solve_in_turns(full, cluster(1, 2, memory_bytes=38.0), (("a",), ("b",)), time_limit_s=0.1)


def made_in_turns() -> Plan:
    return solve_in_turns(NARROW, cluster(1, 2, memory_bytes=60.0), (("a",), ("b",)), time_limit_s=0.1)


def test_plans_say_that_tasks_run_in_turns() -> None:
    sentence = "The tasks run in 2 turns (a | b): each turn runs forward and backward before the next begins"
    for text in (render(made_in_turns()), render_explanation(explain(made_in_turns()))):
        assert sentence in " ".join(text.split())
        assert max(map(len, text.splitlines())) <= 100
    assert sentence in render_page(made_in_turns(), predicted=simulate(made_in_turns()))


def test_idle_devices_wait_for_the_turn_before() -> None:
    """b's second device waits while a runs on the first."""
    slices = (piece("a.a", range(1), (0,), 0, 8), piece("b.a", range(1), (1,), 8, 16))
    at_once = replace(plan(*slices, num_devices=2, per_node=2, metagraph=NARROW), cluster=cluster(1, 2))
    found = explain(replace(at_once, turns=(("a",), ("b",))))
    assert "b.a[0:1] x1 waits for the turn before it" in [window.until for window in found.windows]
    assert found.critical == ("a.a[0:1] x1", "b.a[0:1] x1")


def test_a_step_without_some_tasks_leaves_them_out_of_their_turn() -> None:
    presences = [Presence(task="a"), Presence(task="b", every=2)]
    found = fitted_to_sets(made_in_turns(), presences, may_change=True)
    assert found.turns == (("a",), ("b",))
    seconds = {each.tasks: [each.step_s, each.sequential_s] for each in found.task_sets}
    assert seconds.keys() == {("a",), ("a", "b")}
    assert seconds["a",] == pytest.approx([8.0, 8.0])
    assert seconds["a", "b"] == pytest.approx([16.0, 16.0])


def test_batches_of_other_sizes_are_costed_in_turns_too() -> None:
    """A step of which b takes twice as long."""
    a, b = NARROW.metaops
    other = MetaGraph((a, replace(b, layer_time_s=tuple((n, 2 * t) for n, t in b.layer_time_s))))
    costed = Costed(NARROW, (NARROW, other))
    where = cluster(1, 2, memory_bytes=60.0)
    made = solve_in_turns(costed.metagraph, where, (("a",), ("b",)), steps=costed.steps, time_limit_s=0.1)
    assert made.spread is not None
    assert made.spread.mean_s == pytest.approx(18.0)
