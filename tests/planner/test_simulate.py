from dataclasses import replace

import pytest

from spindle.errors import PlanError
from spindle.planner.simulate import simulate
from spindle.trace import SpanKind, Trace
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


def test_a_plan_without_metagraph_cannot_be_simulated() -> None:
    with pytest.raises(PlanError, match="carries no MetaGraph"):
        simulate(plan(piece("a", range(1), (0,), 0, 1)))
