from dataclasses import replace

import pytest

from spindle.errors import PlanError
from spindle.planner.simulate import simulate
from spindle.values.trace import SpanKind, Trace
from tests.planner.planner_graphs import cluster, graph, metaop, piece, plan


def spans(trace: Trace, rank: int) -> list[tuple[object, ...]]:
    return [(s.kind.value, s.name, pytest.approx(s.start_s), pytest.approx(s.end_s)) for s in trace if s.rank == rank]


def test_forward_in_order_then_backward_in_reverse() -> None:
    """a (3 s on one device) then b (1.5 s on two): a third of each is forward."""
    metagraph = graph(metaop("a", times={1: 3.0}), metaop("b", times={2: 1.5}), flows="a>b")
    made = plan(piece("a", range(1), (0,), 0, 3), piece("b", range(1), (0, 1), 3, 4.5), metagraph=metagraph)
    trace = simulate(made)
    assert trace.source == "predicted"
    assert trace.step_s() == pytest.approx(4.5)
    assert spans(trace, 0) == [
        ("forward", "a[0:1]", 0.0, 1.0),
        ("forward", "b[0:1]", 1.0, 1.5),
        ("backward", "b[0:1]", 1.5, 2.5),
        ("backward", "a[0:1]", 2.5, 4.5),
    ]
    assert [s[0] for s in spans(trace, 1)] == ["forward", "backward"]


def test_unlike_forward_shares_lengthen_the_step() -> None:
    """a is all forward and b all backward, side by side for 1 s: together they take 2 s."""
    metagraph = graph(
        metaop("a", times={1: 1.0}, forward_fraction=1.0), metaop("b", times={1: 1.0}, forward_fraction=0.0)
    )
    made = plan(piece("a", range(1), (0,), 0, 1), piece("b", range(1), (1,), 0, 1), metagraph=metagraph)
    assert simulate(made).step_s() == pytest.approx(2.0)


def test_a_slice_that_started_late_is_simulated_at_once() -> None:
    metagraph = graph(metaop("a", times={1: 1.0}))
    made = plan(piece("a", range(1), (0,), 5, 6), metagraph=metagraph)
    assert simulate(made).step_s() == pytest.approx(1.0)


def test_transfers_and_reductions_are_charged() -> None:
    """4 bytes from one device to another at 1 B/s, both ways; then a's two copies of 2 bytes are reduced in 2 s."""
    metagraph = graph(
        metaop("a", times={2: 3.0}, output_bytes=4.0, layer_param_bytes=2.0), metaop("b", times={1: 3.0}), flows="a>b"
    )
    made = plan(piece("a", range(1), (0, 1), 0, 3), piece("b", range(1), (2,), 3, 14), metagraph=metagraph)
    trace = simulate(replace(made, cluster=cluster()))
    assert trace.step_s() == pytest.approx(3 + 3 + 2 * 4 + 2)
    assert trace.busy_s(SpanKind.TRANSFER) == pytest.approx(8.0)
    assert trace.busy_s(SpanKind.REDUCE) == pytest.approx(4.0)
    assert spans(trace, 2) == [
        ("transfer", "b[0:1]", 1.0, 5.0),
        ("forward", "b[0:1]", 5.0, 6.0),
        ("backward", "b[0:1]", 6.0, 8.0),
        ("transfer", "b[0:1]", 8.0, 12.0),
    ]


def test_new_parameters_of_sharded_states_follow_the_step() -> None:
    """Six bytes on two devices: reduced in 6 s, updated in 1 s each, handed out in 6 s; not on one device."""
    layer = replace(metaop("a", times={1: 1.0, 2: 1.0}, layer_param_bytes=6.0), layer_update_s=2.0)
    metagraph = replace(graph(layer), shard_optimizer=True)
    both = replace(plan(piece("a", range(1), (0, 1), 0, 1), metagraph=metagraph), cluster=cluster())
    assert spans(simulate(both), 1)[2:] == [
        ("reduce", "reduce over 2 devices from 0", 1.0, 7.0),
        ("step", "optimizer step", 7.0, 8.0),
        ("reduce", "new parameters over 2 devices from 0", 8.0, 14.0),
    ]
    alone = replace(plan(piece("a", range(1), (0,), 0, 1), metagraph=metagraph), cluster=cluster())
    assert spans(simulate(alone), 0)[2:] == [("step", "optimizer step", 1.0, 3.0)]


def loading(name: str, load_s: float) -> Trace:
    """a and c read batches, of tasks t and u, b none; a's two slices and c run on devices 0 and 1, b on 0."""
    metagraph = graph(
        replace(metaop("t.a", 2, times={1: 3.0}), load_s=load_s),
        metaop("t.b", times={1: 3.0}),
        replace(metaop("u.c", times={1: 3.0}), load_s=load_s),
        flows="t.a>t.b",
    )
    slices = [
        piece("t.a", range(1), (0,), 0, 3),
        piece("t.a", range(1, 2), (0,), 3, 6),
        piece("t.b", range(1), (2,), 6, 9),
        piece("u.c", range(1), (1,), 0, 3),
    ]
    toy = cluster()
    where = replace(toy, device=replace(toy.device, name=name))
    return simulate(replace(plan(*slices, metagraph=metagraph), cluster=where))


def test_a_cpu_loads_before_the_first_slice_that_reads() -> None:
    """Once a step and task, on the ranks that run such a slice."""
    trace = loading("cpu", 0.5)
    assert trace.step_s() == pytest.approx(9.5)
    loads = [(s.rank, s.name, s.task, s.start_s, s.end_s) for s in trace if s.kind is SpanKind.LOAD]
    assert loads == [(0, "load t", "t", 0.0, 0.5), (1, "load u", "u", 0.0, 0.5)]
    assert spans(trace, 0)[1:3] == [("forward", "t.a[0:1]", 0.5, 1.5), ("forward", "t.a[1:2]", 1.5, 2.5)]


@pytest.mark.parametrize(("load_s", "waits_s"), [(8.0, 0.0), (11.0, 2.0)])
def test_a_gpu_waits_only_for_loaders_slower_than_the_step(load_s: float, waits_s: float) -> None:
    trace = loading("gpu", load_s)
    assert trace.step_s() == pytest.approx(9.0 + waits_s)
    loads = [(s.rank, s.start_s, s.end_s) for s in trace if s.kind is SpanKind.LOAD]
    assert loads == ([(0, 0.0, waits_s), (1, 0.0, waits_s)] if waits_s else [])


def test_a_plan_without_metagraph_cannot_be_simulated() -> None:
    with pytest.raises(PlanError, match="carries no MetaGraph"):
        simulate(plan(piece("a", range(1), (0,), 0, 1)))
